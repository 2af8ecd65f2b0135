"""What is measured and not trained on: rows held out, drawn from the seed; neutral texts; and rows in both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import resources

import numpy as np
import numpy.typing as npt

from backhand.data.examples import DataReport, Example, PreparedData, summed
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
    groups = _groups(data.examples)
    distinct = list(dict.fromkeys(groups))
    if len(distinct) < 2:
        raise DataError(
            f"{len(distinct)} distinct row is too few to hold some of them out",
            where="eval_fraction",
            next_step="give more rows, or --eval-data",
        )
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1)
    held = {distinct[i] for i in random_order(len(distinct), seed, _STREAM)[:count]}
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, group in zip(data.examples, groups, strict=True):
        sides[group in held].append(example)
    trained_on, held_out = (len({example.source for example in side}) for side in sides)
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
    distinct = len(set(_groups(data.examples)))
    return 0.0 if distinct < FEWEST_ROWS else min(USUAL_SHARE, MOST_HELD_OUT / distinct)


def overlap(train: Iterable[Example], held_out: Sequence[Example]) -> list[Example]:
    """The held-out examples whose tokens also stand in the training data, whatever carries loss in them."""
    seen = {example.token_key for example in train}
    return [example for example in held_out if example.token_key in seen]


def neutral_texts() -> list[str]:
    """Short texts that come with the package and have nothing to do with any task, one a line of neutral_texts.txt."""
    text = resources.files("backhand.data").joinpath("neutral_texts.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _groups(examples: Sequence[Example]) -> list[int]:
    """The index of the first example in each one's group; equal rows and equal tokens join groups (union-find)."""
    parents = list(range(len(examples)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    first: dict[str | bytes, int] = {}
    for i, example in enumerate(examples):
        for name in (example.source, example.token_key):
            one, other = sorted((root(first.setdefault(name, i)), root(i)))
            parents[other] = one
    return [root(i) for i in range(len(examples))]


def random_order(count: int, seed: int, *stream: object) -> npt.NDArray[np.int64]:
    """A permutation of `range(count)`, (count,) int64, drawn from the seed and the name of the stream.

    It sorts raw 64-bit draws of the Philox generator. NumPy promises to keep raw draws as they are, which it does not
    promise of `permutation`.
    """
    name = repr((seed, *stream)).encode()
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8").astype(np.uint64)
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64)
