"""Objectives of the logits of a head on the pooled hidden states: one vector of logits per document.

The head is trained in full together with the adapter (`nn.decoder.class_head`). The losses of rows do not depend on one
another, so a micro-batch is one forward and backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.engine import BoundModel, Trainable
from backhand.generation.completer import LanguageModel
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.measuring import HeldOut
from backhand.loop.objectives.objective import Measured, Objective, RowPasses
from backhand.loop.step import StepWork
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.class_head import class_gradients, class_logits
from backhand.nn.decoder.decoder import Decoder


class HeadLoss(NamedTuple):
    """The loss of some rows, with its gradient and metrics."""

    loss: Tensor  # Σ ℓ, 0-d float64
    d_logits: Tensor  # (documents, outputs) float64
    measured: Measured


@dataclass
class HeadObjective(Objective):
    """A loss of the logits of a head."""

    @abstractmethod
    def loss_of(self, rows: Sequence[int], logits: Tensor) -> HeadLoss:
        """Compute the loss of these rows in closed form.

        Args:
            logits: of all documents of the rows, (documents, outputs) float64 on the CPU.
        """

    @abstractmethod
    def base_logits(self, model: Trainable) -> Tensor | None:
        """Return the logits that stand for a model without an adapter, or None if the base has a head of its own."""

    @abstractmethod
    def row_losses(self, logits: Tensor) -> Tensor:
        """Return the loss of each row, (rows,) float64, for the logits of all documents, (documents, outputs)."""

    @abstractmethod
    def evaluated(self, logits: Tensor) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return metrics of the adapted model and values per row, with their names in metrics.jsonl.

        Args:
            logits: of all documents, (documents, outputs) float64.
        """

    @abstractmethod
    def held_out_scores(self, bound: BoundModel, micro_batch_rows: int, start: Tensor | None = None) -> dict[str, Any]:
        """Return the fields of summary.json on these rows, before the run and of the adapted model.

        Args:
            bound: the model with the adapter to measure, which is attached again afterwards.
            micro_batch_rows: largest number of rows per forward pass.
            start: values of the adapter that the run started from; None for the base model.
        """

    def prepare_step(
        self,
        model: Trainable,
        rows: Sequence[int],
        processes: Communicator,
        work: StepWork,
        parts: Sequence[Sequence[int]],
    ) -> None:
        """Do nothing: the losses of rows do not depend on one another."""

    def gradients(
        self,
        parts: Sequence[Sequence[int]],
        model: Trainable,
        number: int,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None,
    ) -> Tensor:
        assert isinstance(model, Decoder), "other engines are refused before"

        def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
            result = self.loss_of(parts[number], logits.double().cpu())
            self._measured[number] = result.measured
            return result.loss, (loss_scaling * result.d_logits).to(logits)

        return class_gradients(model, batch, loss, dropout_seed)


class HeldOutHead(HeldOut):
    """Held-out rows of a head.

    The head belongs to the adapter. Without an adapter, the loss is that of `HeadObjective.base_logits`.

    Args:
        objective: the objective of these rows.
        micro_batch_rows: largest number of rows per forward pass.
        hidden_states: cache of the rows' hidden states.
    """

    def __init__(
        self, objective: HeadObjective, micro_batch_rows: int, hidden_states: HiddenStateCache | None = None
    ) -> None:
        super().__init__(objective.packer.examples, micro_batch_rows, hidden_states)
        self.objective = objective

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        """Return the mean loss of a row, or None if the evaluation was interrupted."""
        objective, cache = self.objective, self._hidden_states
        logits = objective.base_logits(model) if model.lora is None else None
        if logits is None:
            rows = self._micro_batch_rows
            logits = head_logits(
                model, objective.packer, rows, processes, hidden_states=cache, interruptible=interruptible
            )
        if logits is None:
            return None
        if model.lora is not None:
            metrics, self.by_row = objective.evaluated(logits)
            self.measured = {f"eval_{name}": value for name, value in metrics.items()}
        return sequential_sum(objective.row_losses(logits).tolist()) / len(self._examples)


def head_logits(
    model: LanguageModel,
    packer: RowPacker,
    micro_batch_rows: int,
    processes: Communicator,
    *,
    hidden_states: HiddenStateCache | None = None,
    interruptible: bool = False,
    done: Callable[[], object] = lambda: None,
) -> Tensor | None:
    """Return the logits of all documents, (documents, outputs) float64, equal for any number of processes.

    Args:
        packer: of the rows.
        micro_batch_rows: largest number of rows per forward pass.
        hidden_states: cache of the rows' hidden states.
        interruptible: return None if a process has been asked to stop.
        done: called once per row.
    """
    every = range(len(packer.lengths))
    groups, tokens, batch = RowPasses.of(packer, every, micro_batch_rows, processes, hidden_states)

    def logits(number: int) -> list[list[float]]:
        assert isinstance(model, Decoder), "other engines are refused before"
        found = class_logits(model, batch(number).to(model.device)).double().tolist()
        for _ in groups[number]:
            done()
        return cast("list[list[float]]", found)

    parts = processes.parallel_map(tokens, logits, interruptible=interruptible)
    if parts is None:
        return None
    places = [document for group in groups for document in packer.documents(group)]
    by_document = dict(zip(places, (values for part in parts for values in part), strict=True))
    return torch.tensor([by_document[place] for place in range(len(places))], dtype=torch.float64)
