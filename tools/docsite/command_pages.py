"""One page a command, from what the command line itself is made of: its signature, which comes from its dataclass."""

from __future__ import annotations

import inspect
import typing
from typing import Any, get_args, get_origin

from cyclopts import Group, Parameter

from backhand.bounds import union_members
from backhand.cli.command import command
from backhand.cli.commands import COMMANDS
from backhand.cli.entry import Command
from backhand.cli.option_fields import option_fields
from backhand.options.config import TrainConfig


def command_pages() -> dict[str, str]:
    """Command name → Markdown."""
    return {command.name: _page(command) for command in COMMANDS}


def toml_page() -> str:
    """Every key of a TOML file of options, table by table, with its default and the same sentence as in the help."""
    parts = [
        "# Every key of a run's TOML file",
        (
            "`backhand train run.toml` reads what each run leaves as `config.toml`: these tables, with what was chosen "
            "automatically filled in. The command line wins over the file. An unknown key is an error."
        ),
    ]
    table = None
    rows: list[str] = []
    for field in [*option_fields(TrainConfig), None]:
        section = ".".join(field.section) if field else None
        if section != table and rows:
            parts += [f"## `[{table}]`", "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])]
            rows = []
        table = section
        if field:
            rows.append(f"| `{field.name}` | {_kind(field.hint)} | {_default(field.default)} | {_cell(field.help)} |")
    return "\n\n".join([*parts, ""])


def _page(entry: Command) -> str:
    groups: dict[str, list[str]] = {}
    for parameter in inspect.signature(command(entry)).parameters.values():
        hint, said = _annotated(parameter)
        title = next((group.name for group in _several(said.group) if isinstance(group, Group)), "Arguments")
        groups.setdefault(title, []).append(_row(parameter, hint, said))
    parts = [f"# `backhand {entry.name}`", entry.summary, f"```sh\n{entry.example}\n```"]
    for title, rows in groups.items():
        parts += [f"## {title}", "\n".join(["| | default | |", "|---|---|---|", *rows])]
    return "\n\n".join([*parts, ""])


def _annotated(parameter: inspect.Parameter) -> tuple[Any, Parameter]:
    hint, *annotations = get_args(parameter.annotation)
    (said,) = (annotation for annotation in annotations if isinstance(annotation, Parameter))
    return hint, said


def _several(value: Any) -> list[Any]:
    """Cyclopts' "one, several or none" as a list."""
    return list(value) if isinstance(value, tuple | list) else [value] if value else []


def _row(parameter: inspect.Parameter, hint: Any, said: Parameter) -> str:
    positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    names = _several(said.name) or [parameter.name.upper()]
    name = names[0] if positional else "--" + parameter.name.replace("_", "-")
    default = "" if parameter.default is inspect.Parameter.empty else _default(parameter.default)
    others = [] if positional else [f"`{other}`" for other in names if other.startswith("--") and other != name]
    shown = ", ".join([f"`{name}`", *others]) + ("" if _kind(hint) in ("", "flag") else f" {_kind(hint)}")
    return f"| {shown} | {default} | {_cell(said.help or '')} |"


def _kind(hint: Any) -> str:
    """Describe the accepted values: `int`, `text`, the choices, … several."""
    return " or ".join(dict.fromkeys(_one_kind(member) for member in union_members(hint)))


def _one_kind(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if origin is not None and issubclass(origin, tuple | list):
        return f"{_kind(get_args(hint)[0])} …"
    if origin is not None:
        return "name = value …"
    return {bool: "flag", int: "int", float: "number", str: "text"}.get(hint, "path")


def _default(value: Any) -> str:
    if value is None or value is False or value in ((), {}, ""):
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
