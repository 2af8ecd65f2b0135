"""What is measured and not trained on: rows held out, drawn from the seed; neutral texts; and rows in both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from backhand.data.examples import DataReport, Example
from backhand.data.stored_examples import PreparedData, StoredExamples, stored, summed
from backhand.errors import DataError
from backhand.words import count_of

_STREAM = "held-out split"


def split(data: PreparedData, fraction: float, seed: int) -> tuple[PreparedData, PreparedData]:
    """Training and held-out examples, each in the order of the file.

    All documents of a row, and all rows that share a document, go to the same side.

    Args:
        fraction: share of the distinct rows to hold out, in (0, 1); at least one row stays on either side.

    Raises:
        DataError: there are fewer than two distinct rows.
    """
    examples, groups = data.examples, _groups(data.examples)
    distinct = np.unique(groups)
    if len(distinct) < 2:
        raise DataError(
            f"{len(distinct)} distinct row is too few to hold some of them out",
            where="eval_fraction",
            next_step="give more rows, or --eval-data",
        )
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1)
    held = np.isin(groups, distinct[random_order(len(distinct), seed, _STREAM)[:count]])
    sides = [examples.take(side) for side in (~held, held)]
    trained_on, held_out = (len(np.unique(side.column("source_digest"))) for side in sides)
    # What was left out or cut is told once, of the file it stands in.
    drawn = DataReport(rows=held_out, notes=(f"{held_out:,} of these {count_of(trained_on + held_out, 'row')}",))
    train = replace(summed(sides[0], replace(data.report, rows=trained_on)), held_out_share=fraction)
    return train, summed(sides[1], drawn)


USUAL_SHARE = 0.1
FEWEST_ROWS = 50
MOST_HELD_OUT = 500


def usual_share(data: PreparedData) -> float:
    """The share to hold out where nobody says how much: a tenth, 500 rows at most, and none of fewer than 50 rows.

    Five rows tell which evaluation of one run is the best. They do not tell well how good it is: see docs/rates.md.
    """
    distinct = len(np.unique(_groups(data.examples)))
    return 0.0 if distinct < FEWEST_ROWS else min(USUAL_SHARE, MOST_HELD_OUT / distinct)


def overlap(train: Iterable[Example], held_out: Iterable[Example]) -> StoredExamples:
    """The held-out examples whose tokens also stand in the training data, whatever carries loss in them."""
    examples = stored(held_out)
    return examples.take(np.isin(examples.column("token_digest"), stored(train).column("token_digest")))


def neutral_texts() -> list[str]:
    """Short texts that come with the package and have nothing to do with any task, one a line of neutral_texts.txt."""
    text = resources.files("backhand.data").joinpath("neutral_texts.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _groups(examples: StoredExamples) -> npt.NDArray[np.int64]:
    """(examples,) the first example of each one's group; equal rows and equal tokens join groups (union-find)."""
    parents: dict[int, int] = {}  # of those that are not the first of their group

    def root(i: int) -> int:
        while (parent := parents.get(i, i)) != i:
            parents[i] = i = parents.get(parent, parent)
        return i

    for name in ("source_digest", "token_digest"):
        for one, other in zip(*equal_neighbours(examples.column(name)), strict=True):
            first, second = sorted((root(one), root(other)))
            if first != second:
                parents[second] = first
    groups = np.arange(len(examples))
    for i in parents:
        groups[i] = root(i)
    return groups


def equal_neighbours(values: npt.NDArray[Any]) -> tuple[list[int], list[int]]:
    """Places of equal values, ascending, each but the last of its kind with the next."""
    order = np.argsort(values, kind="stable")
    values = values[order]
    again = np.flatnonzero(values[1:] == values[:-1])
    return order[again].tolist(), order[again + 1].tolist()


def random_order(count: int, seed: int, *stream: object) -> npt.NDArray[np.int64]:
    """A permutation of `range(count)`, (count,) int64, drawn from the seed and the name of the stream.

    It sorts raw 64-bit draws of the Philox generator. NumPy promises to keep raw draws as they are, which it does not
    promise of `permutation`.
    """
    name = repr((seed, *stream)).encode()
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8").astype(np.uint64)
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)
