"""Rankings: losses of the scores of a query's documents.

With a decoder, the score of a document is s = log p(yes) - log p(no) at the end of its prompt, see
`data.ranking_examples`. The sums of an `Objective` are these two log-probabilities, whose gradients are ∂L/∂s and
-∂L/∂s. Whatever else is probable at that position cancels.

With an encoder, which is then called a cross-encoder, s is the logit of a head with one output, see
`data.pair_examples`.

`loop.ranking_loss` has the loss as a function of the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from backhand.distributed.communicator import Communicator
from backhand.engines.engine import BoundModel, Trainable, computing_with
from backhand.errors import not_none
from backhand.loop.objective import RowLosses, means
from backhand.loop.ranking_loss import RankingLoss, scores_of
from backhand.loop.retrieval_scores import summary_scores
from backhand.loop.row_passes import document_sums, head_logits
from backhand.nn.decoder.class_head import has_score_head
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.kinds.answer_loss import AnswerObjective, Documents
from backhand.objectives.kinds.head import HeadLoss, HeadObjective
from backhand.options.objectives import ObjectiveOptions


@dataclass
class RankObjective(AnswerObjective):
    """The loss of rankings by a decoder."""

    compares_documents: ClassVar[bool] = True
    options: ObjectiveOptions = field(default_factory=lambda: ObjectiveOptions("rank"))

    @cached_property
    def loss(self) -> RankingLoss:
        """The loss as a function of scores."""
        return RankingLoss(self.packer.examples, self.options)

    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
        result = self.loss.of_scores(rows, scores_of(documents.sums))
        return result._replace(d_sums=torch.stack((result.d_sums, -result.d_sums), 1).flatten())

    def evaluated(self, rows: Sequence[int], sums: Tensor, losses: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the losses unchanged, and the scores of held-out rows. Raises as `RankingLoss.evaluated`."""
        return losses, self.loss.evaluated(rows, scores_of(sums))

    def held_out_scores(self, bound: BoundModel, micro_batch_rows: int, start: Tensor | None = None) -> dict[str, Any]:
        """Return the fields of summary.json on these rows, before the run and of the adapted model.

        Args:
            bound: the model with the adapter to measure, which is attached again afterwards.
            micro_batch_rows: number of rows per forward pass.
            start: values of the adapter that the run started from; None for the base model.
        """
        every, scores = range(len(self.packer.examples)), {}
        for name in ("base", "adapted"):
            with computing_with(bound.model, start) if name == "base" else nullcontext():
                packer, model = self.packer, bound.model
                sums = document_sums(model, packer, every, micro_batch_rows, Communicator(), exact=True)
            scores[name] = self.loss.scored(every, scores_of(not_none(sums)))
        return summary_scores(scores)


@dataclass
class CrossEncoderObjective(HeadObjective):
    """The loss of rankings by an encoder with a score head."""

    options: ObjectiveOptions = field(default_factory=lambda: ObjectiveOptions("rank"))

    @cached_property
    def loss(self) -> RankingLoss:
        """The loss as a function of scores."""
        return RankingLoss(self.packer.examples, self.options)

    @property
    def _every(self) -> range:
        return range(len(self.packer.examples))

    def loss_of(self, rows: Sequence[int], logits: Tensor) -> HeadLoss:
        of_scores = self.loss.of_scores(rows, logits.squeeze(1))
        return HeadLoss(of_scores.losses.sum(), of_scores.d_sums.unsqueeze(1), of_scores.measured)

    def base_logits(self, model: Trainable) -> Tensor | None:
        """Return equal scores, since a base without a score head ranks nothing; None for a cross-encoder."""
        if isinstance(model, Decoder) and has_score_head(model):
            return None
        return torch.zeros(int(self.packer.examples.document_counts.sum()), 1, dtype=torch.float64)

    def row_losses(self, logits: Tensor) -> Tensor:
        return self.loss.of_scores(self._every, logits.squeeze(1)).losses

    def evaluated(self, logits: Tensor) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return metrics, and no values per row. Raises as `RankingLoss.evaluated`."""
        scores = logits.squeeze(1)
        measured = self.loss.of_scores(self._every, scores).measured
        return {**means([measured]), **self.loss.evaluated(self._every, scores)}, {}

    def held_out_scores(self, bound: BoundModel, micro_batch_rows: int, start: Tensor | None = None) -> dict[str, Any]:
        """Return the fields of summary.json, those of the base only if it is a cross-encoder itself."""
        scores = {}
        for name in ("base", "adapted"):
            with computing_with(bound.model, start) if name == "base" else nullcontext():
                if name == "base" and start is None and self.base_logits(bound.model) is not None:
                    continue
                logits = not_none(head_logits(bound.model, self.packer, micro_batch_rows, Communicator()))
                scores[name] = self.loss.scored(self._every, logits.squeeze(1))
        return summary_scores(scores)
