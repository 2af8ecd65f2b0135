"""Rows that a program gives: a list of dicts or a data frame, as a source that has a name like a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from backhand.bounds import plain_value
from backhand.data.raw_rows import IN_MEMORY, RawRow, RowErrors, checked_row, without_padding
from backhand.errors import DataError, first_line


class Frame(Protocol):
    """A data frame of pandas, polars or pyarrow: it has Arrow's interface."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Rows = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Mapping[str, Any]] | Frame
"""Rows as a program gives them: a source, several sources, a list of dicts, or a data frame."""

STANDARD_INPUT = "/dev/stdin"
"""The name of the rows that `-` stands for."""
_INDEX = "__index_level_0__"
"""The column that pandas adds for the numbers of rows that were selected or shuffled."""


class GivenRows(str):
    """The name of rows in memory, `python:DIGEST`. The digest makes the name the same for the same rows.

    Attributes:
        rows: the rows, of JSON types.
        places: the place of each row in messages, or None to number them.
    """

    __slots__ = ("places", "rows")
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[str] | None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], places: Sequence[str] | None = None) -> GivenRows:
        """Return the name of these rows, which carries them and their places."""
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, default=str).encode("utf-8", "surrogatepass") + b"\n")
        name = cls(IN_MEMORY + digest.hexdigest()[:16])
        name.rows, name.places = rows, places
        return name


def as_sources(value: Any) -> Any:
    """Return the sources that a program gives: one name, several, a list of dicts, or a data frame.

    Any other value is returned unchanged, and refused by `check_sources`.
    """
    if isinstance(value, str | os.PathLike):
        value = (value,)
    if hasattr(value, "__arrow_c_stream__"):
        return (GivenRows.of(_rows_of_frame(value)),)
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        parts = plain_value(list(value))
        if parts and all(isinstance(part, Mapping) for part in parts):
            return (GivenRows.of(parts),)
        paths = (os.fspath(part) if isinstance(part, os.PathLike) else part for part in parts)
        return tuple(STANDARD_INPUT if part == "-" else part for part in paths)
    return value


def _rows_of_frame(frame: Any) -> list[dict[str, Any]]:
    import pyarrow as pa

    try:
        rows = pa.table(frame).to_pylist()
    except Exception as error:  # noqa: BLE001 - pyarrow raises whatever a column's conversion raises
        raise DataError(
            "the data frame cannot be read",
            where="data",
            why=first_line(error),
            next_step="give a list of dicts, or write the frame to a Parquet file and give its name",
        ) from None
    return [{name: without_padding(value) for name, value in row.items() if name != _INDEX} for row in rows]


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
