"""Errors of the package's functions: they name options as a call does.

    give --objective dpo, or --data FILE      →      give objective="dpo", or data=FILE

Messages are written for the command line, where most of them are read. A part that quotes a whole command keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from backhand.bounds import split_hint, union_members
from backhand.cli.option_fields import as_option, option_fields
from backhand.errors import BackhandError

P = ParamSpec("P")
R = TypeVar("R")

_COMMAND = re.compile(r"\bbackhand [a-z]")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]")
_VALUE = re.compile(r" ([A-Z][A-Z_]+\b|\d[\d.e-]*\b|[a-z0-9_-]+\b)")


def errors_in_python(*kinds: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: errors of the function name the options of these dataclasses as keyword arguments."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except BackhandError as error:
                hints = {as_option(field.name): field.hint for kind in kinds for field in option_fields(kind)}
                error.reword(partial(in_python, hints=hints))
                raise

        return call

    return decorate


def in_python(text: str, hints: dict[str, Any]) -> str:
    """Return a text with options as keyword arguments.

    Args:
        text: a part of an error.
        hints: the type of each option, by its name with dashes. Other words that look like options stay as they are.
    """
    if _COMMAND.search(text):
        return text
    pieces, end = [], 0
    for match in _OPTION.finditer(text):
        if match[0] not in hints:
            continue
        name, hint = match[0][2:].replace("-", "_"), hints[match[0]]
        value, after = _value(hint, _VALUE.match(text, match.end()))
        pieces += [text[end : match.start()], name + value]
        end = after or match.end()
    return "".join(pieces) + text[end:]


def _value(hint: Any, word: re.Match[str] | None) -> tuple[str, int]:
    """Return the value of a keyword argument with its sign of equality, and the end of the word that it replaces."""
    plain = split_hint(hint)[0]
    choices = [one for member in union_members(plain) if get_origin(member) is Literal for one in get_args(member)]
    if plain is bool:
        return "=True", 0
    if word is None:
        return "", 0
    if word[1] in choices:
        return f'="{word[1]}"', word.end()
    if word[1][0].isdigit() or word[1].isupper():
        return f"={word[1]}", word.end()
    return "", 0
