"""tools/prose.py finds the constructions that the style rules out, and accepts plain English."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tools import prose

LONG = "the gradient " * 20


def checkout(root: Path, name: str, text: str) -> Path:
    """A checkout with one file of the package or one page."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (root / page).touch()
    for folder in ("src/backhand", "docs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    return root


def rules(root: Path) -> list[tuple[str, int]]:
    return [(violation.rule, violation.line) for violation in prose.check(root)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""Return the sum."""\n', []),
        ('"""What the sum is."""\n', [("summary", 1)]),
        ('"""Whether it is there."""\n', [("summary", 1)]),
        ('"""Of a row, its tokens."""\n', [("summary", 1)]),
        ('"""Whatever the row contains."""\n', []),
        ("x = 1  # the weight beside the factors\n", [("word", 1)]),
        ("x = 1\nraise ValueError('nothing behind it')\n", [("word", 2)]),
        ("def told():\n    '''Return the notes.'''\n", [("word", 1)]),
        ("x = 1  # a stand-in for the model, standard and understandable\n", []),
        (f'"""Return it.\n\n{LONG}end.\n"""\n', [("sentence", 3)]),
        (f'"""Return it.\n\nThe formula is\n\n    {LONG}\n"""\n', []),
        (f"# {LONG}\nx = 1\n", [("sentence", 1)]),
        ('"""Code."""\n\n\nclass Op:\n    """An op."""\n\n    def run(self):\n        return 1\n', [("docstring", 7)]),
    ],
)
def test_code(tmp_path: Path, text: str, expected: list[tuple[str, int]]) -> None:
    assert rules(checkout(tmp_path, "src/backhand/ops/op.py", text)) == expected


def test_a_method_of_a_documented_interface_needs_no_docstring(tmp_path: Path) -> None:
    text = '''
        """Stores."""

        class Store:
            """A store."""

            def read(self):
                """Return the bytes."""

        class Memory(Store):
            """A store in memory."""

            def read(self):
                return b""
        '''
    assert rules(checkout(tmp_path, "src/backhand/files.py", text)) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("docs/a.md", "# Title\n\nTo train, run this command.\n", []),
        ("docs/a.md", f"# Title\n\n{LONG}.\n", [("sentence", 3)]),
        ("docs/a.md", f"| {LONG} |\n", []),
        ("docs/a.md", f"```text\n{LONG}\n```\n", []),
        ("docs/a.md", "Short sentence.\n" * 7, [("paragraph", 1)]),
        ("docs/a.md", "- One item.\n" * 7, []),
        ("docs/a.md", "- First.\n- Nothing behind it.\n", [("word", 2)]),
        ("docs/log.md", f"{LONG}.\n", []),
    ],
)
def test_pages(tmp_path: Path, name: str, text: str, expected: list[tuple[str, int]]) -> None:
    assert rules(checkout(tmp_path, name, text)) == expected


def test_only_the_files_asked_for_are_checked(tmp_path: Path) -> None:
    checkout(tmp_path, "src/backhand/ops/op.py", '"""What it is."""\n')
    checkout(tmp_path, "src/backhand/nn/batch.py", '"""What it is."""\n')
    assert [violation.path.name for violation in prose.check(tmp_path, [Path("src/backhand/nn")])] == ["batch.py"]
