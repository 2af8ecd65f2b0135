"""The loss of a set of rows, other than cross-entropy, as the training loop sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.loop.step import StepWork
from backhand.nn.batch import PackedBatch

Measured = dict[str, tuple[float, int]]
"""Metrics of rows under TRL's names: each a sum and the number of rows in it."""


class MicroBatch(NamedTuple):
    """A micro-batch of a step."""

    number: int  # its index in the step
    batch: PackedBatch
    loss_scaling: float  # factor of the gradients
    dropout_seed: int | None  # seed of the dropout masks, or None


class RowLosses(NamedTuple):
    """Losses of some rows, with their gradient and metrics."""

    losses: Tensor  # (rows,) float64
    d_sums: Tensor  # ∂Σ losses / ∂s, (documents,) float64
    measured: Measured
    by_row: Mapping[str, Tensor] = MappingProxyType({})  # values of the rows under names of metrics.jsonl


@dataclass
class Objective(ABC):
    """The loss of one set of rows."""

    packer: RowPacker  # packs the rows
    _measured: dict[int, Measured] = field(default_factory=dict, kw_only=True)  # by micro-batch

    def prepare_step(  # noqa: B027 - most losses of rows do not depend on one another
        self,
        model: Trainable,
        rows: Sequence[int],
        processes: Communicator,
        work: StepWork,
        parts: Sequence[Sequence[int]],
    ) -> None:
        """Prepare the losses of a step, for objectives in which the loss of a row depends on other rows of the step.

        Args:
            rows: the rows of the step.
            work: their micro-batches.
            parts: the rows of each micro-batch.
        """

    @abstractmethod
    def gradients(self, model: Trainable, rows: Sequence[int], part: MicroBatch) -> Tensor:
        """Add the gradients of a micro-batch to those of the model's adapter, and return its loss, Σ ℓ of its rows.

        Args:
            rows: its rows.
        """

    def measured(self, processes: Communicator) -> dict[str, float]:
        """Return the metrics of the step's rows over all processes, and forget them."""
        mine, self._measured = self._measured, {}
        parts = processes.all_gather_object(mine)
        by_batch = {int(number): measured for part in parts for number, measured in part.items()}
        return means(by_batch[number] for number in sorted(by_batch))


def means(measured: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Divide sums by their counts, and add the margin of the mean rewards if both kinds of answers occur."""
    sums: dict[str, tuple[float, int]] = {}
    for one in measured:
        for name, (value, count) in one.items():
            total, rows = sums.get(name, (0.0, 0))
            sums[name] = (total + value, rows + int(count))
    shown = {name: total / count for name, (total, count) in sums.items() if count}
    if "rewards/chosen" in shown and "rewards/rejected" in shown:
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
    return shown
