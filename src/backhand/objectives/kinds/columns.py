"""Advice on columns of texts with a label."""

from __future__ import annotations

from backhand.data.column_hints import class_of, suggestion
from backhand.data.row_kind import UnfitColumns

LABEL_STEP = "name the columns of texts and labels: --prompt COLUMN --completion COLUMN"


def filled_columns(columns: UnfitColumns) -> list[str]:
    """Return the columns of the first row that are not empty."""
    values = columns.raw.values
    return [name for name in values if name in columns.present and str(values[name]).strip()]


def label_advice(columns: UnfitColumns) -> str | None:
    """Return the options that read a column with few repeating values as the label of a text, or None."""
    if columns.given:
        return None
    values, rows = columns.values
    if not (classes := values.names(rows)):
        return None
    given = {"completion": class_of(classes)}
    options = suggestion((), filled_columns(columns), given, values.uninformative(rows))
    return None if options is None else f"add {options}"
