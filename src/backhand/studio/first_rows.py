"""`python -m backhand.studio.first_rows FILE`: the columns of a file, its first rows, and the objective they suggest.

A process of its own reads the file, because it may be damaged or large.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from backhand.data.column_hints import COUNTING, ClassColumns, class_of
from backhand.data.raw_rows import RowErrors
from backhand.data.sources import expand, read_rows
from backhand.errors import BackhandError, DataError
from backhand.objective.page import FirstColumns
from backhand.objective.registry import objectives, part
from backhand.words import shorten

SHOWN_ROWS, READ_ROWS = 5, 2000
_LONGEST = 300


def first_rows(name: str) -> dict[str, Any]:
    """Return `columns`, `rows`, and by `suggested` objective the columns that it reads, the most likely one first.

    `complete` are the columns that have a value in nearly every row, and `unread` is the number of rows that cannot be
    read, with the `first_unread` one.

    Raises:
        DataError: the file cannot be read, contains no valid row, or its first line is a row.
    """
    bad = RowErrors(skip_bad=True)
    files = expand([name])
    rows = [row.values for row in itertools.islice(read_rows(files[0], bad), READ_ROWS)]
    if not rows:
        below = "check that it has rows below the names of the columns, or give another file"
        raise bad.errors[0] if bad.errors else DataError("there is no row in the file", where=name, next_step=below)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in filter(str.strip, columns):
        if sum(row.get(column) == column for row in rows) > 1 and any(map(_is_value, columns)):
            raise DataError(
                f"the file has no names of columns: its first row has {shorten(column)!r}, as rows below it have",
                where=name,
                next_step="add a first row with the names of the columns, and give the file again",
            )
    classes = ClassColumns()
    for row in rows:
        classes.add(row)
    names, texts = classes.names(len(rows)), _texts(columns, rows, classes.constant(len(rows)))
    answer = class_of(names) if names else None
    determining = classes.determining(answer, [name for name in texts if name not in names])
    texts = [name for name in texts if name not in determining]
    return {
        "columns": columns,
        "rows": [{column: _text(row.get(column)) for column in columns} for row in rows[:SHOWN_ROWS]],
        "complete": classes.complete(len(rows)),
        "unread": bad.count,
        "first_unread": f"{bad.errors[0].where}: {bad.errors[0].what}" if bad.errors else "",
        "suggested": _suggested(FirstColumns(columns, names, texts, rows)),
    }


def _suggested(first: FirstColumns) -> dict[str, dict[str, str]]:
    """Return the columns of each objective that the names and values of the columns suggest, the most likely first."""
    fits = [(spec.name, part(spec.page).fits(first)) for spec in objectives() if spec.page]
    known = sorted(((name, fit) for name, fit in fits if fit is not None), key=lambda one: -one[1].certainty)
    return {name: dict(fit.columns) for name, fit in known}


def _is_value(name: str) -> bool:
    """Return True if a name of a column is rather a cell: a number, a date or a text of several words."""
    return name[:1].isdigit() or len(name.split()) > 3


def _values(column: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [row[column] for row in rows if row.get(column) not in (None, "")]


def _texts(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], without: Sequence[str]) -> list[str]:
    """Return the columns with texts to read: neither unnamed nor with numbers of rows, nor `without`."""
    named = [name for name in columns if name not in without and name.strip(" .#:").lower() not in COUNTING]
    return [name for name in named if not _numbers_rows(name, rows)]


def _numbers_rows(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if nine in ten values of a column are numbers, or all are different single words with digits."""
    values = [text for value in _values(column, rows) if (text := str(value).strip())]
    if 10 * sum(not re.fullmatch(r"[-+]?[\d.,]+", value) for value in values) <= len(values):
        return True
    single = all(re.fullmatch(r"\S*\d\S*", value) for value in values)
    return single and len({*values}) == len(values) > 1


def _text(value: object) -> str:
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), _LONGEST)


def main(name: str) -> int:
    """Print the result as JSON, or the error; return the exit code."""
    try:
        print(json.dumps(first_rows(name)))
    except BackhandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
