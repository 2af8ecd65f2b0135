"""tools/size.py: what it counts, on a small tree with an import upward and a circle, and on the package itself."""

from __future__ import annotations

import importlib.util
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from backhand.kernels.builds import library

PROJECT = Path(__file__).parents[2]

PYPROJECT = """
[[tool.importlinter.contracts]]
name = "down"
type = "layers"
layers = ["backhand.cli", "backhand.training", "backhand.ops", "backhand.files | backhand.words"]
"""
FILES = {
    "__init__.py": '"""A package."""\nfrom importlib import import_module\nimport_module("backhand.cli.main")\n',
    "words.py": '"""Words."""\n',
    # Next to each other in one layer: neither may import the other.
    "files.py": '"""Files."""\nimport os\nfrom backhand import words\n',
    "cli/__init__.py": "",
    "cli/main.py": "def main():\n    from backhand.training.trainer import (\n        Loop,\n    )\n    Loop()\n",
    "training/__init__.py": "import importlib\nimportlib.import_module('backhand.cli.main')\n",
    "training/trainer.py": "from backhand.ops import linear\nclass Loop: ...\n",
    "ops/__init__.py": "",
    "ops/linear.py": "name = 'x'\nimport importlib\nimportlib.import_module(f'backhand.ops.{name}')\n"
    "def f():\n    from backhand.ops.rows import rows\n",
    "ops/rows.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from backhand.cli import main\n"
    "else:\n    from backhand.ops.linear import f\n",
}


@pytest.fixture(scope="module")
def size() -> ModuleType:
    path = PROJECT / "tools" / "size.py"
    spec = importlib.util.spec_from_file_location("size", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["size"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    for name, text in FILES.items():
        path = tmp_path / "src" / "backhand" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_lines_and_import_lines(size: ModuleType, tree: Path) -> None:
    modules = {module.path: module for module in size.read_modules(tree / "src" / "backhand")}
    assert set(modules) == set(FILES)
    assert (modules["cli/main.py"].lines, modules["cli/main.py"].import_lines) == (5, 3)
    assert (modules["ops/rows.py"].lines, modules["ops/rows.py"].import_lines) == (5, 3)
    assert (modules["words.py"].lines, modules["words.py"].import_lines) == (1, 0)


def test_code_lines_and_parameters(size: ModuleType, tree: Path) -> None:
    (tree / "src" / "backhand" / "words.py").write_text(
        '"""Words."""\n\nimport os\n\nLIMIT = 3  # a comment\n"""What it is."""\n# another\n\n\n'
        'class Word:\n    """One."""\n\n    def spell(self, a, *rest, b=1, **more):\n        """Spell\n        it."""\n'
        "        return (\n            a\n        )\n"
    )
    (module,) = (one for one in size.read_modules(tree / "src" / "backhand") if one.path == "words.py")
    assert module.code_lines == 6
    assert module.signatures == (("spell", 4),)


def test_circles_for_type_checkers_are_distinguished(size: ModuleType, tree: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from backhand.training import trainer\n"
    (tree / "src" / "backhand" / "ops" / "linear.py").write_text(text)
    modules = size.read_modules(tree / "src" / "backhand")
    assert size.circles(modules) == []
    assert ["backhand.ops.linear", "backhand.training.trainer"] in [
        [name for name in group if name in ("backhand.ops.linear", "backhand.training.trainer")]
        for group in size.circles(modules, for_types=True)
    ]


def test_imports_upward_and_within_a_layer_are_found(size: ModuleType, tree: Path) -> None:
    modules = size.read_modules(tree / "src" / "backhand")
    layers = size.read_layers(tree / "pyproject.toml")
    assert layers == [{"cli"}, {"training"}, {"ops"}, {"files", "words"}]
    assert size.upward(modules, layers) == [
        ("backhand.files", "backhand.words"),
        ("backhand.training", "backhand.cli.main"),
    ]


def test_circles_are_found(size: ModuleType, tree: Path) -> None:
    modules = size.read_modules(tree / "src" / "backhand")
    assert size.circles(modules) == [["backhand.ops.linear", "backhand.ops.rows"]]
    (tree / "src" / "backhand" / "ops" / "rows.py").write_text("")
    assert size.circles(size.read_modules(tree / "src" / "backhand")) == []


def test_another_tree_is_reported(
    size: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["size.py", "--no-step", "--tree", str(tree)])
    assert size.main() == 0
    words = re.sub(r" +", " ", capsys.readouterr().out)
    assert "files 10\n" in words
    assert "upward imports 2\n backhand.files → backhand.words\n" in words
    assert "circles 1\n backhand.ops.linear ⇄ backhand.ops.rows\n" in words
    assert "\nops 3 10 3\n" in words


def test_no_import_of_the_package_points_upward_or_in_a_circle(size: ModuleType) -> None:
    modules = size.read_modules(PROJECT / "src" / "backhand")
    assert len(modules) > 100
    assert size.upward(modules, size.read_layers(PROJECT / "pyproject.toml")) == []
    assert size.circles(modules) == []


def test_later_objectives_are_counted_separately(size: ModuleType) -> None:
    modules = size.read_modules(PROJECT / "src" / "backhand")
    groups = {module.path: size.later_group(module.path) for module in modules}
    assert groups["ops/decide.py"] == groups["data/decision_rows.py"] == "decide"
    assert groups["studio/app.py"] == "studio"
    assert groups["ops/lora_linear.py"] is groups["loop/step.py"] is None
    unused = [
        pattern
        for patterns in size.LATER.values()
        for pattern in patterns
        if not any(fnmatch(module.path, pattern) for module in modules)
    ]
    assert not unused, "patterns that match no file"
    lines = [line.split() for line in size.size_table(modules, [])]
    parts = [line for line in lines if line[0] in size.LATER or line[0] == "without"]
    numbers = [[int(number.replace(",", "")) for number in line[-3:]] for line in parts]
    assert [sum(column) for column in zip(*numbers, strict=True)] == [
        len(modules),
        sum(module.lines for module in modules),
        sum(module.code_lines for module in modules),
    ]


@pytest.mark.skipif(
    library() is None, reason="without the compiled library, a step takes torch's forms, in other files"
)
def test_the_files_of_one_step_are_those_that_a_reader_is_sent_through(size: ModuleType) -> None:
    way = size.step_files(PROJECT)
    modules = size.read_modules(PROJECT / "src" / "backhand")
    assert [mark for mark in size.marks(PROJECT, modules, way) if mark.size > mark.limit] == []
    assert list(way)[:2] == ["__main__.py", "cli/main.py"]
    assert "AdapterOptimizer.step" in way["loop/step.py"]
    assert not any(path.startswith(("nn/loading/", "verify/", "nn/modules/")) for path in way)
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    order = text[text.index("seven files") :].split("\n\n")[1]
    seven = re.findall(r"^\d\. \[`(\S+\.py)`\]\(src/backhand/(\S+\.py)\)", order, re.MULTILINE)
    assert len(seven) == 7
    assert all(shown == target for shown, target in seven)
    first, *others = [target for _, target in seven]
    assert first == "ops/lora_linear.py", "the idea; a step takes its formulas from the next"
    assert "ops/lora_group.py" in way
    # A plain step finds the views of this file, which the pass before it has cached.
    assert set(others) - set(way) == {"nn/decoder/adapted_group.py"}
