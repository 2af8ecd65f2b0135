"""Every error that the package can raise, with its remedy, read from the code that raises it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backhand.errors import ArtifactError, CheckError, DataError, ResourceError, UsageError

CLASSES = {kind.__name__: kind for kind in (UsageError, DataError, ArtifactError, ResourceError, CheckError)}
# What to do where the message itself says what is expected.
GENERAL_REMEDIES = {
    "UsageError": "give what the message asks for",
    "DataError": "correct the place it names, or leave such rows out with `--skip-bad`",
    "ArtifactError": "copy or make the file again: it is damaged, or not what its name says",
    "ResourceError": "make room, or name another place",
    "CheckError": "read the table above the error: it names the worst line",
}


@dataclass(frozen=True)
class Raised:
    """One place that makes an error: its class, message and remedy, with ‹what is filled in› in angle quotes."""

    kind: str
    what: str
    next_step: str
    room: str


def raised_errors(package: Path) -> list[Raised]:
    """Every call of a class of the family, in the order of files and lines.

    Raises:
        ValueError: a call whose message is not written where it is raised, so that it cannot be listed.
    """
    found: list[Raised] = []
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            assert isinstance(call.func, ast.Name)
            said = {word.arg: word.value for word in call.keywords}
            what = call.args[0] if call.args else said.get("what")
            if what is None:
                raise ValueError(f"{path}:{call.lineno}: an error without a message")
            remedy = _text(said["next_step"], module) if "next_step" in said else ""
            found.append(Raised(call.func.id, _text(what, module), remedy, path.relative_to(package).parts[0]))
    return found


def error_page(package: Path) -> str:
    """The page: a section a class, a row an error."""
    errors = raised_errors(package)
    parts = [
        "# Every error and its remedy",
        (
            f"Read from the code: {len(errors)} places that raise. An error also names where it happened, and why. "
            "‹Angle quotes› stand for what is filled in. The exit codes are explained [here](errors.md)."
        ),
    ]
    for name, kind in CLASSES.items():
        rows: dict[str, None] = {}
        for error in errors:
            if error.kind == name:
                remedy = _cell(error.next_step) or GENERAL_REMEDIES[name]
                rows[f"| {_cell(error.what)} | {remedy} | {error.room} |"] = None
        parts += [
            f"## Exit code {kind.exit_code}: `{name}`",
            (kind.__doc__ or "").splitlines()[0],
            "\n".join(["| error | what to do | room |", "|---|---|---|", *rows]),
        ]
    return "\n\n".join([*parts, ""])


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
            yield node


def _text(node: ast.expr, module: str) -> str:
    """A string of the code as a reader sees it; ‹name› for what is filled in, alternatives joined by a stroke."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, module) for part in parts)
        case ast.FormattedValue(value=value):
            return _text(value, module)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, module) + _text(right, module)
        case ast.IfExp(body=body, orelse=orelse):
            return " / ".join(text for text in (_text(body, module), _text(orelse, module)) if text)
        case ast.Name(id=name) if name.strip("_").isupper():
            return str(getattr(importlib.import_module(module), name))
        case _:
            return f"‹{_name(node)}›"


def _name(node: ast.expr) -> str:
    """The most telling word of an expression: the last name in it."""
    names = [
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute | ast.Name)
    ]
    return (names[-1] if isinstance(node, ast.Call) else names[0]).strip("_").replace("_", " ") if names else "…"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "*_[]":
        text = text.replace(sign, f"\\{sign}")
    return text
