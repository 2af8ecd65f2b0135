"""Columns of the first rows of a file that suggest an objective."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from backhand.data.column_hints import CLASSES, COUNTING
from backhand.data.forms import SCORES
from backhand.data.raw_rows import TRUTH, numbers_of
from backhand.objective.page import FirstColumns, Fit

_SIDES = {"1": "2", "a": "b", "left": "right", "first": "second", "one": "two"}


def known(first: FirstColumns, *tables: Mapping[str, str]) -> Fit | None:
    """Return the fit if the columns of one of these tables are there, each with its role."""
    for roles in tables:
        if roles.keys() <= first.small.keys():
            exact = all(first.small[name] == name for name in roles)
            return Fit(80 + len(roles), {} if exact else {role: first.small[name] for name, role in roles.items()})
    return None


def named(columns: Sequence[str], parts: Sequence[str]) -> str | None:
    """Return the only column whose name contains one of these words, or None."""
    found = [column for column in columns if {*re.findall(r"[a-z]+", column.lower())} & {*parts}]
    return found[0] if len(found) == 1 else None


def compared(first: FirstColumns) -> dict[str, str]:
    """Return the columns of two texts that differ in a number or side, such as `title_a` and `title_b`, and a score.

    It is {} if there are no two such texts, or further columns than a score.
    """
    columns = first.columns
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
        if {one, other} <= {*first.texts} and len(rest) < 2 and all(_is_score(name, first) for name in rest):
            return {"prompt": one, "completion": other} | ({"score": rest[0]} if rest else {})
    return {}


def _is_score(column: str, first: FirstColumns) -> bool:
    """Return True if the values of a column are numbers, or yes and no."""
    values = first.values(column)
    numbers = zip(values, numbers_of(values), strict=True)
    return all(number is not None or str(value).strip().lower() in TRUTH for value, number in numbers)


def is_target(column: str, first: FirstColumns) -> bool:
    """Return True if a column has numbers with fractions to predict, or lists of labels."""
    values = first.values(column)
    if values and all(isinstance(value, list) or re.fullmatch(r"\[.*\]", str(value).strip()) for value in values):
        return True
    numbers = numbers_of(values)
    others = {name for name in first.rows[0] if name != column and name.strip(" .#:").lower() not in COUNTING}
    is_named = column.strip().lower() in (*CLASSES, *SCORES, "rating") or len(others) == 1
    mostly = 10 * numbers.count(None) <= len(numbers)  # a few mistakes, which `lint` names
    return is_named and mostly and any(number is not None and number % 1 for number in numbers)


def state_of(first: FirstColumns) -> str:
    """Return the column of the text to decide about, or a text with several columns in braces."""
    others = first.others
    return others[0] if len(others) == 1 else "\\n".join(f"{{{column}}}" for column in others)
