"""Scores of vectors on held-out rows: retrieval of positives, or the rank correlation with given scores.

Retrieval ranks all different candidates (positives and hard negatives) of the rows by their cosine with each different
anchor. The relevant candidates of an anchor are its positives in all rows, or all other texts with its label.

    recall@k   share of the relevant candidates among the first k        MRR@10   1 / rank of the first relevant one
    nDCG@10    Σ_{relevant ranks r ≤ 10} 1 / log2(r + 1), divided by the largest possible sum

MRR@10 is 0 if no relevant candidate is among the first 10. Each score is a mean over anchors. These are the definitions
of InformationRetrievalEvaluator of sentence-transformers. Spearman's correlation is that of the ranks of cosines and
scores, where equal values have their mean rank.

A random order of the N candidates of an anchor, R of which are relevant, has on average (`_chance`)

    recall@k   min(k, N) / N                      MRR@10   Σ_{r ≤ 10} 1 / r · P(the first relevant one has rank r)
    nDCG@10    R / N · Σ_{r ≤ min(10, N)} 1 / log2(r + 1), divided by the largest possible sum

The intervals contain 95 % of the values of resampled rows, or are Wilson's where resampling cannot show how much other
rows differ (`resampled_mean`). Two models are compared by the changes of each query (`changes`), which differ less than
the queries do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backhand.data.rows import TextIdentities
from backhand.ops.info_nce import BLOCK_SCORES
from backhand.ops.normalize import normalize_forward
from backhand.runs.row_changes import SCORE_NAMES, query_gain, row_scores, unpaired_gain
from backhand.words import count_of, share_interval

Floats = npt.NDArray[np.float64]
RESAMPLES, DEPTH = 1000, 10


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of one model on the same rows."""

    values: dict[str, float]  # by name, see `SCORE_NAMES`
    intervals: dict[str, tuple[float, float]]  # of each value
    queries: int  # number of different anchors or of queries that count, or of pairs
    candidates: float  # number of different candidates, or mean number of documents of a query; 0 for pairs
    chance: dict[str, float] = field(default_factory=dict, kw_only=True)  # of values, in a random order, if known
    of_queries: dict[str, Floats] = field(default_factory=dict, repr=False, kw_only=True)  # by name, see `changes`

    def to_json(self, base: RetrievalScores | None = None) -> dict[str, Any]:
        """Return the scores as JSON values, with their `changes` from those of the base model if it is given."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        others = {name: value for name, value in vars(self).items() if name not in ("values", "of_queries")}
        change = {} if base is None else {"change": changes(base.of_queries, self.of_queries)}
        return {**self.values, **others, "intervals": intervals, **change}


@dataclass(frozen=True)
class VectorScores(RetrievalScores):
    """Scores of the vectors of one model: recall@1, recall@10, mrr@10 and ndcg@10, or spearman."""

    mean_cosine: float  # of different texts


def with_changes(scores: Mapping[str, RetrievalScores]) -> dict[str, dict[str, Any]]:
    """Return the scores of models as JSON values, each with its changes from those of the model before."""
    before = (None, *scores.values())
    return {name: one.to_json(base) for (name, one), base in zip(scores.items(), before, strict=False)}


def summary_scores(scores: Mapping[str, RetrievalScores]) -> dict[str, Any]:
    """Return the fields of summary.json of the models `base`, if it has scores, and `adapted`."""
    fields = {f"{name}_retrieval": one for name, one in with_changes(scores).items()}
    return {**fields, "row_scores": row_scores(scores["adapted"].of_queries.get("ndcg@10", ()))}


def score_vectors(rows: Sequence[TextIdentities], embeddings: Tensor) -> VectorScores:
    """Score the vectors of rows.

    Args:
        embeddings: (documents, hidden), the vectors of all texts of the rows, in their order.
    """
    units = normalize_forward(embeddings)[0]
    firsts: tuple[dict[int, int], dict[int, int]] = {}, {}  # place of the first occurrence as an anchor, as a candidate
    place = 0
    for row in rows:
        for number, text in enumerate(row.texts):
            firsts[number > 0].setdefault(text, place)
            place += 1
    of_texts = units[list((firsts[1] | firsts[0]).values())]
    if rows[0].score is not None:
        cosines = (units[::2] * units[1::2]).sum(1).double().numpy()
        given = np.array([row.score for row in rows], dtype=np.float64)
        value, interval = spearman(cosines, given), resampled_spearman(cosines, given)
        pairs = {"spearman": np.stack((cosines, given))}
        return VectorScores(
            {"spearman": value}, {"spearman": interval}, len(rows), 0, mean_cosine(of_texts), of_queries=pairs
        )
    corpus = list(firsts[1])
    column_of = {text: column for column, text in enumerate(corpus)}
    queries, candidates = (units[list(first.values())] for first in firsts)
    own = {number: column_of[text] for number, text in enumerate(firsts[0]) if text in column_of}
    relevant, labelled = _relevant_columns(rows, column_of), rows[0].label is not None
    ranked = list(_ranks(queries, candidates, relevant, own, labelled=labelled))
    of_each = np.array([[score(ranks) for score in _SCORES.values()] for ranks, _ in ranked])
    of_queries = dict(zip(_SCORES, of_each.T, strict=True))
    sizes = Counter((len(ranks), count) for ranks, count in ranked)
    chance = np.sum([_chance(*size) * times for size, times in sizes.items()], axis=0) / len(ranked)
    return VectorScores(
        {name: float(scores.mean()) for name, scores in of_queries.items()},
        {name: resampled_mean(scores) for name, scores in of_queries.items()},
        len(firsts[0]),
        len(corpus),
        mean_cosine(of_texts),
        chance=dict(zip(_SCORES, chance.tolist(), strict=True)),
        of_queries=of_queries,
    )


def scores_text(scores: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> str:
    """Return the scores of `to_json` in words, with their intervals.

    Args:
        base: the scores of the base model, which come first; None without them.
    """
    if not scores["intervals"]:
        return "no score, since all documents are equally relevant"
    parts: list[str] = []
    for name, shown in SCORE_NAMES.items():
        if name in scores:
            low, high = scores["intervals"][name]
            before = "" if base is None else f"{base[name]:.3f} → "
            chance = scores.get("chance", {}).get(name)
            random = "" if chance is None else f"; {chance:.3f} in random order"
            interval = f"{'' if parts else '95 % interval '}{low:.3f} to {high:.3f}"
            parts.append(f"{shown} {before}{scores[name]:.3f} ({interval}{random})")
    of_what = f"{count_of(scores['queries'], 'pair')} with scores"
    if scores["candidates"] and "spread" in scores:
        documents = f"with {scores['candidates']:.1f} documents of different relevance on average"
        of_what = f"{scores['queries']:,} {'query' if scores['queries'] == 1 else 'queries'} {documents}"
    elif scores["candidates"]:
        of_what = f"{count_of(scores['queries'], 'anchor')} among {scores['candidates']:,} candidates"
    return f"{', '.join(parts)} of {of_what}"


def _relevant_columns(rows: Sequence[TextIdentities], column_of: Mapping[int, int]) -> list[Tensor]:
    """Return the columns of the relevant candidates of each different anchor. Anchors with a label share a tensor."""
    columns, key_of = defaultdict[int, dict[int, None]](dict), dict[int, int]()
    for row in rows:
        key = key_of.setdefault(row.texts[0], row.texts[0] if row.label is None else row.label)
        columns[key][column_of[row.texts[1]]] = None
    shared = {key: torch.tensor(list(found)) for key, found in columns.items()}
    return [shared[key] for key in key_of.values()]


def _ranks(
    queries: Tensor, candidates: Tensor, relevant: Sequence[Tensor], own: Mapping[int, int], *, labelled: bool
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Yield the ranks of the relevant candidates of each query, ascending from 1, and the number of ranked candidates.

    Ranks after `DEPTH` are all `DEPTH` + 1, since no score tells them apart. A candidate with the text of the query
    itself is not ranked, unless the text is its own positive.

    Args:
        relevant: the columns of the relevant candidates of each query.
        own: the column of the query's own text, by query.
        labelled: queries are relevant for themselves only because they have their label.
    """
    size = max(1, BLOCK_SCORES // max(1, len(candidates)))
    for start in range(0, len(queries), size):
        scores, found, counts = queries[start : start + size] @ candidates.T, [], []
        for number, of_query in enumerate(scores, start):
            columns, mine, count = relevant[number], own.get(number), len(candidates)
            if mine is not None and (labelled or not (columns == mine).any()):
                columns, of_query[mine], count = columns[columns != mine], -torch.inf, count - 1
            found.append(of_query[columns])
            counts.append(count)
        best = scores.topk(min(DEPTH, len(candidates)), dim=1).values
        for of_relevant, highest, count in zip(found, best, counts, strict=True):
            above = (highest[None] > of_relevant[:, None]).sum(1)
            ranks = torch.where(of_relevant >= highest[-1], above + 1, DEPTH + 1)
            yield np.sort(ranks.numpy()), count


def _recall(depth: int) -> Any:
    return lambda ranks: float((ranks <= depth).mean())


def _reciprocal_rank(ranks: npt.NDArray[np.int64]) -> float:
    return 1 / float(ranks[0]) if ranks[0] <= DEPTH else 0.0


def _ndcg(ranks: npt.NDArray[np.int64]) -> float:
    best = 1 / np.log2(np.arange(min(len(ranks), DEPTH)) + 2)
    return float((1 / np.log2(ranks[ranks <= DEPTH] + 1)).sum() / best.sum())


def _chance(relevant: int, candidates: int) -> Floats:
    """Return the mean of each of `_SCORES` over all orders of the candidates."""
    depth = min(DEPTH, candidates)
    discounts = 1 / np.log2(np.arange(depth) + 2)
    none_before, reciprocal = 1.0, 0.0  # probability that no relevant candidate has a lower rank
    for before in range(depth):
        first = none_before * relevant / (candidates - before)
        none_before -= first
        reciprocal += first / (before + 1)
    gain = relevant / candidates * float(discounts.sum() / discounts[: min(relevant, DEPTH)].sum())
    return np.array([1 / candidates, depth / candidates, reciprocal, gain])


_SCORES = {"recall@1": _recall(1), "recall@10": _recall(DEPTH), "mrr@10": _reciprocal_rank, "ndcg@10": _ndcg}


def mean_cosine(units: Tensor) -> float:
    """Return the mean cosine of different vectors, which is near 1 if all of them are alike."""
    count = len(units)
    squares = float(units.sum(0, dtype=torch.float64).square().sum())
    return (squares - count) / max(1, count * (count - 1))


def spearman(one: Floats, other: Floats) -> float:
    """Return the correlation of the ranks, 0 if all values of a side are equal."""
    first, second = (_mean_ranks(values) for values in (one, other))
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size else 0.0


def _mean_ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray(ends - (counts - 1) / 2)[inverse]


def _draws(count: int) -> list[npt.NDArray[np.int64]]:
    draw = np.random.Generator(np.random.Philox(0))
    return [draw.integers(count, size=count) for _ in range(RESAMPLES)]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


_EQUAL = 1e-9
"""Values that differ by less are equal apart from rounding."""


def resampled_mean(scores: Floats) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values from 0 to 1: the means of resampled values.

    Resampling equal values would give an interval of width 0. Wilson's interval is taken if all values are 0 or 1,
    which are shares, or if all are equal. The latter is a bound: of all distributions on [0, 1] with a mean m, that of
    zeros and ones has the largest variance, m (1 - m) (Bhatia and Davis, American Mathematical Monthly 107, 2000).
    """
    if bool((np.minimum(scores, 1 - scores) < _EQUAL).all()) or np.ptp(scores) < _EQUAL:
        return share_interval(float(scores.mean()), len(scores))
    return _interval([float(scores[pick].mean()) for pick in _draws(len(scores))])


def resampled(score: Callable[[Floats, Floats], float], one: Floats, other: Floats) -> tuple[float, float]:
    """Return the interval that contains 95 % of the scores of resampled pairs."""
    return _interval([score(one[pick], other[pick]) for pick in _draws(len(one))])


def resampled_spearman(one: Floats, other: Floats) -> tuple[float, float]:
    """Return the 95 % interval of the correlation: the correlations of resampled pairs.

    If all of these are equal, it is twice Wilson's interval of (1 + correlation) / 2 as a share of n / 2 disjoint and
    so independent pairs of rows that are in the same order on both sides, minus 1.
    """
    low, high = resampled(spearman, one, other)
    if high - low >= _EQUAL:
        return low, high
    low, high = share_interval((1 + spearman(one, other)) / 2, len(one) // 2)
    return 2 * low - 1, 2 * high - 1


def changes(base: Mapping[str, Floats], adapted: Mapping[str, Floats]) -> dict[str, list[float]]:
    """Return the change of each score and its 95 % interval over the queries, which are the same for both models.

    Args:
        base, adapted: the values of a score, (queries,); of `spearman`, both sides of the pairs, (2, pairs).

    Returns:
        by name change, low and high; empty for a single query.
    """
    gains = {
        name: _spearman_gain(base[name], after)
        if name == "spearman"
        else query_gain(base[name].tolist(), after.tolist())
        for name, after in adapted.items()
    }
    return {name: list(gain) for name, gain in gains.items() if gain is not None}


def _spearman_gain(before: Floats, after: Floats) -> tuple[float, float, float] | None:
    """Return the change of a correlation and the interval that contains 95 % of its changes in resampled pairs.

    If all of these are equal, resampling cannot show how much other pairs differ. The interval is then the difference
    of both intervals.
    """
    if after.shape[1] < 2:
        return None
    old, new = spearman(*before), spearman(*after)
    draws = [spearman(*after[:, pick]) - spearman(*before[:, pick]) for pick in _draws(after.shape[1])]
    low, high = _interval(draws)
    if high - low < _EQUAL <= abs(new - old):
        return unpaired_gain(old, resampled_spearman(*before), new, resampled_spearman(*after))
    return new - old, low, high
