"""Raw rows of files, the policy for malformed rows, and checks of their values."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backhand.data.data_file import SAVE_AS_UTF8
from backhand.errors import DataError
from backhand.words import shorten

TABLE = (dict, Mapping)
"""Types of tables. Nearly all are dicts, and `isinstance` is slow for Mapping."""
_LISTS = (list, tuple)
LONGEST_ROW_BYTES = 2**28
"""Largest size of a row in a file."""
IN_MEMORY = "python:"
"""Start of the names of rows that a program gives."""
NO_TITLE = "remove it: the first row must have the column names"
"""Next step if a table begins with a title."""
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""Values of columns that say whether something is so, in lower case."""


def any_in_memory(sources: Iterable[str]) -> bool:
    """Return True if a program gave the rows of any of these sources."""
    return any(name.startswith(IN_MEMORY) for name in sources)


@dataclass(frozen=True)
class RawRow:
    """One row of a file as read."""

    values: Mapping[str, Any]  # column name to value, of JSON types
    # Unique location: `file:line`, `name row N` for files without lines, or both if several rows share a line or
    # some rows have several lines.
    source: str


@dataclass
class RowErrors:
    """Policy for malformed rows: raise their errors, or count them under `skip_bad`."""

    skip_bad: bool = False  # count errors instead of raising them
    count: int = 0
    empty_lines: int = 0  # lines of only white space so far
    empty_rows: int = 0  # rows of several cells so far of which none has a value
    errors: list[DataError] = field(default_factory=list)  # the first `keep` errors
    keep: int = 5
    alike: Counter[str] = field(default_factory=Counter)  # number of counted errors by the `what` of these first ones
    # first error in the current file; the reader of the next file resets it to None
    first_of_file: DataError | None = None
    # list to which errors are appended instead, if they are counted later, in the order of the rows
    waiting: list[Any] | None = None
    garbled: dict[str, str] | None = None  # by location, excerpts of wrongly decoded texts, if they are collected

    def add(self, error: DataError) -> None:
        """Raise `error`, or count it."""
        if not self.skip_bad:
            if error.next_step is None:
                error.next_step = (
                    "correct the row, or leave it out"
                    if (error.where or "").startswith(IN_MEMORY)
                    else "correct the row, or leave bad rows out with --skip-bad; "
                    "`backhand lint` lists all such rows at once"
                )
            raise error
        if self.waiting is not None:
            self.waiting.append(error)
            return
        self.count += 1
        self.first_of_file = self.first_of_file or error
        if len(self.errors) < self.keep:
            self.errors.append(error)
            self.alike[error.what] += 1
        elif error.what in self.alike:
            self.alike[error.what] += 1


def checked_row(values: object, source: str, *, not_utf8: bool = False, surrogates: bool = True) -> RawRow:
    """Return a row after checking that its values are a table of well-formed text. NaN, an empty cell, becomes None.

    Args:
        not_utf8: lone surrogates represent bytes that are not UTF-8 (Python's surrogateescape).
        surrogates: False if the strings cannot contain surrogates, so that they need not be searched.

    Raises:
        DataError: the row is no table with names, or a string that no tokenizer can read.
    """
    if not isinstance(values, TABLE):
        raise DataError(
            f"this row is {describe(values)}, not a table of names and values",
            where=source,
            next_step='write each row as an object, such as {"prompt": "…", "completion": "…"}',
        )
    for text in strings_of(values) if surrogates else ():
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            if not_utf8:
                raise latin1_error(source)
            raise DataError(
                f"{shorten(text)!r} contains half of a surrogate pair, which is not a character",
                where=source,
                why="\\ud800 to \\udfff are characters only in pairs; one half was cut off",
            )
    if any(value != value for value in values.values() if isinstance(value, float)):
        values = {
            name: None if isinstance(value, float) and value != value else value for name, value in values.items()
        }
    return RawRow(values, source)


def latin1_error(source: str, byte: int | None = None) -> DataError:
    """Return the error for a line that is not UTF-8."""
    shown = "" if byte is None else f" (byte 0x{byte:02x})"
    return DataError(
        f"this line is not UTF-8{shown}; it looks like Latin-1 or Windows-1252",
        where=source,
        next_step=f"{SAVE_AS_UTF8}; in a terminal: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    )


def strings_of(value: object) -> list[str]:
    """Return every string inside `value`, including the names of tables, without recursion."""
    stack, strings = [value], []
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            strings.append(item)
        elif isinstance(item, _LISTS):
            stack.extend(item)
        elif isinstance(item, TABLE):
            stack.extend(item)
            stack.extend(item.values())
    return strings


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, in the order of their first occurrences."""
    return [name for name, times in Counter(names).items() if times > 1]


def describe(value: object) -> str:
    """Describe `value` for an error message: its JSON type and a short excerpt."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, str):
        return f"the text {shorten(value)!r}"
    if isinstance(value, int | float):
        return f"the number {shorten(repr(value))}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "a table"
    return f"a value of type {type(value).__name__}"


_DECIMAL_COMMA = re.compile(r"[-+]?(?:0|[0-9]{4,}|[0-9]+(?=,(?:[0-9]{1,2}|[0-9]{4,})$)),[0-9]+")
_UNCLEAR_COMMA = re.compile(r"[-+]?[1-9][0-9]{0,2},[0-9]{3}")


def number_of(value: Any) -> float | None:
    """Return a finite number or the number in a text, also with a decimal comma; None for anything else.

    Texts such as `1,234` are None, because they may be 1.234 or 1234. `numbers_of` decides by the column.
    """
    if isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()):
        value = value.replace(",", ".")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def has_unclear_comma(value: Any) -> bool:
    """Return True for a text such as `1,234`, which may be 1.234 or 1234."""
    return isinstance(value, str) and _UNCLEAR_COMMA.fullmatch(value.strip()) is not None


def numbers_of(values: Iterable[Any]) -> list[float | None]:
    """Return `number_of` each value of a column. If one has a decimal comma, such as `0,116`, so has `1,234`."""
    values = list(values)
    numbers = list(map(number_of, values))
    known = (value for value, number in zip(values, numbers, strict=True) if number is not None)
    if not any(isinstance(value, str) and "," in value for value in known):
        return numbers
    return [
        float(value.replace(",", ".")) if has_unclear_comma(value) else number
        for value, number in zip(values, numbers, strict=True)
    ]


def without_padding(value: Any) -> Any:
    """Remove nulls: Arrow adds one to each table for every name that occurs only in other rows' tables.

    Otherwise a tool call would contain the arguments of all functions in the file, and the model would learn them.
    """
    if isinstance(value, Mapping):
        return {name: without_padding(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_padding(item) for item in value]
    return value
