"""Description of one subcommand, from which the command line and the README are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    name: str
    summary: str
    example: str  # a complete command line that works, if the user's rows are in rows.jsonl
    # Dataclass of the options, each with a docstring under its field, and the function that takes it. `module:name` is
    # imported when the command is named or run. An integer that the function returns is the exit code.
    options: str | type
    function: str | Callable[..., object]
    positional: tuple[str, ...] = ()
    text: str = ""  # option that takes one text, or `data` if it takes texts as rows alone
    file: Callable[[Path], Any] | None = None  # reads a TOML file, the command's first argument
    tell_typed: bool = False  # pass the names of the typed fields to the function, as `typed`
    # Returns the run that the command proves something about, or None. Its report is updated.
    report_of: Callable[[Any], Path | None] | None = None
