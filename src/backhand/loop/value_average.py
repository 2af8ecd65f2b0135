"""Average of an adapter's values over the steps of a run.

A run can save an average of the values after each step instead of the newest ones. At the end of a run, AdamW moves
around a minimum with the noise of single steps, which the average evens out. After update t it is

    a ← a + (κ + 1) / (t + κ) (θ - a),   κ = 2 / share - 2      [polynomial-decay averaging, arXiv:1212.1824, §4]

The weights of the values grow with their step to the power of κ, from the first update on. The mean age of the values
tends to t / (κ + 2) = share t / 2, as in the plain mean over the last share of the steps. A share of 1 gives the mean
of all values. In a short run, whose loss still falls at the end, the average is worse than the newest values. Each
evaluation therefore measures both, and those with the lower held-out loss are saved.

The teacher of self-distillation is an average with a constant rate ρ, a ← a + ρ (θ - a), which is never saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.lora_parameters import LoRAParameters

IS_SAVED = "average_is_saved"
"""Name of `ValueAverage.is_saved` in a checkpoint."""


class ValueAverage:
    """Moving average of the values of an adapter.

    Args:
        lora: the adapter. The average starts with its values.
        rate: constant rate ρ of a teacher's average; 0 for the average that a run saves.
        share: the share of the steps; not used with a constant rate.

    Attributes:
        values: a, (elements,) float32.
    """

    def __init__(self, lora: LoRAParameters, rate: float, share: float | None) -> None:
        self.values = lora.values.clone()
        self.lora, self.rate, self._share = lora, rate, share
        self._is_saved = torch.tensor(True)

    @property
    def is_saved(self) -> bool:
        """False if the newest values had a lower loss than the average in an evaluation after the newest update."""
        return bool(self._is_saved)

    @is_saved.setter
    def is_saved(self, better: bool) -> None:
        self._is_saved.fill_(better)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by its names in a checkpoint."""
        return {"average": self.values, IS_SAVED: self._is_saved}

    def update(self, updates: int) -> None:
        """Add the adapter's values after this number of updates."""
        rate = self.rate
        if not rate:
            power = 2 / not_none(self._share) - 2
            rate = (power + 1) / (updates + power)
        self.values.lerp_(self.lora.values, rate)
        self.is_saved = True


@contextmanager
def saved_values(average: ValueAverage | None) -> Iterator[None]:
    """Give the adapter the values to save: the average, unless there is none, it is a teacher's, or it is worse."""
    if average is None or average.rate or not average.is_saved:
        yield
        return
    lora = average.lora
    newest, dtype = lora.values.clone(), lora.compute_values.dtype
    try:
        lora.values.copy_(average.values)
        lora.refresh_compute(dtype)
        yield
    finally:
        lora.values.copy_(newest)
        lora.refresh_compute(dtype)
