"""The documentation site: derivations keep every sign of the docstring, and the made pages say what the code says."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path

import pytest

from backhand.cli.commands import COMMANDS
from backhand.cli.option_fields import option_fields
from backhand.ops.registry import OPS
from backhand.options.config import TrainConfig
from tools.docsite import build
from tools.docsite.command_pages import command_pages, toml_page
from tools.docsite.error_page import CLASSES, raised_errors
from tools.docsite.mathematics import derivation, typeset

PACKAGE = build.PACKAGE
FILES = [
    *(f"ops/{file}.py" for file in sorted(set(OPS.values()))),
    "nn/decoder/block.py",
    "nn/decoder/forward_backward.py",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "site"
    build.assemble(target)
    return target


def signs(text: str) -> str:
    """What a reader sees, without what typesetting may change: white space, brackets, and signs that mark an index."""
    return re.sub(r"[\s_^{}()\[\]\\*`\u2002\u2003]", "", text)


def shown(markdown: str) -> str:
    text = re.sub(r"\]\(https://arxiv\.org/abs/[\d.]+\)", "]", markdown)
    return html.unescape(re.sub(r"</?(table|tr|td|i|sub|sup|code|a)\b[^>]*>", "", text))


@pytest.mark.parametrize("file", FILES)
def test_a_derivation_keeps_every_sign_of_the_docstring(file: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
    assert docstring
    page = derivation(docstring)
    assert signs(shown(page)) == signs(docstring.partition("\n\n")[2])
    set_lines = [line for line in docstring.splitlines() if line.startswith("    ")]
    assert page.count("<tr>") >= len(set_lines) > 0


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("s G B", "<i>s</i> <i>G</i> <i>B</i>"),
        ("(∂L/∂h)ᵀ x̃", "(∂<i>L</i>/∂<i>h</i>)ᵀ <i>x̃</i>"),
        ("W[i_t]", "<i>W</i>[<i>i</i><sub><i>t</i></sub>]"),
        ("e_{i_t}", "<i>e</i><sub><i>i</i><sub><i>t</i></sub></sub>"),
        ("x_j²", "<i>x</i><sub><i>j</i></sub>²"),
        ("(a)^(-1/2)", "(<i>a</i>)<sup>-1/2</sup>"),
        ("e^(−x²/2)", "<i>e</i><sup>−<i>x</i>²/2</sup>"),
        ("softmax_rows(S)", "softmax<sub>rows</sub>(<i>S</i>)"),
        ("(n, head_dim)", "(<i>n</i>, <code>head_dim</code>)"),
        ("s dh Bᵀ", "<i>s</i> d<i>h</i> <i>B</i>ᵀ"),
        ("x > 0", "<i>x</i> &gt; 0"),
        ("the token's id", "the token's id"),
    ],
)
def test_a_formula_is_set(formula: str, expected: str) -> None:
    assert typeset(formula) == expected


def test_a_set_line_becomes_left_side_right_side_and_shape() -> None:
    page = derivation("Title.\n\nBackward. With G = ∂L/∂y,\n    ∂L/∂h     = s G B       (..., rank)\nand `d_y` stays.")
    assert page == (
        "**Backward.** With G = ∂L/∂y,\n\n"
        '<table class="formulas">\n'
        "<tr><td>∂<i>L</i>/∂<i>h</i></td><td>= <i>s</i> <i>G</i> <i>B</i></td><td>(..., rank)</td></tr>\n"
        "</table>\n\n"
        "and `d_y` stays."
    )


def test_what_markdown_would_read_as_markup_stays_text() -> None:
    assert derivation("T.\n\nW (out, *K) and A[r] < d_y, [arXiv:2106.09685].") == (
        r"W (out, \*K) and A\[r\] &lt; d\_y, \[arXiv:[2106.09685](https://arxiv.org/abs/2106.09685)\]."
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_page_has_every_option_of_its_help(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    from backhand.cli.main import main

    assert main([command.name, "--help"]) == 0
    options = set(re.findall(r"^│ (?:\*? {0,4})(--(?!no-)[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    page = command_pages()[command.name]
    assert options
    # In the first cell of a row, by itself or next to another name of it.
    rows = set(re.findall(r"`(--[\w-]+)`", "\n".join(re.findall(r"^\| ([^|]*)\|", page, re.MULTILINE))))
    assert options <= rows


def test_the_toml_page_has_every_key_in_its_table() -> None:
    tables = dict(re.findall(r"## `\[(\w+)\]`\n\n(.*?)(?=\n\n|\Z)", toml_page(), re.DOTALL))
    for field in option_fields(TrainConfig):
        assert f"| `{field.name}` |" in tables[".".join(field.section)]


def test_every_error_is_listed() -> None:
    written = sum(
        len(re.findall(rf"\b(?:{'|'.join(CLASSES)})\(", path.read_text(encoding="utf-8")))
        - len(re.findall(rf"class (?:{'|'.join(CLASSES)})\(", path.read_text(encoding="utf-8")))
        for path in PACKAGE.rglob("*.py")
    )
    errors = raised_errors(PACKAGE)
    assert len(errors) == written > 300
    assert all(error.what.strip(" ‹›…") for error in errors), "a message of nothing but fillings says nothing"


def test_an_error_is_next_to_its_remedy(tmp_path: Path) -> None:
    module = tmp_path / "backhand" / "data" / "cells.py"
    module.parent.mkdir(parents=True)
    module.write_text('raise DataError(f"{len(row)} cells" + "!", next_step="a" if many else "b")\n')
    (error,) = raised_errors(tmp_path / "backhand")
    assert (error.kind, error.what, error.next_step, error.room) == ("DataError", "‹row› cells!", "a / b", "data")


def test_an_error_without_a_message_is_refused(tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text("raise UsageError()\n")
    with pytest.raises(ValueError, match=r"silent\.py:1"):
        raised_errors(tmp_path)


def test_every_page_is_in_the_navigation_once(site: Path) -> None:
    pages = sorted(str(path.relative_to(site / "pages")) for path in (site / "pages").rglob("*.md"))
    line = next(line for line in (site / "zensical.toml").read_text().splitlines() if line.startswith("nav = "))
    assert sorted(re.findall(r'= "([\w/]+\.md)"', line)) == pages
    assert {f"ops/{file}.md" for file in OPS.values()} < set(pages)


def test_a_derivation_page_shows_the_code_and_the_mutants(site: Path) -> None:
    page = (site / "pages" / "ops" / "lora_linear.md").read_text()
    assert "def lora_linear_backward(" in page
    assert "| `d_lora_A` |" in page
    assert "scaling forgotten" in page
    assert "::: backhand.ops.lora_linear.lora_linear_backward" in page


@pytest.mark.parametrize(
    ("text", "page", "expected"),
    [
        ("[op](../src/backhand/ops/mse.py)", "guide.md", "[op](ops/mse.md)"),
        ("[op](../../src/backhand/ops/mse.py)", "recipes/guide.md", "[op](../ops/mse.md)"),
        ("[block](../src/backhand/nn/decoder/block.py)", "guide.md", "[block](ops/block.md)"),
        ("[run](../.ci/run)", "guide.md", "`run`"),
        ("[a](data.md#forms)", "guide.md", "[a](data.md#forms)"),
        ("[a](docs/data.md)", "contributing.md", "[a](data.md)"),
        ("[a](../CONTRIBUTING.md)", "guide.md", "[a](contributing.md)"),
        ("[gone](gone.md)", "guide.md", "[gone](gone.md)"),
        ("```\n[op](../src/backhand/ops/mse.py)\n```", "guide.md", "```\n[op](../src/backhand/ops/mse.py)\n```"),
        ("[web](https://pytorch.org)", "guide.md", "[web](https://pytorch.org)"),
    ],
)
def test_links_lead_to_pages(text: str, page: str, expected: str) -> None:
    assert build.relink(text, Path(page), {"mse", "block"}) == expected


def test_the_tables_are_pages(site: Path) -> None:
    assert (site / "pages" / "benchmarks.md").read_text().startswith("# How fast\n")
    line = next(line for line in (site / "zensical.toml").read_text().splitlines() if line.startswith("nav = "))
    for title, page in (("How fast", "benchmarks"), ("Every file", "files"), ("Commands", "commands")):
        assert f'"{title}" = "{page}.md"' in line
