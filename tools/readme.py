"""Fill the generated sections of README.md from the code: the commands and the list of files.

python tools/readme.py            # rewrite README.md
python tools/readme.py --check    # exit 1 if it is not up to date
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from backhand.cli.commands import COMMANDS

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "src" / "backhand"


def commands_section() -> str:
    """Every command with its sentence and its example, as a table."""
    rows = [f"| `{command.name}` | {command.summary} | `{command.example}` |" for command in COMMANDS]
    return "\n".join(["| command | what it does | for example |", "|---|---|---|", *rows])


def files_section() -> str:
    """Every module of the package with the first line of its docstring, room by room."""
    own = [path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    parts = [_file_rows("`src/backhand/`", PACKAGE, own)]
    for room in rooms():
        folder = PACKAGE / room
        files = [path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"]
        if files:
            parts.append(_file_rows(f"`{room}/`", folder, files))
    return "\n\n".join(parts)


def rooms() -> list[str]:
    """The rooms that hold files, top to bottom, as the import contract has them."""
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(rule["layers"] for rule in project["tool"]["importlinter"]["contracts"] if rule["type"] == "layers")
    names = [name.strip().removeprefix("backhand.") for layer in layers for name in layer.split("|")]
    return [name for name in names if (PACKAGE / name).is_dir()]


SECTIONS: dict[str, Callable[[], str]] = {"commands": commands_section, "files": files_section}


def fill(readme: str) -> str:
    """The README with every generated section made anew.

    Raises:
        ValueError: a section's markers are not there exactly once.
    """
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}: made by tools/readme.py -->", f"<!-- end of {name} -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise ValueError(f"README.md must hold {begin!r} and {end!r} once each")
        before, after = readme[: readme.index(begin)], readme[readme.index(end) :]
        readme = f"{before}{begin}\n\n{section()}\n\n{after}"
    return readme


def main() -> int:
    """Rewrite README.md, or with --check only compare; the exit code."""
    path = PROJECT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = fill(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("README.md is not up to date: run make readme", file=sys.stderr)
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


def _file_rows(title: str, folder: Path, files: tuple[Path, ...] | list[Path]) -> str:
    purpose = first_line(folder / "__init__.py")
    rows = [f"| `{path.relative_to(folder)}` | {first_line(path)} |" for path in files]
    return "\n".join([f"**{title}** {purpose}", "", "| file | |", "|---|---|", *rows])


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
