"""Rows held out of the training data, drawn from the seed; and rows that stand in both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from backhand.data.examples import Example, PreparedData, summed
from backhand.data.random_order import random_order
from backhand.errors import DataError

_STREAM = "held-out split"


def split(data: PreparedData, fraction: float, seed: int) -> tuple[PreparedData, PreparedData]:
    """Training and held-out examples, each in the order of the file.

    All documents of a row, and all rows with the same tokens, go to the same side.

    Args:
        fraction: share of the distinct rows to hold out, in (0, 1); at least one row stays on either side.
        seed: of the draw.

    Raises:
        DataError: there are fewer than two distinct rows.
    """
    rows: dict[str, hashlib._Hash] = {}
    for example in data.examples:
        rows.setdefault(example.source, hashlib.sha256()).update(example.key)
    row_keys = {source: key.digest() for source, key in rows.items()}
    distinct = list(dict.fromkeys(row_keys.values()))
    if len(distinct) < 2:
        raise DataError(
            f"{len(distinct)} distinct row is too few to hold some of them out",
            where="eval_fraction",
            next_step="give more rows, or --eval-data",
        )
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1)
    held = {distinct[i] for i in random_order(len(distinct), seed, _STREAM)[:count]}
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in data.examples:
        sides[row_keys[example.source] in held].append(example)
    return summed(sides[0], data.report), summed(sides[1], data.report)


def overlap(train: Iterable[Example], held_out: Sequence[Example]) -> list[Example]:
    """The held-out examples whose tokens also stand in the training data, whatever carries loss in them."""
    seen = {hashlib.sha256(example.input_ids.tobytes()).digest() for example in train}
    return [example for example in held_out if hashlib.sha256(example.input_ids.tobytes()).digest() in seen]
