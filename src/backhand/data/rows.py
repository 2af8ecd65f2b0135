"""Rows as they stand in files, before anything is known of their form: a table of values and where it stood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from backhand.errors import DataError
from backhand.words import shorten


@dataclass(frozen=True)
class RawRow:
    """One row of a file."""

    values: Mapping[str, Any]  # column name to value, as the file has it (JSON types)
    # where it stands, and no other row: `file:line`, `name row N` where there are no lines, both where several rows
    # share a line
    source: str


@dataclass
class BadRows:
    """What happens at a malformed row: with `skip_bad` it is counted, without it the error is raised."""

    skip_bad: bool = False  # count instead of raising
    count: int = 0
    empty_lines: int = 0  # lines of nothing but white space so far
    errors: list[DataError] = field(default_factory=list)  # the first few of them
    keep: int = 5
    # the first in the file that is being read; whoever begins another one sets it to None
    first_of_file: DataError | None = None

    def add(self, error: DataError) -> None:
        """Raise `error`, or count it."""
        if not self.skip_bad:
            if error.next_step is None:
                remedy = "correct the row, or leave bad rows out with --skip-bad"
                error.next_step = f"{remedy}; `backhand lint` names every such row at once"
            raise error
        self.count += 1
        self.first_of_file = self.first_of_file or error
        if len(self.errors) < self.keep:
            self.errors.append(error)


def checked_row(values: object, source: str, *, not_utf8: bool = False) -> RawRow:
    """A row whose values are a table of well-formed text.

    Args:
        not_utf8: halves of surrogate pairs stand for bytes that are not UTF-8 (Python's surrogateescape).

    Raises:
        DataError: not a table with names, or a string that no tokenizer can read.
    """
    if not isinstance(values, Mapping):
        raise DataError(
            f"this row is {describe(values)}, not a table of names and values",
            where=source,
            next_step='write each row as an object, such as {"prompt": "…", "completion": "…"}',
        )
    for text in strings_of(values):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            if not_utf8:
                raise latin1_error(source)
            raise DataError(
                f"{shorten(text)!r} holds half of a surrogate pair, which is not a character",
                where=source,
                why="\\ud800 to \\udfff only mean something in pairs; one half was cut off",
            )
    return RawRow(values, source)


def latin1_error(source: str, byte: int | None = None) -> DataError:
    """The error for a line that is not UTF-8."""
    shown = "" if byte is None else f" (byte 0x{byte:02x})"
    return DataError(
        f"this line is not UTF-8{shown}; it looks like Latin-1 or Windows-1252",
        where=source,
        next_step="convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW, or leave such rows out with --skip-bad",
    )


def strings_of(value: object) -> Iterator[str]:
    """Every string inside `value`, names of tables included, without recursion."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict | Mapping):  # dict alone is what nearly all are, and quick to tell
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)


def describe(value: object) -> str:
    """The JSON type of `value` in words, with a short look at it, for errors."""
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
