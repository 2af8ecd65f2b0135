"""Runs that train a head on the pooled hidden states: objectives of its logits, one vector per document.

The head is trained in full together with the adapter (`nn.decoder.class_head`). The losses of rows do not depend on one
another, so a micro-batch is one forward and backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from backhand.adapters.loading import match_linear_adapter
from backhand.data.packing import RowPacker
from backhand.data.rows import ProblemType
from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.decoder_engine import DecoderEngine
from backhand.engines.engine import BoundModel, Trainable
from backhand.errors import UsageError
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.measuring import HeldOut
from backhand.loop.objective import Measured, MicroBatch, Objective
from backhand.loop.row_passes import head_logits
from backhand.nn.decoder.class_head import class_gradients
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.source import ModelSource
from backhand.training.hooks import KnownRows, Losses, RunContext

_WITHOUT_CLASS = ("bamba", "falcon_h1", "gemma4_text", "granite", "granitemoehybrid", "lfm2", "nemotron_h")
"""Model types for which transformers has no class for sequence classification."""


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

    def gradients(self, model: Trainable, rows: Sequence[int], part: MicroBatch) -> Tensor:
        assert isinstance(model, Decoder), "other engines are refused before"

        def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
            result = self.loss_of(rows, logits.double().cpu())
            self._measured[part.number] = result.measured
            return result.loss, (part.loss_scaling * result.d_logits).to(logits)

        return class_gradients(model, part.batch, loss, part.dropout_seed)


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


@dataclass(frozen=True)
class StartingHead:
    """The head of the adapter that a run starts from."""

    origin: str  # the adapter
    outputs: int
    problem: ProblemType | None = None  # None for an adapter that PEFT wrote
    labels: tuple[str, ...] = ()  # in the order of the outputs; empty for an adapter that PEFT wrote


def starting_head(rows: KnownRows) -> StartingHead | None:
    """Return the head of the adapter that a run starts from, or None without one. Raises UsageError if it has none."""
    start, engine = rows.start, rows.engine
    if start is None or not isinstance(engine, DecoderEngine):
        return None
    record = start.contents.record
    known = {} if record is None else record.classification
    loaded = match_linear_adapter(start.contents, engine.module_shapes())
    outputs = engine.config.class_head.labels_of({one.name: one.shape for one in loaded.trained})
    if not outputs:
        raise UsageError(
            f"{start.origin} has no classification head",
            where="from_adapter",
            why="training continues with the adapter's own modules and values",
            next_step=f"give one of --objective {rows.config.objective.objective} with a head, or leave it out for a "
            "fresh adapter",
        )
    return StartingHead(start.origin, outputs, known.get("problem_type"), tuple(known.get("labels", ())))


def class_notes(source: ModelSource) -> tuple[str, ...]:
    """Return a note if transformers cannot load the adapter."""
    kind = source.config.get("model_type")
    if kind not in _WITHOUT_CLASS:
        return ()
    return (f"transformers has no class for sequence classification of {kind} models; Backhand alone reads the head",)


def head_losses(run: RunContext, made: Callable[[RowPacker], HeadObjective]) -> Losses:
    """Return the losses of objectives of a head, which `made` makes of the packer of a set of rows."""
    train, packer = made(run.inputs.packer), run.inputs.held_out_packer
    if packer is None:
        return Losses(train)
    return Losses(train, HeldOutHead(made(packer), run.micro_batch_rows, run.caches.held_out))


def head_scores(run: RunContext, losses: Losses) -> dict[str, Any]:
    """Return fields of summary.json on the held-out rows."""
    assert isinstance(losses.held_out, HeldOutHead)
    return losses.held_out.objective.held_out_scores(run.bound, run.micro_batch_rows, run.start.values)
