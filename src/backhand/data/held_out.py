"""Rows for evaluation: a random split of the training rows, the overlap of two data sets, and neutral texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.random_order import random_order
from backhand.data.rows import RankedTexts, TextIdentities
from backhand.data.stored_examples import PreparedData, StoredExamples, count_sources, stored, with_totals
from backhand.errors import DataError
from backhand.words import count_of

_STREAM = "held-out split"


def split(data: PreparedData, fraction: float, seed: int) -> tuple[PreparedData, PreparedData]:
    """Split into training and held-out examples, each in the order of the file.

    All documents of a row, and all rows that have a document in common, are on the same side. So are all texts of a
    label, if a random split of single texts would leave too few of a label to pair them.

    Args:
        fraction: share of the distinct rows to hold out, in (0, 1); each side gets at least one row.

    Raises:
        DataError: there are fewer than two distinct rows.
    """
    examples, groups = data.examples, _groups(data.examples, fraction)
    distinct = np.unique(groups)
    if len(distinct) < 2:
        raise DataError(
            f"{len(distinct)} distinct row is too few to hold out a part of them",
            where="eval_fraction",
            next_step="give more rows, or --eval-data",
        )
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1)
    held = np.isin(groups, distinct[random_order(len(distinct), seed, _STREAM)[:count]])
    sides = [examples.take(side) for side in (~held, held)]
    trained_on, held_out = map(count_sources, sides)
    # Rows that were left out or cut are reported once, with the training data.
    both = count_of(trained_on + held_out, "row")
    note = f"{held_out:,} of these {both}, of which the other {trained_on:,} are trained on"
    share = held_out / (trained_on + held_out)
    if len(distinct) < len(examples) and abs(share - fraction) > _OTHER_SHARE:
        note += f"; rows of the same query, text or label stay together: {share:.0%} are held out, not {fraction:.0%}"
    drawn = DataReport(rows=held_out, notes=(note,))
    train = replace(with_totals(sides[0], replace(data.report, rows=trained_on)), held_out_share=fraction)
    return train, with_totals(sides[1], drawn)


_OTHER_SHARE = 0.03
"""Difference from the requested share of held-out rows from which on it is noted."""
USUAL_SHARE = 0.1


FEWEST_ROWS = 50


MOST_HELD_OUT = 500


def default_held_out_share(data: PreparedData) -> float:
    """Return the default share of rows to hold out: a tenth, at most 500 rows, and none of fewer than 50 rows.

    Five held-out rows are enough to find the best evaluation of a run, but too few to measure how good it is
    (docs/rates.md).
    """
    distinct = len(np.unique(_groups(data.examples, USUAL_SHARE)))
    return 0.0 if distinct < FEWEST_ROWS else min(USUAL_SHARE, MOST_HELD_OUT / distinct)


def overlap(train: Iterable[Example], held_out: Iterable[Example]) -> StoredExamples:
    """Return the held-out examples whose tokens also occur in the training data, whichever of them are supervised."""
    examples = stored(held_out)
    return examples.take(np.isin(examples.column("token_digest"), stored(train).column("token_digest")))


def neutral_texts() -> list[str]:
    """Return the lines of neutral_texts.txt: short texts of the package that are unrelated to any task."""
    return _package_lines("neutral_texts.txt")


def neutral_prompts() -> list[str]:
    """Return the lines of neutral_prompts.txt, whose answers show in words what an adapter has forgotten."""
    return _package_lines("neutral_prompts.txt")


def _package_lines(name: str) -> list[str]:
    return resources.files("backhand.data").joinpath(name).read_text(encoding="utf-8").splitlines()


def _groups(examples: StoredExamples, fraction: float) -> npt.NDArray[np.int64]:
    """(examples,) the first example of each example's group.

    Equal rows and equal tokens join groups, and so do equal queries of rankings. Equal labels of texts whose vectors
    are trained join groups if the held-out share has fewer than two texts per label on average.
    """
    columns = [examples.column(name) for name in ("source_digest", "token_digest")]
    if rankings := examples.facts(RankedTexts):
        columns.append(np.array([row.query for row in rankings], dtype=np.uint64))
    labels = [row.label for row in examples.facts(TextIdentities) if row.label is not None]
    if len(labels) == len(examples) and fraction * len(labels) < 2 * len(set(labels)):
        columns.append(np.array(labels, dtype=np.uint64))
    values = [np.unique(column, return_inverse=True)[1] for column in columns]
    everything = np.arange(len(examples))
    groups = everything
    while True:  # in each round, every group joins the first one that has a value in common with it
        joined = everything.copy()
        for numbers in values:
            firsts = np.full(len(examples), len(examples))
            np.minimum.at(firsts, numbers, groups)
            np.minimum.at(joined, groups, firsts[numbers])
        while not np.array_equal(joined, further := joined[joined]):
            joined = further
        if np.array_equal(groups, joined := joined[groups]):
            return groups
        groups = joined


def equal_neighbours(values: npt.NDArray[Any]) -> tuple[list[int], list[int]]:
    """Return pairs of indices with equal values: each occurrence of a value with the next one, ascending."""
    order = np.argsort(values, kind="stable")
    values = values[order]
    again = np.flatnonzero(values[1:] == values[:-1])
    return order[again].tolist(), order[again + 1].tolist()


def repeated(examples: StoredExamples) -> list[str]:
    """Return the locations of duplicates, each with the location of the first occurrence."""
    before, again = equal_neighbours(examples.column("token_digest"))
    firsts: dict[int, int] = {}
    for one, other in zip(before, again, strict=True):
        firsts[other] = firsts.get(one, one)
    return [f"{examples[one].source} = {examples[first].source}" for one, first in sorted(firsts.items())]
