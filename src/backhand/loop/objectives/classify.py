"""Classification: the loss of a row is that of the logits of a head on its pooled hidden states.

    one label       ℓ = -log softmax(z)_t                        (`ops.cross_entropy`)
    several labels  ℓ = mean_k of the binary cross-entropies      (`ops.binary_cross_entropy`)
    a number        ℓ = (z - t)²                                  (`ops.mse`)

The head is trained in full together with the adapter (`nn.decoder.class_head`). The losses of rows do not depend on one
another, so a micro-batch is one forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from backhand.data.class_examples import MULTI, NUMBER, target_of
from backhand.data.packing import RowPacker
from backhand.data.rows import ProblemType
from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.engine import BoundModel, Trainable
from backhand.errors import not_none
from backhand.generation.completer import LanguageModel
from backhand.loop.class_scores import ClassScores, constant_logits, row_losses, score_classes
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.measuring import HeldOut
from backhand.loop.objectives.objective import Objective, RowPasses
from backhand.loop.step import StepWork
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.class_head import class_gradients, class_logits
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.binary_cross_entropy import binary_cross_entropy_backward, binary_cross_entropy_forward
from backhand.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from backhand.ops.mse import mse_backward, mse_forward
from backhand.options.objectives import ObjectiveOptions


@dataclass
class ClassifyObjective(Objective):
    """The loss of a classification head."""

    options: ObjectiveOptions = field(default_factory=lambda: ObjectiveOptions("classify"))

    @property
    def problem(self) -> ProblemType:
        """Use of the logits."""
        return not_none(self.options.problem_type)

    @cached_property
    def targets(self) -> Tensor:
        """Targets of all rows, (rows, outputs) float64."""
        return targets_of(self.packer, self.problem, self.options.class_labels)

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
        targets = self.targets[list(parts[number])]

        def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
            on_cpu = logits.double().cpu()
            value, d_logits = loss_and_gradient(on_cpu, targets, self.problem)
            if self.problem != NUMBER:
                hits = right_rows(on_cpu, targets, self.problem)
                self._measured[number] = {"accuracy": (float(hits.sum()), len(targets))}
            return value, (loss_scaling * d_logits).to(logits)

        return class_gradients(model, batch, loss, dropout_seed)

    def score(self, logits: Tensor) -> ClassScores:
        """Return the scores of these logits of all rows, (rows, outputs) float64."""
        examples = self.packer.examples
        sources = [examples[row].source for row in range(len(examples))]
        return score_classes(logits, self.targets, self.problem, self.options.class_labels, sources)

    def held_out_scores(self, bound: BoundModel, micro_batch_rows: int) -> dict[str, Any]:
        """Return the fields of summary.json on these rows, of the best constant answer and of the adapted model.

        Args:
            bound: the model with the adapter to measure.
            micro_batch_rows: number of rows per forward pass.
        """
        logits = not_none(logits_of_rows(bound.model, self.packer, micro_batch_rows, Communicator()))
        found = {"base": constant_logits(self.targets, self.problem), "adapted": logits}
        return {f"{name}_classes": self.score(one).to_json() for name, one in found.items()}


def targets_of(packer: RowPacker, problem: ProblemType, labels: Sequence[str]) -> Tensor:
    """Return the targets of all rows, (rows, outputs) float64. Raises DataError for a label that does not fit."""
    examples = packer.examples
    rows = range(len(examples))
    found = [target_of(not_none(examples.class_label(row)), problem, labels, examples[row].source) for row in rows]
    return torch.tensor(found, dtype=torch.float64)


def loss_and_gradient(logits: Tensor, targets: Tensor, problem: ProblemType) -> tuple[Tensor, Tensor]:
    """Return Σ ℓ of rows, 0-d, and its gradient of the logits.

    Args:
        logits, targets: (rows, outputs) float64.
    """
    ones = logits.new_ones(len(logits))
    if problem == NUMBER:
        loss, saved = mse_forward(logits, targets)
        return loss * len(logits), mse_backward(loss.new_tensor(len(logits)), saved).d_prediction
    if problem == MULTI:
        losses, of_labels = binary_cross_entropy_forward(logits, targets)
        share = torch.full_like(losses, 1 / losses.shape[1])
        return losses.mean(1).sum(), binary_cross_entropy_backward(share, of_labels).d_scores
    losses, of_classes = cross_entropy_forward(logits, targets.argmax(1))
    return losses.sum(), cross_entropy_backward(ones, of_classes).d_logits


def right_rows(logits: Tensor, targets: Tensor, problem: ProblemType) -> Tensor:
    """Return True for each row whose labels are exactly right, (rows,) bool."""
    if problem == MULTI:
        return ((logits > 0) == (targets > 0.5)).all(1)
    return logits.argmax(1) == targets.argmax(1)


def logits_of_rows(
    model: LanguageModel,
    packer: RowPacker,
    micro_batch_rows: int,
    processes: Communicator,
    *,
    hidden_states: HiddenStateCache | None = None,
    interruptible: bool = False,
    done: Callable[[], object] = lambda: None,
) -> Tensor | None:
    """Return the logits of all rows of the packer, (rows, outputs) float64, equal for any number of processes.

    Args:
        micro_batch_rows: number of rows per forward pass.
        hidden_states: cache of the rows' hidden states.
        interruptible: return None if a process has been asked to stop.
        done: called after every forward pass.
    """
    every = range(len(packer.lengths))
    groups, tokens, batch = RowPasses.of(packer, every, micro_batch_rows, processes, hidden_states)

    def logits(number: int) -> list[list[float]]:
        assert isinstance(model, Decoder), "other engines are refused before"
        found = class_logits(model, batch(number).to(model.device)).double().tolist()
        done()
        return cast("list[list[float]]", found)

    parts = processes.parallel_map(tokens, logits, interruptible=interruptible)
    if parts is None:
        return None
    places = [row for group in groups for row in group]
    rows = dict(zip(places, (values for part in parts for values in part), strict=True))
    return torch.tensor([rows[row] for row in range(len(rows))], dtype=torch.float64)


class HeldOutClasses(HeldOut):
    """Held-out rows of a classification head.

    The head belongs to the adapter. Without an adapter, the loss is that of the best constant answer to these rows.

    Args:
        objective: the objective of these rows.
        micro_batch_rows: number of rows per forward pass.
        hidden_states: cache of the rows' hidden states.
    """

    def __init__(
        self, objective: ClassifyObjective, micro_batch_rows: int, hidden_states: HiddenStateCache | None = None
    ) -> None:
        super().__init__(objective.packer.examples, micro_batch_rows, hidden_states)
        self._objective = objective

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        """Return the mean loss of a row, or None if the evaluation was interrupted."""
        objective, cache = self._objective, self._hidden_states
        if model.lora is None:
            logits: Tensor | None = constant_logits(objective.targets, objective.problem)
        else:
            rows = self._micro_batch_rows
            logits = logits_of_rows(
                model, objective.packer, rows, processes, hidden_states=cache, interruptible=interruptible
            )
        if logits is None:
            return None
        self.measured = {f"eval_{name}": value for name, value in objective.score(logits).values.items()}
        losses = row_losses(logits, objective.targets, objective.problem).tolist()
        return sequential_sum(losses) / len(self._examples)
