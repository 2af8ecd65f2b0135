"""Rankings: losses of the scores of a query's documents.

With a decoder, the score of a document is s = log p(yes) - log p(no) at the end of its prompt, see
`data.ranking_examples`. The sums of an `Objective` are these two log-probabilities, whose gradients are ∂L/∂s and
-∂L/∂s. Whatever else is probable at that position cancels.

With an encoder, which is then called a cross-encoder, s is the logit of a head with one output, see
`data.pair_examples`.

    pointwise   mean binary cross-entropy of the documents, with targets from 0 to 1   (`ops.binary_cross_entropy`)
    listwise    cross-entropy of the softmax over the documents, with the targets divided by their sum   (`ops.decide`)
    listnet     the same, with the softmax of the targets
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from backhand.data.pair_examples import PairFormat
from backhand.data.ranking_lint import target_fault
from backhand.data.rows import RankedTexts
from backhand.data.stored_examples import StoredExamples
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import BoundModel, Trainable, computing_with
from backhand.errors import CheckError, DataError, not_none
from backhand.loop.objectives.head import HeadLoss, HeadObjective, head_logits
from backhand.loop.objectives.objective import AnswerObjective, Documents, RowLosses, document_sums, means
from backhand.loop.ranking_scores import RankingScores, score_rankings
from backhand.loop.retrieval_scores import summary_scores
from backhand.nn.decoder.class_head import has_score_head
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family import DecoderConfig
from backhand.ops.binary_cross_entropy import binary_cross_entropy_backward, binary_cross_entropy_forward
from backhand.ops.decide import decide_backward, decide_forward
from backhand.options.objectives import ObjectiveOptions

CONSTANT = 1e-5
"""Largest difference in nats between the scores of a query's documents that no longer ranks them."""


@dataclass
class RankingLoss:
    """The loss of rankings as a function of the scores of their documents."""

    examples: StoredExamples
    options: ObjectiveOptions
    _was_apart: bool = False  # True after an evaluation in which scores differed

    def texts(self, rows: Sequence[int]) -> list[RankedTexts]:
        """Return digests and targets of these rows."""
        return self.examples.facts(RankedTexts, rows)

    def of_scores(self, rows: Sequence[int], scores: Tensor) -> RowLosses:
        """Compute the losses of the rows, and metrics of those whose documents differ in their targets.

        `hit@1` is the share of rows with a most relevant document first, and `margin` the mean score of these documents
        above that of the others.

        Args:
            scores: s of all documents of the rows, (documents,) float64.

        Returns:
            the losses. `d_sums` is ∂Σ losses / ∂s, (documents,).
        """
        texts = self.texts(rows)
        counts = torch.tensor([len(row.documents) for row in texts])
        targets = torch.tensor([target for row in texts for target in row.targets], dtype=torch.float64)
        owner = torch.arange(len(texts)).repeat_interleave(counts)
        if self.options.ranking_loss == "pointwise":
            of_documents, saved = binary_cross_entropy_forward(scores, targets, self.options.positive_weight)
            weight = 1 / counts.double()[owner]
            losses = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, owner, weight * of_documents)
            d_scores = binary_cross_entropy_backward(weight, saved).d_scores
        else:
            listed = torch.cat([self._distribution(one) for one in targets.split(counts.tolist())])
            losses, of_lists = decide_forward(scores, listed, owner, len(texts))
            d_scores = decide_backward(torch.ones_like(losses), of_lists).d_scores
        return RowLosses(losses, d_scores, _measured(texts, scores.split(counts.tolist())))

    def _distribution(self, targets: Tensor) -> Tensor:
        """Return the target probabilities of a list."""
        return targets.softmax(0) if self.options.ranking_loss == "listnet" else targets / targets.sum()

    def evaluated(self, rows: Sequence[int], scores: Tensor) -> dict[str, float]:
        """Return metrics of held-out rows after an evaluation.

        Raises:
            CheckError: the scores have become constant since an earlier evaluation.
        """
        scored = self.scored(rows, scores)
        if self._was_apart and not scored.spread > CONSTANT:
            raise CheckError(
                f"the scores are constant: those of a query's documents differ by {scored.spread:.2g} nats",
                why="the learning rate is too high, or the rows contradict each other",
                next_step="start again with a lower --learning-rate, or with more rows per step (--batch-rows)",
            )
        self._was_apart = self._was_apart or scored.spread > CONSTANT
        return {**scored.values, "spread": scored.spread}

    def scored(self, rows: Sequence[int], scores: Tensor) -> RankingScores:
        """Return retrieval scores of these rows for s of all their documents, (documents,)."""
        scored = score_rankings(self.texts(rows), scores.tolist())
        equal = self.of_scores(rows, torch.full_like(scores, self._base_rate(rows))).losses
        return replace(scored, chance={**scored.chance, "loss": float(equal.mean())})

    def _base_rate(self, rows: Sequence[int]) -> float:
        """Return the score of all documents, in nats, that has the lowest loss: the logit of the weighted base rate."""
        share = sum(sum(one.targets) / len(one.targets) for one in self.texts(rows)) / len(rows)
        if self.options.ranking_loss != "pointwise":
            return 0.0  # of lists, all equal scores have the same loss
        weighted, least = self.options.positive_weight * share, 1e-12
        return math.log(max(weighted, least) / max(1 - share, least))


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


def pair_format(config: DecoderConfig, padding_id: int | None) -> PairFormat:
    """Return the way from a query and a document to the tokens that the score head of a model reads."""
    token_types = config.inputs is not None and config.inputs.types > 1
    return PairFormat(config.class_head.pooling, padding_id, token_types=token_types)


def scores_of(sums: Tensor) -> Tensor:
    """Return log p(yes) - log p(no) of every document, (documents,).

    Args:
        sums: log-probabilities of yes and no, (2 documents,), those of a document next to each other.
    """
    yes, no = sums.view(-1, 2).unbind(1)
    return yes - no


def _measured(texts: Sequence[RankedTexts], scores: Sequence[Tensor]) -> dict[str, tuple[float, int]]:
    firsts, margin, rows = 0, 0.0, 0
    for row, of_row in zip(texts, scores, strict=True):
        targets = torch.tensor(row.targets)
        relevant = targets == targets.max()
        if relevant.all():
            continue
        rows += 1
        firsts += bool(of_row[relevant].max() > of_row[~relevant].max())
        margin += float(of_row[relevant].mean() - of_row[~relevant].mean())
    return {"hit@1": (firsts, rows), "margin": (margin, rows)}


def check_targets(options: ObjectiveOptions, examples: StoredExamples) -> None:
    """Raise DataError unless the targets of these rows fit the loss of rankings."""
    for number, row in enumerate(examples.facts(RankedTexts)):
        if fault := target_fault(options.ranking_loss, row):
            what, why, next_step = fault
            raise DataError(what, where=examples[number].source, why=why, next_step=next_step)
