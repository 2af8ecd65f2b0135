"""Classification: the loss of a row is that of the logits of a head on its pooled hidden states.

    one label       ℓ = -log softmax(z)_t                        (`ops.cross_entropy`)
    several labels  ℓ = mean_k of the binary cross-entropies      (`ops.binary_cross_entropy`)
    a number        ℓ = (z - t)²                                  (`ops.mse`)

The head is trained in full together with the adapter, see `head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backhand.data.rows import MULTI, NUMBER, ProblemType
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import BoundModel, Trainable, computing_with
from backhand.errors import not_none
from backhand.loop.class_scores import ClassScores, constant_logits, row_losses, score_classes, targets_of
from backhand.loop.objective import Measured
from backhand.loop.row_passes import head_logits
from backhand.objectives.kinds.head import HeadLoss, HeadObjective
from backhand.ops.binary_cross_entropy import binary_cross_entropy_backward, binary_cross_entropy_forward
from backhand.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from backhand.ops.mse import mse_backward, mse_forward
from backhand.options.objectives import ObjectiveOptions
from backhand.runs.row_changes import ROW_CONSTANT_SCORES, ROW_SCORES, as_loss, row_scores


@dataclass
class ClassifyObjective(HeadObjective):
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

    def loss_of(self, rows: Sequence[int], logits: Tensor) -> HeadLoss:
        targets = self.targets[list(rows)]
        measured: Measured = {}
        value, d_logits = loss_and_gradient(logits, targets, self.problem)
        if self.problem != NUMBER:
            measured["accuracy"] = float(right_rows(logits, targets, self.problem).sum()), len(targets)
        return HeadLoss(value, d_logits, measured)

    def base_logits(self, model: Trainable) -> Tensor:
        """Return the logits of the best constant answer."""
        return constant_logits(self.targets, self.problem)

    def row_losses(self, logits: Tensor) -> Tensor:
        return row_losses(logits, self.targets, self.problem)

    def evaluated(self, logits: Tensor) -> tuple[dict[str, float], dict[str, list[float]]]:
        scores = self.score(logits)
        metrics = scores.values | {"constant_loss": self._constant.loss}
        if (accuracy := self._constant.values.get("accuracy")) is not None:
            metrics["constant_accuracy"] = accuracy
        return metrics, {ROW_SCORES: [*scores.row_scores], ROW_CONSTANT_SCORES: [*self._constant.row_scores]}

    @cached_property
    def _constant(self) -> ClassScores:
        return self.score(constant_logits(self.targets, self.problem))

    def score(self, logits: Tensor) -> ClassScores:
        """Return the scores of these logits of all rows, (rows, outputs) float64."""
        examples = self.packer.examples
        sources = [examples[row].source for row in range(len(examples))]
        return score_classes(logits, self.targets, self.problem, self.options.class_labels, sources)

    def held_out_scores(
        self,
        bound: BoundModel,
        micro_batch_rows: int,
        start: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the fields of summary.json, of the best constant answer and of the adapted model.

        The change of the loss of numbers is that from the adapter at `start`, if there is one.
        """

        def scored() -> ClassScores:
            return self.score(not_none(head_logits(bound.model, self.packer, micro_batch_rows, Communicator())))

        base, adapted = self._constant, scored()
        compared = adapted.compared_with(base)
        fields: dict[str, Any] = {"base_classes": base.figures(), "adapted_classes": compared.figures()}
        fields["row_scores"] = row_scores(adapted.row_scores)
        if self.problem == NUMBER:
            gain = compared.gain
            if start is not None:
                with computing_with(bound.model, start):
                    gain = adapted.gain_over(scored().row_scores)
            fields["loss_change"] = gain and as_loss(gain)
        return fields


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
