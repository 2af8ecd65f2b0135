"""Problems of rows of embeddings: equal texts, negatives that are positives, duplicates, few different positives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from backhand.data.examples import Example
from backhand.data.rows import TextIdentities

FEW_POSITIVES = 0.1
"""Share of different positives, or anchors, among the rows below which most candidates of a step are no negatives."""


def problems_of_embeddings(examples: Iterable[Example]) -> list[tuple[Any, ...]]:
    """Return (kind, locations, phrase) for each kind of problem, see `lint.CHECKS`."""
    rows = [(one.source, one.facts) for one in examples if isinstance(one.facts, TextIdentities)]
    positives: dict[int, set[int]] = defaultdict(set)
    firsts: dict[TextIdentities, str] = {}
    repeated = []
    for source, row in rows:
        positives[row.texts[0]].add(row.texts[1])
        if (first := firsts.setdefault(row, source)) != source:
            repeated.append(f"{source} = {first}")
    scored = any(row.score is not None for _, row in rows)
    alike = [source for source, row in rows if row.score is None and row.texts[0] == row.texts[1]]
    wrong = [source for source, row in rows if positives[row.texts[0]].intersection(row.texts[2:])]
    counts = len({row.texts[1] for _, row in rows}), len(positives)
    few = ([rows[0][0]] if rows and not scored and count < FEW_POSITIVES * len(rows) else [] for count in counts)
    few_positives, few_anchors = few
    return [
        ("equal_positive", alike),
        ("positive_negative", wrong),
        ("few_positives", few_positives, counts[0]),
        ("few_anchors", few_anchors, counts[1]),
        ("duplicate", repeated),
    ]
