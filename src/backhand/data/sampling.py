"""Which rows each optimizer step sees: shuffled per epoch from the seed, with a position that can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backhand.data.random_order import random_order
from backhand.errors import ArtifactError

_STREAM = "epoch order"


class BatchSampler:
    """Rows for one step after the other, every row once an epoch; the last step of an epoch may be smaller.

    The order of an epoch depends on the number of rows, the seed and the epoch alone: a position is two numbers.

    Args:
        row_count: rows to draw from, at least 1.
        batch_rows: rows per optimizer step, at least 1.
        seed: of the order.

    Attributes:
        epoch: complete passes so far.
        position: rows of the current epoch that were given out.
    """

    def __init__(self, row_count: int, batch_rows: int, seed: int) -> None:
        if row_count < 1 or batch_rows < 1:
            raise ValueError(f"row_count {row_count} and batch_rows {batch_rows} must be at least 1")
        self.row_count = row_count
        self.batch_rows = batch_rows
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = random_order(row_count, seed, _STREAM, 0)
        self._order_epoch = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return -(-self.row_count // self.batch_rows)

    @property
    def progress(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.epoch + self.position / self.row_count

    def next_rows(self) -> list[int]:
        """The rows of the next step; an epoch that ends with it is over afterwards."""
        if self._order_epoch != self.epoch:
            self._order = random_order(self.row_count, self.seed, _STREAM, self.epoch)
            self._order_epoch = self.epoch
        rows = self._order[self.position : self.position + self.batch_rows]
        self.position += len(rows)
        if self.position == self.row_count:
            self.epoch, self.position = self.epoch + 1, 0
        return [int(row) for row in np.asarray(rows)]

    def state_dict(self) -> dict[str, int]:
        """Everything needed to go on, as JSON values."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "row_count": self.row_count,
            "batch_rows": self.batch_rows,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state.

        Raises:
            ArtifactError: the state is not of a sampler with the same rows, batch and seed, or makes no sense.
        """
        for name in ("epoch", "position", "row_count", "batch_rows", "seed"):
            value = state.get(name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArtifactError(f"the stored {name} {value!r} is not an integer", where="sampler")
        for name in ("row_count", "batch_rows", "seed"):
            if state[name] != getattr(self, name):
                raise ArtifactError(
                    f"the stored {name} is {state[name]}, the present one is {getattr(self, name)}",
                    where="sampler",
                    why="the rows to come would not be those that were left",
                )
        if state["epoch"] < 0 or not 0 <= state["position"] < self.row_count:
            raise ArtifactError(
                f"the stored position {state['position']} in epoch {state['epoch']} lies outside", where="sampler"
            )
        self.epoch, self.position = state["epoch"], state["position"]
