"""Problems of rows of rankings: negatives that are positives, documents given twice, and scores that are all equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from backhand.data.examples import Example
from backhand.data.rows import RankedTexts


def problems_of_rankings(examples: Iterable[Example]) -> list[tuple[Any, ...]]:
    """Return (kind, locations) for each kind of problem, see `lint.CHECKS`."""
    rows = [(one.source, one.facts) for one in examples if isinstance(one.facts, RankedTexts)]
    relevant: dict[int, set[int]] = defaultdict(set)
    firsts: dict[RankedTexts, str] = {}
    repeated = []
    for source, row in rows:
        relevant[row.query].update(text for text, target in zip(row.documents, row.targets, strict=True) if target > 0)
        if (first := firsts.setdefault(row, source)) != source:
            repeated.append(f"{source} = {first}")
    wrong = [
        source
        for source, row in rows
        if any(
            target <= 0 and text in relevant[row.query] for text, target in zip(row.documents, row.targets, strict=True)
        )
    ]
    twice = [source for source, row in rows if len({*row.documents}) < len(row.documents)]
    return [
        ("relevant_negative", wrong),
        ("twice", twice),
        ("one_score", [source for source, _ in rows] if have_one_target(row for _, row in rows) else []),
        ("duplicate", repeated),
    ]


def have_one_target(rows: Iterable[RankedTexts]) -> bool:
    """Return True if all documents of all rows have the same target, so that no order of them is wrong."""
    return len({target for row in rows for target in row.targets}) == 1
