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

from backhand.data.column_hints import ANSWERS, CLASSES, COUNTING, ClassColumns, class_of
from backhand.data.columns import common_names
from backhand.data.forms import SCORES
from backhand.data.raw_rows import TRUTH, RowErrors, numbers_of
from backhand.data.sources import expand, read_rows
from backhand.errors import BackhandError, DataError
from backhand.words import shorten

SHOWN_ROWS, READ_ROWS = 5, 2000
_LONGEST = 300


def first_rows(name: str) -> dict[str, Any]:
    """Return `columns`, `rows`, `objective`, and the columns that it reads, such as `state` and `question`.

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
        **_suggested(columns, names, texts, rows),
    }


def _suggested(
    columns: Sequence[str], classes: Sequence[str], texts: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return the objective that the names and values of the columns suggest, and the columns that it reads."""
    small = {column.strip().lower(): column for column in columns}
    if (better := _named(columns, _BETTER)) and (worse := _named(columns, _WORSE)):
        if {"chosen", "rejected"} <= {*columns}:
            return {"objective": "dpo"}
        asked = [column for column in texts if column not in (better, worse)]
        prompts = [small[name] for name in ("prompt", "question") if name in small] or asked[:1]
        return {"objective": "dpo", "chosen": better, "rejected": worse} | ({"prompt": prompts[0]} if prompts else {})
    for objective, roles in _KNOWN:
        if roles.keys() <= small.keys():
            exact = all(small[name] == name for name in roles)
            return {"objective": objective} | ({} if exact else {role: small[name] for name, role in roles.items()})
    if "query" in small and small.keys() & {"documents", "docs"}:
        return {"objective": "rank"}
    if "query" in small and (document := next((small[name] for name in _DOCUMENTS if name in small), None)):
        return {"objective": "embed", "prompt": small["query"], "completion": document}
    if small.keys() & {"messages", "conversations"} or {"prompt", "completion"} <= small.keys():
        return {"objective": "sft"}
    if compared := _compared(columns, texts, rows):
        return {"objective": "embed"} | compared
    others = [column for column in texts if column not in classes]
    if "query" in small and len(others) == 2 and small["query"] == others[0] and others[1].lower() not in ANSWERS:
        return {"objective": "embed", "prompt": others[0], "completion": others[1]}
    if (target := next((name for name in columns if _is_target(name, rows)), None)) and len({*others} - {target}) == 1:
        return {
            "objective": "classify",
            "prompt": next(name for name in others if name != target),
            "completion": target,
        }
    if not classes:
        if "text" in small or common_names(columns) or len(texts) < 2:
            return {"objective": "sft"}
        answers = [name for name in texts[1:] if name.lower() in ANSWERS] or texts[1:]
        # Of several answers, one may be the worse one of a pair.
        return {"objective": "sft", "prompt": texts[0]} | ({"completion": answers[0]} if len(answers) == 1 else {})
    state = others[0] if len(others) == 1 else "\\n".join(f"{{{column}}}" for column in others)
    return {"objective": "decide", "state": state, "question": class_of(classes)} if others else {"objective": "sft"}


def _is_value(name: str) -> bool:
    """Return True if a name of a column is rather a cell: a number, a date or a text of several words."""
    return name[:1].isdigit() or len(name.split()) > 3


_DOCUMENTS = ("document", "passage")

_KNOWN: Sequence[tuple[str, Mapping[str, str]]] = (
    *(
        ("rank", {"query": "prompt", document: "completion", score: "score"})
        for document in _DOCUMENTS
        for score in ("score", "label")
    ),
    ("embed", {"anchor": "prompt", "positive": "completion", "negative": "negative"}),
    ("embed", {"anchor": "prompt", "positive": "completion"}),
    ("embed", {"sentence1": "prompt", "sentence2": "completion", "score": "score"}),
    ("kto", {"prompt": "prompt", "completion": "completion", "label": "label"}),
)
"""Objectives with the columns of their rows, and the roles of these columns on the page. More columns come first."""

_BETTER = ("chosen", "better", "preferred", "accepted", "good", "best")
_WORSE = ("rejected", "worse", "dispreferred", "refused", "bad", "worst")
"""Parts of the names of the columns of a pair of answers."""


def _named(columns: Sequence[str], parts: Sequence[str]) -> str | None:
    """Return the only column whose name contains one of these words, or None."""
    found = [column for column in columns if {*re.findall(r"[a-z]+", column.lower())} & {*parts}]
    return found[0] if len(found) == 1 else None


_SIDES = {"1": "2", "a": "b", "left": "right", "first": "second", "one": "two"}


def _compared(columns: Sequence[str], texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the columns of two texts that differ in a number or side, such as `title_a` and `title_b`, and a score.

    It is {} if there are no two such texts, or further columns than a score.
    """
    words = {name: re.findall(r"[^\W\d_]+|\d+", name.lower()) for name in columns}
    for one, other in ((one, other) for one in columns for other in columns if one != other):
        both = list(zip(words[one], words[other], strict=False))
        differing = [pair for pair in both if pair[0] != pair[1]]
        if (
            len(words[one]) != len(words[other])
            or len(differing) != 1
            or _SIDES.get(differing[0][0]) != differing[0][1]
        ):
            continue
        rest = [name for name in columns if name not in (one, other) and name.strip(" .#:").lower() not in COUNTING]
        if {one, other} <= {*texts} and len(rest) < 2 and all(_is_score(name, rows) for name in rest):
            return {"prompt": one, "completion": other} | ({"score": rest[0]} if rest else {})
    return {}


def _is_score(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the values of a column are numbers, or yes and no."""
    values = _values(column, rows)
    numbers = zip(values, numbers_of(values), strict=True)
    return all(number is not None or str(value).strip().lower() in TRUTH for value, number in numbers)


def _is_target(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if a column has numbers with fractions to predict, or lists of labels."""
    values = _values(column, rows)
    if values and all(isinstance(value, list) or re.fullmatch(r"\[.*\]", str(value).strip()) for value in values):
        return True
    numbers = numbers_of(values)
    others = {name for name in rows[0] if name != column and name.strip(" .#:").lower() not in COUNTING}
    named = column.strip().lower() in (*CLASSES, *SCORES, "rating") or len(others) == 1
    mostly = 10 * numbers.count(None) <= len(numbers)  # a few mistakes, which `lint` names
    return named and mostly and any(number is not None and number % 1 for number in numbers)


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
