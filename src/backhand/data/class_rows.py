"""Read rows of texts with a label, several labels or a number.

text, label        label is a text, a truth value or a number; a list contains all labels that apply
text, labels       the same
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from backhand.data.label_names import as_label
from backhand.data.raw_rows import RawRow, describe
from backhand.data.row_kind import Form
from backhand.data.rows import ClassRow
from backhand.errors import DataError
from backhand.words import shorten


def read_class(form: Form, raw: RawRow) -> ClassRow:
    """Read a row.

    Raises:
        DataError: the text is empty or no text, or the label is neither text, number nor a list of them.
    """
    name, label_name = form.columns
    text = raw.values[name]
    if not isinstance(text, str):
        raise DataError(f"{name} is {describe(text)}, not text", where=raw.source)
    if not text.strip():
        raise DataError(f"{name} is empty", where=raw.source, next_step="fill it in, or remove the row")
    value = raw.values[label_name]
    if isinstance(value, str) and value.strip().startswith(("[", "{")):
        value = _parsed(value)  # a list in a table
    if isinstance(value, list | tuple):
        labels = tuple(_label(label_name, one, raw.source) for one in value)
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            raise DataError(
                f"{label_name} is a list of {len(labels)} labels, in which {shorten(repeated[0])!r} is repeated",
                where=raw.source,
                why="a list contains each label that applies once",
                next_step="give each label once; for votes, give their mean to learn a number, or their shares as "
                "a table with --objective decide",
            )
        return ClassRow(text, labels, raw.source)
    if isinstance(value, float) and math.isfinite(value):
        return ClassRow(text, value, raw.source)
    return ClassRow(text, _label(label_name, value, raw.source), raw.source)


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _label(name: str, value: Any, source: str) -> str:
    text = str(as_label(value)).strip() if isinstance(value, str | int) else ""
    if not text:
        raise DataError(
            f"{name} is {describe(value)}, not a label",
            where=source,
            next_step="give a text or a number, or a list of the labels that apply; a table of their probabilities is "
            "for --objective decide",
        )
    return text
