r"""Calibration and scores of decisions, per question.

With s_k the score of option k and T the temperature of the question's type, p = softmax(s / T). T minimizes the mean
loss of held-out rows. With β = 1 / T, the loss of a row is convex in β:

    ℓ(β) = τ log Σ_k exp(β s_k) - β Σ_k u_k s_k,   ℓ'(β) = τ Σ_k p_k s_k - Σ_k u_k s_k,   τ = Σ_k t_k

so T follows from the sign change of Σ ℓ' [temperature scaling, arXiv:1706.04599, §4.2]. The same rows choose the best
step, so few of them make the model look too certain, and if all are right, their loss has no minimum. Therefore one of
n + 1 answers counts as drawn from the K options with equal probabilities, as in Platt's targets [Probabilistic outputs
for support vector machines, 1999, §2.2]:

    u_k = (n t_k + τ / K) / (n + 1),   n rows of this type

    accuracy   share of rows whose most probable option is the answer;   for soft targets, the mean of their target
    majority   accuracy of always giving the same answer, the one with the largest mean target of the training rows;
               without training rows, of these rows
    NLL        mean -Σ_k t_k log p_k;   Brier score: mean Σ_k (p_k - t_k)²
    constant   the NLL of always giving each answer its share of the training rows, or without them, of these rows. One
    NLL        more answer counts as drawn from the K options, so that no share is 0
    ceiling    mean max_k t_k / τ, the highest accuracy: 1 without soft targets
    NLL floor  mean -Σ_k t_k log (t_k / τ), the lowest NLL: 0 without soft targets
    ECE        Σ_bins (rows in the bin / rows) |mean confidence - accuracy|, bins with equal numbers of rows

The confidence is the largest probability. The interval of the ECE is that of the basic bootstrap (`_ece_interval`).
Thresholds are of those who decide the most confident rows themselves, and pass the others on to a person.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backhand.data.decisions import DecisionRow, Question, QuestionType
from backhand.loop.label_scores import Gain, RowScores, label_score
from backhand.runs.row_changes import ROW_CONSTANT_SCORES, ROW_SCORES, mean_gain
from backhand.words import share_interval

Floats = npt.NDArray[np.float64]

BINS, RESAMPLES = 10, 1000
_COLDEST, _HOTTEST = 0.25, 4.0
"""Bounds of a temperature. A few held-out rows say little about one that is far from 1."""
_HALVINGS = 60
SURPRISES = 5
WANTED = (0.8, 0.9, 0.95, 0.99)
"""Accuracies for which a threshold of confidence is given."""
_FEWEST_DECIDED = 10
"""Smallest number of rows above a threshold. The accuracy of fewer rows says too little about other rows."""


class Outcome(NamedTuple):
    """The scores of a question of one row."""

    question: Question
    scores: Floats  # log-probability of every option's label, in canonical order
    targets: Floats  # probability of every option, all 0 without an answer
    source: str

    def probabilities(self, temperature: float) -> Floats:
        """Return p of every option."""
        shifted = np.exp((self.scores - self.scores.max()) / temperature)
        return np.asarray(shifted / shifted.sum())


def outcomes_of(rows: Iterable[DecisionRow], sums: Sequence[float]) -> list[Outcome]:
    """Return the outcome of every question of every row. Names of options are left out.

    Args:
        sums: log-probability of the label of every document, in the order of the rows.
    """
    outcomes: list[Outcome] = []
    start = 0
    for row in rows:
        for asked, size in zip(row.asked, row.sizes, strict=True):
            options = len(asked.question.keys)
            targets = np.zeros(options) if asked.targets is None else np.array(asked.targets)
            outcomes.append(Outcome(asked.question, np.array(sums[start : start + options]), targets, row.source))
            start += size
        start += sum(row.name_sizes)
    return outcomes


def fit_temperatures(outcomes: Iterable[Outcome]) -> dict[QuestionType, float]:
    """Return the temperature of each type of question that has an answer."""
    by_type: dict[QuestionType, list[Outcome]] = {}
    for one in outcomes:
        if one.targets.any():
            by_type.setdefault(one.question.type, []).append(one)
    return {kind: _fit(by_type[kind]) for kind in sorted(by_type)}


def _fit(outcomes: Sequence[Outcome]) -> float:
    """Return the temperature within the bounds."""
    rows, low, high = len(outcomes), math.log(1 / _HOTTEST), math.log(1 / _COLDEST)
    smoothed = [one._replace(targets=(rows * one.targets + one.targets.mean()) / (rows + 1)) for one in outcomes]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = math.fsum(_slope(one, math.exp(-middle)) for one in smoothed)
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def _slope(outcome: Outcome, temperature: float) -> float:
    p = outcome.probabilities(temperature)
    return float(((outcome.targets.sum() * p - outcome.targets) * outcome.scores).sum())


@dataclass(frozen=True)
class DecisionScore(RowScores):
    """The scores of one model on the answers to one question."""

    rows: int
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95 % interval
    majority: float
    majority_answer: str | None  # most frequent answer of the training rows; None if it is not known
    f1_macro: float
    nll: float
    brier: float
    ece: float
    ece_interval: tuple[float, float]
    temperature: float  # 1 without calibration
    constant: bool  # True if the model gives the same answer to all rows, although their answers differ
    reliability: list[dict[str, float]]  # per bin: rows, confidence, accuracy
    # per share of rows that the model decides itself, the most confident first: threshold of confidence and accuracy
    coverage: list[dict[str, float]]
    # per wanted accuracy above that of all rows: the lowest confidence to decide at, its coverage and accuracy, and the
    # 95 % interval of this accuracy
    thresholds: list[dict[str, Any]]
    confusion: dict[str, dict[str, int]]  # number of rows by answer, then by decision
    surprises: list[dict[str, Any]]  # the least probable answers: source, answer, decision, probability of the answer
    flips: float | None = None  # share of decisions that change if the options come in a random order
    # the accuracy and the NLL of deciding and predicting the targets themselves, see the module docstring
    ceiling: float = 1.0
    nll_floor: float = 0.0
    constant_nll: float = 0.0  # see the module docstring
    nll_change: Gain | None = None  # of the NLL from `constant_nll`, with its 95 % interval; None for a single row
    ties: int = 0  # number of rows whose two most probable options are equally probable


Counts = Mapping[str, Mapping[str, float]]
"""Sum of the targets of every answer to each question."""


def score_questions(
    outcomes: Iterable[Outcome],
    temperatures: Mapping[QuestionType, float],
    flips: Mapping[str, float] | None = None,
    usual: Counts = MappingProxyType({}),
) -> dict[str, DecisionScore]:
    """Return the scores of every question that has an answer, by its name.

    Args:
        temperatures: of each type; 1 for types without one.
        flips: share of decisions that change under random orders, by question.
        usual: `answer_counts` of the training rows, if known.
    """
    groups = _by_question(outcomes).items()
    return {name: _score(group, temperatures, (flips or {}).get(name), usual.get(name)) for name, group in groups}


def answer_counts(rows: Iterable[DecisionRow]) -> dict[str, Counter[str]]:
    """Return the sum of the targets of every answer to each question, by the question's name."""
    totals: dict[str, Counter[str]] = {}
    for asked in (asked for row in rows for asked in row.asked):
        if asked.targets is not None:
            of_question = totals.setdefault(asked.question.name, Counter[str]())
            of_question.update(dict(zip(asked.question.keys, asked.targets, strict=True)))
    return totals


def question_shares(outcomes: Iterable[Outcome], usual: Counts) -> dict[str, float]:
    """Return the metrics by which a run is judged: answers, accuracy and majority of each question, `NAME/QUESTION`.

    Args:
        usual: as in `score_questions`.
    """
    shares: dict[str, float] = {}
    for name, group in _by_question(outcomes).items():
        hits, constant = _hits(group, usual.get(name))
        shares[f"answers/{name}"] = len(group)
        shares[f"accuracy/{name}"] = float(np.mean(hits))
        shares[f"majority/{name}"] = float(np.mean(constant))
    return shares


def right_answers(outcomes: Iterable[Outcome], usual: Counts) -> dict[str, Tensor]:
    """Return the values per answer of an evaluation, with the names of metrics.jsonl, in the order of the questions.

    Args:
        usual: as in `score_questions`.
    """
    of_questions = [_hits(group, usual.get(name)) for name, group in _by_question(outcomes).items()]
    hits, constant = ([one for question in of_questions for one in question[side]] for side in (0, 1))
    return {ROW_SCORES: torch.tensor(hits), ROW_CONSTANT_SCORES: torch.tensor(constant)}


def _hits(outcomes: Sequence[Outcome], usual: Mapping[str, float] | None) -> tuple[list[float], list[float]]:
    """Return the scores of a question's answers, and those of the most frequent answer."""
    hits = [float(one.targets[one.scores.argmax()] / one.targets.sum()) for one in outcomes]
    return hits, _constant_scores(outcomes, _counts(outcomes) if usual is None else usual)


def _counts(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Return the sum of the shares of every answer in these targets."""
    totals: Counter[str] = Counter()
    for one in outcomes:
        totals.update(dict(zip(one.question.keys, map(float, one.targets / one.targets.sum()), strict=True)))
    return totals


def _most_frequent(counts: Mapping[str, float]) -> str:
    return max(counts, key=counts.__getitem__)


def _constant_scores(outcomes: Sequence[Outcome], counts: Mapping[str, float]) -> list[float]:
    """Return the scores of always giving the most frequent answer."""
    answer = _most_frequent(counts)
    shares = (dict(zip(one.question.keys, one.targets / one.targets.sum(), strict=True)) for one in outcomes)
    return [float(share.get(answer, 0.0)) for share in shares]


def _constant_losses(outcomes: Sequence[Outcome], counts: Mapping[str, float]) -> list[float]:
    """Return the losses of always giving every answer its share of these counts, see the module docstring."""
    losses = []
    for one in outcomes:
        smoothed = np.array([counts.get(key, 0.0) for key in one.question.keys]) + 1 / len(one.question.keys)
        losses.append(-float((one.targets * np.log(smoothed / smoothed.sum())).sum()))
    return losses


def _nll_floor(targets: Floats) -> float:
    """Return the lowest loss, that of p_k = t_k / τ."""
    certain = targets[targets > 0]
    return -float((certain * np.log(certain / certain.sum())).sum())


def _by_question(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes that have an answer, by the name of their question."""
    by_name: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if one.targets.any():
            by_name.setdefault(one.question.name, []).append(one)
    return by_name


def _score(
    outcomes: Sequence[Outcome],
    temperatures: Mapping[QuestionType, float],
    flips: float | None,
    usual: Mapping[str, float] | None,
) -> DecisionScore:
    temperature = temperatures.get(outcomes[0].question.type, 1.0)
    p = [one.probabilities(temperature) for one in outcomes]
    chosen = [int(one.argmax()) for one in p]
    hits = np.array([one.targets[best] / one.targets.sum() for one, best in zip(outcomes, chosen, strict=True)])
    confidence = np.array([one.max() for one in p])
    log_p = [np.log(np.maximum(one, np.finfo(np.float64).tiny)) for one in p]
    right = [one.question.keys[int(one.targets.argmax())] for one in outcomes]
    given = [one.question.keys[best] for one, best in zip(outcomes, chosen, strict=True)]
    keys = dict.fromkeys(key for one in outcomes for key in one.question.keys)
    labels = label_score(right, given, keys, right)
    counts = _counts(outcomes) if usual is None else usual
    constant_scores, constant_losses = _constant_scores(outcomes, counts), _constant_losses(outcomes, counts)
    losses = [-float((one.targets * log).sum()) for one, log in zip(outcomes, log_p, strict=True)]
    return DecisionScore(
        rows=len(outcomes),
        accuracy=float(hits.mean()),
        accuracy_interval=share_interval(float(hits.mean()), len(outcomes)),
        majority=float(np.mean(constant_scores)),
        majority_answer=None if usual is None else _most_frequent(usual),
        f1_macro=labels.f1_macro,
        nll=float(np.mean(losses)),
        brier=float(np.mean([((one - out.targets) ** 2).sum() for one, out in zip(p, outcomes, strict=True)])),
        ece=expected_calibration_error(confidence, hits),
        ece_interval=_ece_interval(confidence, hits),
        temperature=temperature,
        constant=len({*given}) == 1 and len({*right}) > 1,
        reliability=[
            {"rows": len(part), "confidence": float(confidence[part].mean()), "accuracy": float(hits[part].mean())}
            for part in _bins(confidence)
        ],
        coverage=_coverage(confidence, hits),
        thresholds=thresholds(confidence, hits),
        confusion=labels.confusion,
        surprises=_surprises(outcomes, p, right, given),
        flips=flips,
        ceiling=float(np.mean([one.targets.max() / one.targets.sum() for one in outcomes])),
        nll_floor=float(np.mean([_nll_floor(one.targets) for one in outcomes])),
        constant_nll=float(np.mean(constant_losses)),
        nll_change=mean_gain(constant_losses, losses),
        ties=sum(bool(np.ptp(np.sort(one.scores)[-2:]) == 0) for one in outcomes),
        row_scores=hits.tolist(),
        constant_scores=constant_scores,
    )


def _bins(confidence: Floats) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each bin, in ascending order of confidence."""
    order = np.argsort(confidence, kind="stable")
    return [part for part in np.array_split(order, min(BINS, len(order))) if len(part)]


def expected_calibration_error(confidence: Floats, hits: Floats) -> float:
    """Return the ECE with bins of equal numbers of rows."""
    gaps = (confidence - hits)[np.argsort(confidence, kind="stable")]
    return _error_of(np.cumsum(gaps)[_ends(len(gaps)) - 1], len(gaps))


def _ends(rows: int) -> npt.NDArray[np.int64]:
    """Return the number of rows up to the end of each bin."""
    return np.cumsum([len(part) for part in np.array_split(np.arange(rows), min(BINS, rows))])


def _error_of(sums: Floats, rows: int) -> float:
    """Return the ECE of the sums of confidence minus hits over all rows up to the end of each bin."""
    return float(np.abs(np.diff(sums, prepend=0.0)).sum() / rows)


def _ece_interval(confidence: Floats, hits: Floats) -> tuple[float, float]:
    """Return a 95 % interval of the ECE, which contains the measured one.

    Every bin adds the size of its chance error to the ECE, and resampled rows add theirs once more. Their values are
    therefore too large. The basic bootstrap reflects them at the measured ECE: 2 ECE minus each quantile, at least 0
    [Davison and Hinkley, Bootstrap methods and their application, 1997, §5.2.1]. The interval begins at 0 if rows whose
    answers are right with exactly their confidence have such an ECE in 95 % of draws [consistency resampling, Bröcker
    and Smith, doi:10.1175/WAF993.1]. For 21 to 400 drawn rows it contains the true value in 74 to 98 % of draws.

    If all rows are right, or none is, resampled rows are too, and say nothing about other rows. The error is then the
    difference of mean confidence and accuracy, and the accuracy can be anything in its Wilson interval. The interval
    contains these errors as well.
    """
    rows, draw = len(hits), np.random.Generator(np.random.Philox(0))
    order, ends = np.argsort(confidence, kind="stable"), _ends(rows)
    confidence, hits = confidence[order], hits[order]
    gaps, measured = confidence - hits, expected_calibration_error(confidence, hits)

    def resampled() -> float:
        # Rows are drawn as counts, which keeps their order. A bin may end between two copies of the same row.
        counts = np.bincount(draw.integers(rows, size=rows), minlength=rows)
        drawn, sums = np.cumsum(counts), np.cumsum(counts * gaps)
        last = np.searchsorted(drawn, ends)
        return _error_of(sums[last] - (drawn[last] - ends) * gaps[last], rows)

    def calibrated() -> float:
        return _error_of(np.cumsum(confidence - (draw.random(rows) < confidence))[ends - 1], rows)

    least, most = np.quantile([resampled() for _ in range(RESAMPLES)], [0.025, 0.975])
    low, high = min(measured, max(0.0, 2 * measured - most)), max(measured, 2 * measured - least)
    if np.ptp(hits) == 0:
        mean, (least, most) = float(confidence.mean()), share_interval(float(hits.mean()), rows)
        low, high = min(low, max(0.0, least - mean, mean - most)), max(high, most - mean, mean - least)
    elif set(hits.tolist()) == {0.0, 1.0}:
        low = 0.0 if measured <= np.quantile([calibrated() for _ in range(RESAMPLES)], 0.95) else low
    return float(low), float(high)


def _coverage(confidence: Floats, hits: Floats) -> list[dict[str, float]]:
    """Return the points of each tenth of the rows."""
    points = _decided(confidence, hits)
    return [points[last] for last in dict.fromkeys(-(-len(points) * tenth // 10) - 1 for tenth in range(1, 11))]


def thresholds(confidence: Floats, hits: Floats) -> list[dict[str, Any]]:
    """Return the point of the largest coverage for each of the `WANTED` accuracies that rows need a threshold for.

    An accuracy is left out if all rows together reach it, or if no threshold does.
    """
    points = [
        point
        for point, below in zip(_decided(confidence, hits), [*np.sort(confidence)[::-1][1:], 0.0], strict=True)
        if point["threshold"] > below  # rows of equal confidence are decided together
    ][::-1]
    reached = ((wanted, next((one for one in points if one["accuracy"] >= wanted), None)) for wanted in WANTED)
    return [
        {"wanted": wanted, **point, "accuracy_interval": _interval_of(point, len(hits))}
        for wanted, point in reached
        if point is not None and point["coverage"] < 1 and point["coverage"] * len(hits) >= _FEWEST_DECIDED
    ]


def _interval_of(point: Mapping[str, float], rows: int) -> list[float]:
    return [*share_interval(point["accuracy"], round(point["coverage"] * rows))]


def _decided(confidence: Floats, hits: Floats) -> list[dict[str, float]]:
    """Return coverage, threshold and accuracy of the n most confident rows, for each n."""
    order = np.argsort(-confidence, kind="stable")
    counts = np.arange(1, len(order) + 1)
    figures = zip(counts / len(order), confidence[order], np.cumsum(hits[order]) / counts, strict=True)
    return [{"coverage": float(c), "threshold": float(t), "accuracy": float(a)} for c, t, a in figures]


def _surprises(
    outcomes: Sequence[Outcome], p: Sequence[Floats], right: Sequence[str], given: Sequence[str]
) -> list[dict[str, Any]]:
    of_answer = [float((one * out.targets).sum()) for one, out in zip(p, outcomes, strict=True)]
    order = sorted(range(len(outcomes)), key=of_answer.__getitem__)[:SURPRISES]
    return [
        {"source": outcomes[i].source, "answer": right[i], "decision": given[i], "probability": of_answer[i]}
        for i in order
    ]
