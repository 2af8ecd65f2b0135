"""Which rows a step trains on. The order follows from (seed, epoch) alone, so a position is one number: the step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Sampler:
    """Every epoch is a new permutation of all rows, cut into steps; the last step of an epoch may be smaller.

    Attributes:
        rows: how many rows there are.
        batch_rows: rows per step.
        seed: of the order.
    """

    rows: int
    batch_rows: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over all rows."""
        return -(-self.rows // self.batch_rows)

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, that this step (counted from 0) lies in."""
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """Row numbers of this step, counted from 0."""
        order = epoch_order(self.seed, self.epoch_of(step), self.rows)
        start = step % self.steps_per_epoch * self.batch_rows
        return list(order[start : start + self.batch_rows])


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    """The permutation of one epoch."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return tuple(torch.randperm(rows, generator=generator).tolist())


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """An independent 63-bit seed for one purpose, e.g. the dropout of one micro-batch of one step."""
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
