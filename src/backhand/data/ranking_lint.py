"""Problems of rows of rankings: negatives that are positives, documents given twice, and scores that are all equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from backhand.data.examples import Example
from backhand.data.rows import RankedTexts, RankingLossName


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


def target_fault(loss: RankingLossName, row: RankedTexts) -> tuple[str, str | None, str] | None:
    """Return the fault of a row whose targets do not fit the loss, with the reason and the remedy, or None."""
    targets = row.targets
    if loss != "pointwise" and len(targets) < 2:
        return (
            f"there is one document in this row, and {loss} compares the documents of a row",
            None,
            "give rows with negatives or with lists of documents, or --ranking-loss pointwise",
        )
    if loss == "pointwise" and (outside := [one for one in targets if not 0 <= one <= 1]):
        return (
            "a score is not from 0 to 1",
            f"the first one is {outside[0]:g}, and pointwise learns the probability that a document is relevant",
            "replace every score by (score - smallest) / (largest - smallest), or give --ranking-loss listnet",
        )
    if loss == "listwise" and (min(targets) < 0 or not sum(targets)):
        return (
            "no document of this row is relevant" if min(targets) >= 0 else "a score is below 0",
            "listwise learns the share of each document in the sum of the scores",
            "remove the row, or give --ranking-loss pointwise or listnet"
            if min(targets) >= 0
            else "subtract the smallest of all scores from every score, or give --ranking-loss listnet",
        )
    return None


def have_one_target(rows: Iterable[RankedTexts]) -> bool:
    """Return True if all documents of all rows have the same target, so that no order of them is wrong."""
    return len({target for row in rows for target in row.targets}) == 1
