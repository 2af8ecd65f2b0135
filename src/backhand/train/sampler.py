"""Which rows a step trains on. The order follows from seed and epoch alone, so a place in the data is one number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from backhand.data.random_order import random_order


@dataclass(frozen=True)
class Sampler:
    """Every epoch is a new permutation of all rows, cut into steps; the last step of an epoch may be smaller.

    Attributes:
        rows: how many rows there are, at least 1.
        batch_rows: rows per step, at least 1.
        seed: of the order.
    """

    rows: int
    batch_rows: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over all rows."""
        return -(-self.rows // self.batch_rows)

    def rows_of(self, step: int) -> list[int]:
        """Row numbers of this step, counted from 0."""
        order = _epoch_order(self.seed, step // self.steps_per_epoch, self.rows)
        start = step % self.steps_per_epoch * self.batch_rows
        return list(order[start : start + self.batch_rows])

    def epochs_done(self, steps: int) -> float:
        """Passes over the rows after so many steps, with the fraction of the present one."""
        whole, rest = divmod(steps, self.steps_per_epoch)
        return whole + rest * self.batch_rows / self.rows

    def position(self, steps: int) -> dict[str, int]:
        """The place in the data after so many steps, for a checkpoint's manifest."""
        epoch, rest = divmod(steps, self.steps_per_epoch)
        return {
            "epoch": epoch,
            "row": rest * self.batch_rows,
            "rows": self.rows,
            "batch_rows": self.batch_rows,
            "seed": self.seed,
        }


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    return tuple(random_order(rows, seed, "epoch order", epoch).tolist())
