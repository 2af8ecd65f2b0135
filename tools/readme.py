"""Fill the generated sections of README.md and docs/ from the code and from stored results.

python tools/readme.py            # rewrite the pages
python tools/readme.py --check    # exit 1 if one is not up to date
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from backhand.cli.commands import COMMANDS

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "src" / "backhand"


def commands_section() -> str:
    """Every command with its sentence and its example, as a table."""
    rows = [f"| `{command.name}` | {command.summary} | `{command.example}` |" for command in COMMANDS]
    return "\n".join(["| command | what it does | for example |", "|---|---|---|", *rows])


def files_section() -> str:
    """Every module of the package with the first line of its docstring, package by package."""
    own = [path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    parts = [_file_rows("`src/backhand/`", PACKAGE, own)]
    for package in packages():
        folder = PACKAGE / package
        files = [path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"]
        if files:
            parts.append(_file_rows(f"`{package}/`", folder, files))
    return "\n\n".join(parts)


def packages_section() -> str:
    """Return every package (folder) with the first line of its docstring, top to bottom, as a list."""
    return "\n".join(f"- `{name}`: {first_line(_source(name))}" for name in packages())


def layers() -> list[str]:
    """Return the packages and top-level files, top to bottom as in the import contract."""
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    found = next(rule["layers"] for rule in project["tool"]["importlinter"]["contracts"] if rule["type"] == "layers")
    return [name.strip().removeprefix("backhand.") for layer in found for name in layer.split("|")]


def packages() -> list[str]:
    """The layers that are folders."""
    return [name for name in layers() if (PACKAGE / name).is_dir()]


def _source(name: str) -> Path:
    folder = PACKAGE / name
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def benchmarks() -> ModuleType:
    """benchmarks/table.py, which is no package's."""
    return _module(PROJECT / "benchmarks" / "table.py")


def scaling_section(kind: str) -> str:
    """A table of docs/scaling.md."""
    return str(benchmarks().scaling_section(kind))


def decisions_section(name: str) -> str:
    """A section of docs/decisions.md."""
    sys.path.insert(0, str(PROJECT / "benchmarks"))
    return str(getattr(_module(PROJECT / "benchmarks" / "decision_tables.py"), f"{name}_section")())


def models_section(name: str) -> str:
    """A section of docs/models.md."""
    return str(getattr(_module(PROJECT / "tools" / "models_page.py"), name)())


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"speed": lambda: str(benchmarks().summary()), "packages": packages_section},
    "docs/commands.md": {"commands": commands_section},
    "docs/files.md": {"files": files_section},
    "docs/quantized.md": {
        "quantized": lambda: str(benchmarks().quantized_section()),
        "base types": lambda: str(benchmarks().base_types_section()),
    },
    "docs/decisions.md": {
        name: partial(decisions_section, name) for name in ("posteriors", "texts", "speed", "agreement")
    },
    "docs/benchmarks.md": {"benchmarks": lambda: str(benchmarks().section())},
    "docs/scaling.md": {
        f"scaling {kind}": partial(scaling_section, kind) for kind in ("exchange", "turns", "runs", "peers", "carried")
    },
    "docs/models.md": {
        name: partial(models_section, f"{name}_section") for name in ("families", "wrappers", "storage", "fallback")
    },
}


def fill(page: str, text: str) -> str:
    """The page with every generated section of it made anew.

    Raises:
        ValueError: a section's markers are not there exactly once.
    """
    for name, section in SECTIONS[page].items():
        begin, end = f"<!-- {name}: made by tools/readme.py -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} must hold {begin!r} and {end!r} once each")
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n\n{section()}\n\n{after}"
    return text


NOTEBOOKS = {"docs/python.ipynb": "docs/python.md"}
"""Notebooks, each with the page that it is made from."""


def notebook(page: str) -> str:
    """Return a page as a notebook: its Python blocks are cells of code, and the text between them is Markdown."""
    cells: list[dict[str, object]] = []
    for number, text in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)):
        code: dict[str, object] = {"execution_count": None, "outputs": []} if number % 2 else {}
        kind = "code" if number % 2 else "markdown"
        if text.strip():
            cells.append({"cell_type": kind, "metadata": {}, **code, "source": text.strip().splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Rewrite the pages, or with --check only compare; the exit code."""
    stale = []
    for page in (*SECTIONS, *NOTEBOOKS):
        path = PROJECT / page
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        source = NOTEBOOKS.get(page)
        after = notebook((PROJECT / source).read_text(encoding="utf-8")) if source else fill(page, before)
        if before != after:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"not up to date: {', '.join(stale)}: run make readme", file=sys.stderr)
        return 1
    return 0


def _file_rows(title: str, folder: Path, files: tuple[Path, ...] | list[Path]) -> str:
    purpose = first_line(folder / "__init__.py")
    rows = [f"| `{path.relative_to(folder)}` | {first_line(path)} |" for path in files]
    return "\n".join([f"## {title}", "", purpose, "", "| file | |", "|---|---|", *rows])


def first_line(path: Path) -> str:
    """The first line of a module's docstring.

    Raises:
        ValueError: the module has none.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path} has no docstring to take a phrase from")
    return docstring.splitlines()[0].replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
