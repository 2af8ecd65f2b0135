"""What a reward function is called, checked before anything is loaded: names alone, nothing is imported or run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import regex

from backhand.errors import UsageError

GYM = "reasoning_gym"
PLAIN = ("exact", "number")
WITH_ARGUMENT = ("regex", "json", "length", GYM)


class RewardName(NamedTuple):
    """A name in its parts."""

    kind: str  # `exact`, `number`, `regex`, `json`, `length`, `reasoning_gym`, `file` or `module`
    place: str = ""  # what stands before the last colon: a file, a module; of a built-in one its argument
    function: str = ""  # of a file or module, the function in it

    @property
    def shown(self) -> str:
        """How metrics call it."""
        return self.function or self.kind


def parse_name(name: str) -> RewardName:
    """The parts of a name, whatever they are worth."""
    kind, _, argument = name.partition(":")
    if kind in PLAIN or kind in WITH_ARGUMENT:
        return RewardName(kind, argument)
    place, _, function = name.rpartition(":")
    return RewardName("file" if place.endswith(".py") else "module", place, function)


def shown_names(names: tuple[str, ...]) -> list[str]:
    """How metrics call each, a number behind those of the same name."""
    shown = [parse_name(name).shown for name in names]
    return [one if shown.count(one) == 1 else f"{one}_{i + 1}" for i, one in enumerate(shown)]


def check_name(where: str, name: object) -> None:
    """Raise UsageError for what is no name of a reward function, or names a file that is not there."""
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{name!r} is not the name of a reward function", where=where)
    found = parse_name(name)
    problem = why = None
    if found.kind in WITH_ARGUMENT and not found.place:
        problem = f"{name} needs what comes behind a colon"
    elif found.kind in PLAIN and ":" in name:
        problem = f"{found.kind} takes nothing behind a colon"
    elif found.kind == "length" and not (found.place.isdecimal() and int(found.place)):
        problem = f"{found.place!r} is not a number of tokens"
    elif found.kind == "regex":
        try:
            regex.compile(found.place)
        except regex.error as error:
            problem, why = f"{found.place!r} is not a regular expression", str(error)
    elif found.kind in ("file", "json") and not Path(found.place).is_file():
        problem = f"there is no file {found.place}"
    elif found.kind in ("file", "module") and not (found.place and found.function.isidentifier()):
        problem = f"{name!r} is neither a built-in reward nor of the form MODULE:FUNCTION or FILE.py:FUNCTION"
    if problem is not None:
        raise UsageError(
            problem,
            where=where,
            why=why,
            next_step="built in are exact, number, regex:PATTERN, json:SCHEMA.json, length:TOKENS, reasoning_gym:TASK",
        )
