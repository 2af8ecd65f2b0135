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

from backhand.data.column_hints import COUNTING, ClassColumns
from backhand.data.columns import common_names
from backhand.data.raw_rows import RowErrors
from backhand.data.sources import expand, read_rows
from backhand.errors import BackhandError
from backhand.words import shorten

SHOWN_ROWS, READ_ROWS = 5, 2000
_LONGEST = 300


def first_rows(name: str) -> dict[str, Any]:
    """Return `columns`, `rows`, `objective`, and for decisions `state` and `question`.

    Raises:
        DataError: the file cannot be read, or contains no valid row.
    """
    bad = RowErrors(skip_bad=True)
    files = expand([name])
    rows = [row.values for row in itertools.islice(read_rows(files[0], bad), READ_ROWS)]
    if not rows and bad.errors:
        raise bad.errors[0]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    classes = ClassColumns()
    for row in rows:
        classes.add(row)
    return {
        "columns": columns,
        "rows": [{column: _text(row.get(column)) for column in columns} for row in rows[:SHOWN_ROWS]],
        **_suggested(columns, classes.names(len(rows)), _texts(columns, rows)),
    }


def _suggested(columns: Sequence[str], classes: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """Return the objective that the names and values of the columns suggest."""
    small = {column.lower() for column in columns}
    if {"chosen", "rejected"} <= small:
        return {"objective": "dpo"}
    if "query" in small and small & {"document", "documents", "docs", "passage"}:
        return {"objective": "rank"}
    if {"anchor", "positive"} <= small or {"sentence1", "sentence2", "score"} <= small:
        return {"objective": "embed"}
    if {"prompt", "completion", "label"} <= small:
        return {"objective": "kto"}
    if small & {"messages", "conversations"} or {"prompt", "completion"} <= small:
        return {"objective": "sft"}
    if not classes:
        known = "text" in small or common_names(columns) or len(texts) < 2
        return {"objective": "sft"} | ({} if known else {"prompt": texts[0], "completion": texts[-1]})
    others = [column for column in texts if column not in classes]
    state = others[0] if len(others) == 1 else "\\n".join(f"{{{column}}}" for column in others)
    return {"objective": "decide", "state": state, "question": classes[-1]} if others else {"objective": "sft"}


def _texts(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns with texts to read: neither unnamed nor with numbers of rows."""
    return [name for name in columns if name.strip(" .#:").lower() not in COUNTING and not _numbers_rows(name, rows)]


def _numbers_rows(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the values of a column are numbers, empty, or different single words with digits."""
    values = [str(row[column]).strip() for row in rows if row.get(column) is not None]
    if all(re.fullmatch(r"[-+]?[\d.,]*", value) for value in values):
        return True
    single = all(re.fullmatch(r"\S*\d\S*", value) for value in values)
    return single and len({*values}) == len(values) > 1


def _text(value: object) -> str:
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), _LONGEST)


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
