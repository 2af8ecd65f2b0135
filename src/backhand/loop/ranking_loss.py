"""The loss of rankings as a function of the scores of a query's documents.

The value of `ranking_loss` chooses the form:

    pointwise   mean binary cross-entropy of the documents, with targets from 0 to 1   (`ops.binary_cross_entropy`)
    listwise    cross-entropy of the softmax over the documents, with the targets divided by their sum   (`ops.decide`)
    listnet     the same, with the softmax of the targets
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backhand.data.pair_examples import PairFormat
from backhand.data.ranking_lint import target_fault
from backhand.data.rows import RankedTexts
from backhand.data.stored_examples import StoredExamples
from backhand.errors import CheckError, DataError
from backhand.loop.objective import RowLosses
from backhand.loop.ranking_scores import RankingScores, score_rankings
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
