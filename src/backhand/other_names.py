"""Equivalents of the options, keys and commands of other tools, from `other_names.toml`.

The table serves the command line, TOML and YAML. This file imports no torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

from backhand.words import nearest_names

NOT_NEEDED = "no option is needed: "
"""Start of an answer if there is no equivalent option."""
TYPO = 0.75
"""Similarity from which an unknown name is probably a known one, misspelt."""
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


def method_answers() -> dict[str, str]:
    """Return our own method of an observer for each method of another tool's callback."""
    return _by_name(_table()["methods"])


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
    if known is not None and name not in known:
        answers = answers | _by_name(_table()["not_this_command"])
    text = answers.get(f"{name}={value}".lower(), answers.get(name))
    if text is None:
        return None
    begins = text.startswith("`")
    if known is not None and begins:
        first, last = text.split("`")[1], text.split("`")[-2]  # `last`: of other commands, if the answer ends with it
        if first not in known:
            return f"{HERE}{shown(last)}" if text.endswith(f"`{last}`") and last in known else None
        if text.endswith(f"`{last}`") and last not in known:
            return f"{HERE}{shown(first)}"
    said = re.sub(r"`(\w+)`", lambda match: shown(match[1]), text)
    return f"{HERE}{said}" if begins else said


_SHORTEST = 3
"""Fewest characters from which the beginning of a name stands for the name."""


def longer_or_shorter(name: str, known: Collection[str]) -> list[str]:
    """Return the shortest name that begins with `name`, else the longest with which `name` begins, or []."""
    longer = [one for one in known if len(name) >= _SHORTEST and one.startswith(name)]
    shorter = [one for one in known if name.startswith(f"{one}_")]
    return sorted(longer, key=len)[:1] or sorted(shorter, key=len)[-1:]


_TEXTS = ("input", "prompt", "query", "state", "text")
"""Names of a single text. Each is also known with an `s` at its end, for several."""


def is_text(name: str) -> bool:
    """Return True for a name that others have for an option that takes one text or several."""
    return name.strip("-").removesuffix("s") in _TEXTS


def text_meant(name: str, text: str | None, known: Collection[str]) -> str | None:
    """Return the name of the option for texts if `name` is a name that others have for it.

    Args:
        name: the name as written, with dashes or underscores.
        text: the option that takes a single text where it was written, if there is one.
        known: the names that are allowed there.
    """
    if text is None or not is_text(name):
        return None
    return f"{text}s" if name.endswith("s") and f"{text}s" in known else text


def suggestion(
    name: str,
    known: Collection[str],
    homes: Mapping[str, str],
    *,
    value: object = "",
    text: str | None = None,
    shown: Callable[[str], str] = str,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> str | None:
    """Return what to write instead of an unknown name, or None if no name is near.

    Args:
        name: the name as written, with dashes or underscores.
        known: the names that are allowed where it was written.
        homes: names that are allowed elsewhere, with a noun phrase for the place.
        value: the value given: the meaning of some names depends on it.
        text: the option that takes a single text where the name was written, if there is one.
        shown: formats the equivalent of another tool's option.
        aliases: our own options by their other names on the command line.
    """
    field = name.replace("-", "_")
    if aliases.get(field) in known:
        return f"{HERE}{aliases[field]}"
    field = aliases.get(field, field)
    if not isinstance(value, bool) and (same := text_meant(name, text, known)) is not None:
        return f"{HERE}{same}"
    of_column = field == "label" and isinstance(value, str) and value and {"completion", "labels"} <= {*known}
    for near in nearest_names(field, known, count=1, cutoff=0.9):
        if near != field and not of_column:  # the name of a table of options may be written as an option
            return f"did you mean {near}?"

    def placed(option: str) -> str:
        return shown(option) + ("" if option in known or option not in homes else f" in {homes[option]}")

    # Before the place of our own options: the value of one can be the name of another, as `objective` of `lint`.
    if (meant := translate_option(name, placed, known, value=value)) is not None:
        return meant
    if field in homes and field not in known and homes[field].startswith("backhand."):
        return f"leave it out: it is an option of {homes[field]}"
    if field in homes and field not in known:
        return f"write it in {homes[field]}" + (f", as {field}" if field != name else "")
    for near in longer_or_shorter(field, known) or nearest_names(field, known, count=1, cutoff=TYPO):
        return f"did you mean {near}?"
    if (meant := translate_option(name, placed, {*known, *homes}, value=value)) is not None:
        return meant
    for near in nearest_names(field, homes, count=1, cutoff=TYPO):
        return f"did you mean {near}, in {homes[near]}?"
    return None


def value_suggestion(value: object, choices: Collection[object], option: str = "") -> str | None:
    """Return which choice to give instead of a value of an option, or None if no choice is near."""
    if option.endswith("report_to") and str(value).lower() in ("false", "none"):
        return "leave report_to out: no tracker is the default"
    if not isinstance(value, str):
        value = str(value).rpartition(".")[2]  # such as torch.bfloat16
    known = [choice for choice in choices if isinstance(choice, str)]
    if (same := value_answers().get(value.lower())) in known:
        return f"{HERE}{same}"
    # Choices are often short words, in which two swapped letters weigh more than in names of options.
    for near in nearest_names(value.lower(), known, count=1):
        return f"did you mean {near}?"
    return None
