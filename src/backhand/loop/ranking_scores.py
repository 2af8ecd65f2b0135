"""Scores of rankings: the documents of each query in the order of their scores, compared with their targets.

    MRR@10    1 / rank of the first relevant document, 0 if it is not among the first 10
    nDCG@10   Σ_{ranks r ≤ 10} t_r / log2(r + 1), divided by the largest possible sum, with t_r the target at rank r

A document is relevant if its target is above 0. The documents of all rows with the same query are ranked together, and
a query counts if its documents differ in their targets. Documents with equal scores have the order that is worst. These
are the definitions of CrossEncoderRerankingEvaluator of sentence-transformers, which ranks ties as they come. Where no
query counts, the score is Spearman's correlation of scores and targets over all documents. Where all targets are equal,
there is no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backhand.data.rows import RankedTexts
from backhand.loop.retrieval_scores import DEPTH, Floats, RetrievalScores, resampled_mean, resampled_spearman, spearman


@dataclass(frozen=True)
class RankingScores(RetrievalScores):
    """Scores of the rankings of one model: mrr@10 and ndcg@10, or spearman; none if all targets are equal.

    `chance` has ndcg@10 of a random order, and the loss of the best equal scores.
    """

    spread: float  # mean over queries of the largest difference of two scores, in nats


def score_rankings(rows: Sequence[RankedTexts], scores: Sequence[float]) -> RankingScores:
    """Score the order of the documents of rows.

    Args:
        scores: of all documents of the rows, in their order. Larger means more relevant.
    """
    of_queries: dict[int, dict[int, tuple[float, float]]] = {}  # by query and document: score and target
    given = iter(scores)
    for row in rows:
        documents = of_queries.setdefault(row.query, {})
        for document, target in zip(row.documents, row.targets, strict=True):
            score = next(given)
            known = documents.get(document, (score, target))
            documents[document] = score, max(target, known[1])
    pairs = [np.array(list(documents.values())) for documents in of_queries.values()]
    every = np.concatenate(pairs)
    several = [one for one in pairs if len(one) > 1] or [every]
    spread = float(np.mean([np.ptp(one[:, 0]) for one in several]))
    counted = [one for one in pairs if np.ptp(one[:, 1]) > 0]
    if not np.ptp(every[:, 1]):
        return RankingScores({}, {}, len(every), 0, spread)
    if not counted:
        value, interval = spearman(*every.T), resampled_spearman(*every.T)
        return RankingScores(
            {"spearman": value}, {"spearman": interval}, len(every), 0, spread, of_queries={"spearman": every.T}
        )
    ranked = [one[np.lexsort((one[:, 1], -one[:, 0])), 1] for one in counted]  # targets in the order of the scores
    of_each = {
        "mrr@10": np.array([_reciprocal_rank(targets) for targets in ranked]),
        "ndcg@10": np.array([_ndcg(targets) for targets in ranked]),
    }
    return RankingScores(
        {name: float(values.mean()) for name, values in of_each.items()},
        {name: resampled_mean(values) for name, values in of_each.items()},
        len(counted),
        sum(map(len, counted)) / len(counted),
        spread,
        chance={"ndcg@10": float(np.mean([_random_ndcg(targets) for targets in ranked]))},
        of_queries=of_each,
    )


def _reciprocal_rank(targets: Floats) -> float:
    relevant = np.flatnonzero(targets[:DEPTH] > 0)
    return 1 / float(relevant[0] + 1) if len(relevant) else 0.0


def _random_ndcg(targets: Floats) -> float:
    """Return the mean of `_ndcg` over all orders: each rank has the mean gain."""
    gains = targets - min(0.0, float(targets.min()))
    return _dcg(np.full(len(gains), gains.mean())) / _dcg(-np.sort(-gains))


def _dcg(gains: Floats) -> float:
    return float((gains[:DEPTH] / np.log2(np.arange(min(len(gains), DEPTH)) + 2)).sum())


def _ndcg(targets: Floats) -> float:
    gains = targets - min(0.0, float(targets.min()))
    return _dcg(gains) / _dcg(-np.sort(-gains))
