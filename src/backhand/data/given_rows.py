"""Rows that a program gives: a list of dicts or a data frame, as a source that has a name like a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

from backhand.bounds import plain_value
from backhand.data.raw_rows import IN_MEMORY, RawRow, RowErrors, checked_row, without_padding
from backhand.errors import DataError, UsageError, first_line
from backhand.words import shorten, with_article


class Frame(Protocol):
    """A data frame of pandas, polars or pyarrow: it has Arrow's interface."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Rows = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[Any, Any]] | Frame
"""Rows as a program gives them: a source, several sources, a list of dicts, or a data frame. Type checkers know the
keys of `frame.to_dict("records")` only as hashable."""

STANDARD_INPUT = "/dev/stdin"
"""The name of the rows that `-` stands for."""
_INDEX = "__index_level_0__"
"""The column that pandas adds for the numbers of rows that were selected or shuffled."""


class GivenRows(str):
    """The name of rows in memory, `python:DIGEST`. The digest makes the name the same for the same rows.

    Attributes:
        rows: the rows, of JSON types.
        places: the place of each row in messages, or None to number them.
        option: the argument that gave them, if it is not the option that takes rows.
    """

    __slots__ = ("option", "places", "rows")
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[str] | None
    option: str

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, Any]], places: Sequence[str] | None = None, *, option: str = ""
    ) -> GivenRows:
        """Return the name of these rows, which carries them and their places. Empty cells do not change it."""
        digest = hashlib.sha256()
        for row in rows:
            filled = {key: value for key, value in row.items() if not _is_empty(value)}
            digest.update(json.dumps(filled, default=str).encode("utf-8", "surrogatepass") + b"\n")
        name = cls(IN_MEMORY + digest.hexdigest()[:16])
        name.rows, name.places, name.option = rows, places, option
        return name


def _is_empty(value: Any) -> bool:
    """Return True for None, and for NaN, the empty cell of a data frame."""
    return value is None or (isinstance(value, float) and value != value)


def list_of_texts(
    option: str, given: Any, next_step: str, *, plural: str | None = None, of_json: bool = False
) -> list[Any]:
    """Return the texts that an argument of a function gives.

    Args:
        option: the argument.
        next_step: the calls that take one text, several, or rows.
        plural: for an argument that is one text, the argument that is several, or "" if there is none.
        of_json: values that can be written as JSON are allowed as well. A tuple, or a list of texts or dicts, is
            several values.

    Raises:
        UsageError: it is a data frame, a path, or anything else but a list of texts.
    """
    given = given.to_pylist() if hasattr(given, "to_pylist") and not _columns(given) else given  # a column of pyarrow
    if plural is None and (
        isinstance(given, str | bytes | Mapping | os.PathLike) or not isinstance(given, Iterable) or _columns(given)
    ):
        raise _not_texts(option, given, next_step)
    if plural and of_json and _are_several(given):
        raise _not_texts(option, given, f"{next_step}, {plural}=[[…]] for one {option} that is a list")
    values = list(given) if plural is None else [given]
    allowed = (str, Mapping, list, tuple, int, float) if of_json else (str,)
    for number, value in enumerate(values):
        if not isinstance(value, allowed) or value != value:  # NaN is a missing value of pandas
            if plural is None:
                raise _not_texts(f"{option}[{number}]", value, "write it as text, str(…), or leave it out")
            raise _not_texts(option, value, next_step, plural)
    return values


def _are_several(given: Any) -> bool:
    """Return True for a tuple, and for a list of texts, dicts and missing values, as a pandas Series gives one."""
    return isinstance(given, tuple) or (
        isinstance(given, list)
        and all(_is_empty(one) or isinstance(one, str | Mapping) or _columns(one) for one in given)
    )


def _columns(value: Any) -> list[Any]:
    """Return the names of a data frame's columns, or [] for any other value."""
    columns = getattr(value, "column_names", getattr(value, "columns", None))  # None after `IterableDataset.map`
    return [] if columns is None else list(columns)


def _longest_texts(frame: Any, columns: Sequence[Any]) -> Any:
    """Return the column of a data frame with the longest texts in its first rows; the first column if it has none."""
    with suppress(Exception):  # any type with columns may be given
        rows = _rows_of_frame(frame[:_FIRST_ROWS])
        lengths = [sum(len(text) for row in rows if isinstance(text := row[str(name)], str)) for name in columns]
        return columns[lengths.index(max(lengths))]
    return columns[0]


_FIRST_ROWS = 20


def _not_texts(option: str, value: Any, next_step: str, plural: str | None = None) -> UsageError:
    """Return the error for a value that is no text, or no list of texts. `plural` is that of `list_of_texts`."""
    if columns := _columns(value):
        what = "a data frame"
        takes_column = option.partition("[")[0] if plural is None else plural
        if takes_column:
            rows = " or its rows: data=frame" if "(data=" in next_step else ""
            column = _longest_texts(value, columns)
            next_step = f"give one of its columns, such as {takes_column}=frame[{column!r}]{rows and ',' + rows}"
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) and "role" in one for one in value):
        what = "a conversation"
        if "(data=" in next_step and plural == "prompts":
            next_step = "give it as a row: data=[{'messages': […]}]"
    elif isinstance(value, str):
        what = "one text"
    elif value is None or isinstance(value, int | float):
        what = shorten(repr(value))
    else:
        what = with_article(type(value).__name__)
    return UsageError(f"{option} is {what}", where=option.partition("[")[0], next_step=next_step)


def refuse_column(option: str, value: Any) -> None:
    """Raise UsageError if rows are given as one column of texts, whose values would be names of files."""
    is_column = (hasattr(value, "to_list") or hasattr(value, "to_pylist")) and not _columns(value)
    if is_column and isinstance(next(iter(plain_value(list(value))), None), str):
        raise UsageError(
            f"{option} is one column of texts, not rows",
            where=option,
            next_step=f"give the data frame that has the column, {option}=frame, or a list of one dict per row",
        )


def as_sources(value: Any) -> Any:
    """Return the sources that a program gives: one name, several, a list of dicts, or data frames.

    Any other value is returned unchanged, and refused by `check_sources`.
    """
    if isinstance(value, str | os.PathLike):
        value = (value,)
    if hasattr(value, "__arrow_c_stream__"):
        return (GivenRows.of(_rows_of_frame(value)),)
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        parts = plain_value(list(value))
        if not parts and isinstance(value, list):
            raise UsageError("the list of rows is empty", where="data", next_step="give a list of one dict per row")
        if parts and all(hasattr(part, "__arrow_c_stream__") and _columns(part) for part in parts):
            return (GivenRows.of([row for frame in parts for row in _rows_of_frame(frame)]),)
        if parts and all(isinstance(part, Mapping) for part in parts):
            return (GivenRows.of(parts),)
        paths = (os.fspath(part) if isinstance(part, os.PathLike) else part for part in parts)
        return tuple(STANDARD_INPUT if isinstance(part, str) and part == "-" else part for part in paths)
    return value


def _rows_of_frame(frame: Any) -> list[dict[str, Any]]:
    import pyarrow as pa

    mixed: dict[Any, list[Any]] = {}
    try:
        rows = pa.table(frame).to_pylist()
    except Exception as error:  # noqa: BLE001 - pyarrow raises whatever a column's conversion raises
        mixed = _mixed_columns(frame)
        read = _other_columns(frame, mixed)
        if read is None:
            unique = "" if getattr(frame.columns, "is_unique", True) else "give each column a name of its own, or "
            raise DataError(
                "the data frame cannot be read",
                where="data",
                why=first_line(error),
                next_step=f"{unique}give a list of dicts",
            ) from None
        names = dict.fromkeys(map(str, frame.columns))
        rows = [names | row for row in read]
    for name, values in mixed.items():
        for row, value in zip(rows, values, strict=True):
            row[str(name)] = value
    return [{name: without_padding(value) for name, value in row.items() if name != _INDEX} for row in rows]


def _mixed_columns(frame: Any) -> dict[Any, list[Any]]:
    """Return the values of a pandas frame's columns that Arrow refuses, such as texts and numbers in one column."""
    import pyarrow as pa

    mixed: dict[Any, list[Any]] = {}
    for name in frame.columns if hasattr(frame, "isna") and frame.columns.is_unique else ():
        column = frame[name]
        try:
            pa.array(column)
        except Exception:  # noqa: BLE001 - likewise
            values = zip(column.tolist(), column.isna(), strict=True)
            mixed[name] = [None if missing else plain_value(value) for value, missing in values]
    return mixed


def _other_columns(frame: Any, mixed: Mapping[Any, list[Any]]) -> list[dict[str, Any]] | None:
    """Return the rows of a pandas frame without the mixed columns, and without an index that Arrow refuses, or None."""
    import pyarrow as pa

    if hasattr(frame, "isna") and frame.columns.is_unique:
        others = frame.drop(columns=list(mixed))
        for one in (others, others.reset_index(drop=True)):
            with suppress(Exception):
                return cast("list[dict[str, Any]]", pa.table(one).to_pylist())
    return None


def read_given(name: str, bad: RowErrors) -> Iterator[RawRow]:
    """Yield rows in memory. The source is `python:DIGEST row N`, counted from 1, unless they have places.

    Raises:
        DataError: this process does not have the rows, or one is malformed and `bad` does not count it.
    """
    if not isinstance(name, GivenRows):
        raise DataError(
            "these rows were given by a program, and this process does not have them",
            where=name,
            next_step="give them again: backhand.train(data=rows, …); or write them to a file, and give its name",
        )
    for number, row in enumerate(name.rows, 1):
        try:
            yield checked_row(row, f"{name} row {number}" if name.places is None else name.places[number - 1])
        except DataError as error:
            bad.add(error)
