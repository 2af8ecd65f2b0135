"""Equivalents of the options, keys and commands of other tools, from `other_names.toml`.

The table serves the command line, TOML and YAML. This file imports no torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from importlib import resources

from backhand.words import nearest_names

NOT_NEEDED = "no option is needed: "
"""Start of an answer if there is no equivalent option."""
HERE = "here it is "
"""Start of an answer if there is one."""


@cache
def _table() -> dict[str, dict[str, str]]:
    return tomllib.loads(resources.files("backhand").joinpath("other_names.toml").read_text(encoding="utf-8"))


def option_answers() -> dict[str, str]:
    """Return the answer to each name of an option, with our own options in backquotes."""
    table = _table()
    return _by_name(table["options"]) | _by_name(table["no_option_needed"], NOT_NEEDED)


def command_answers() -> dict[str, str]:
    """Return our own command for each command of another tool."""
    return _by_name(_table()["commands"])


def value_answers() -> dict[str, str]:
    """Return our own value for each value of another tool."""
    return _by_name(_table()["values"])


def _by_name(names_of: Mapping[str, str], prefix: str = "") -> dict[str, str]:
    return {name: prefix + answer for answer, names in names_of.items() for name in names.split()}


def translate_option(
    name: str, shown: Callable[[str], str], known: Iterable[str] | None = None, *, value: object = ""
) -> str | None:
    """Return the equivalent of another tool's option as a clause, or None if no tool has that option.

    Args:
        name: the name as written, with dashes or underscores.
        shown: formats a field as an option or a key.
        known: the fields of the command; None for all.
        value: the value given, if known: the meaning of some names depends on it.
    """
    name, answers = name.strip("-").replace("-", "_").lower(), option_answers()
    text = answers.get(f"{name}={value}".lower(), answers.get(name))
    if text is None:
        return None
    begins = text.startswith("`")
    if known is not None and begins and text.split("`")[1] not in known:
        last = text.split("`")[-2]  # the option of other commands, if the answer ends with it
        return f"{HERE}{shown(last)}" if text.endswith(f"`{last}`") and last in known else None
    said = re.sub(r"`(\w+)`", lambda match: shown(match[1]), text)
    return f"{HERE}{said}" if begins else said


_SHORTEST = 3
"""Fewest characters from which the beginning of a name stands for the name."""


def _longer_or_shorter(name: str, known: Collection[str]) -> list[str]:
    """Return the shortest name that begins with `name`, else the longest with which `name` begins, or []."""
    longer = [one for one in known if len(name) >= _SHORTEST and one.startswith(name)]
    shorter = [one for one in known if name.startswith(f"{one}_")]
    return sorted(longer, key=len)[:1] or sorted(shorter, key=len)[-1:]


def suggestion(name: str, known: Collection[str], homes: Mapping[str, str], *, value: object = "") -> str | None:
    """Return what to write instead of an unknown name, or None if no name is near.

    Args:
        name: the name as written, with dashes or underscores.
        known: the names that are allowed where it was written.
        homes: names that are allowed elsewhere, with a noun phrase for the place.
        value: the value given: the meaning of some names depends on it.
    """
    field = name.replace("-", "_")
    if field in homes and field not in known and homes[field].startswith("backhand."):
        return f"leave it out: it is an option of {homes[field]}"
    if field in homes and field not in known:
        return f"write it in {homes[field]}" + (f", as {field}" if field != name else "")

    def placed(option: str) -> str:
        return option if option in known or option not in homes else f"{option} in {homes[option]}"

    if (meant := translate_option(name, placed, known, value=value)) is not None:
        return meant
    for near in _longer_or_shorter(field, known) or nearest_names(field, known, count=1, cutoff=0.6):
        return f"did you mean {near}?"
    if (meant := translate_option(name, placed, value=value)) is not None:
        return meant
    for near in nearest_names(field, homes, count=1, cutoff=0.6):
        return f"did you mean {near}, in {homes[near]}?"
    return None
