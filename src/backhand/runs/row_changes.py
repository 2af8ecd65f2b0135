"""Changes on held-out rows between two evaluations: reward, loss and scores, with their intervals and in words.

An evaluation records its values per row in metrics.jsonl, always in the same order. The changes are therefore paired.
So are those of right answers and of the scores of vectors and rankings, which are compared at the end of a run. An
evaluation of decisions or classes records these scores, so that a run without an end is judged in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from backhand.words import mean_interval, signed

ROW_REWARDS, ROW_NATS, ROW_TOKENS = "row_rewards", "row_nats", "row_tokens"
"""Keys in metrics.jsonl of the values of an evaluation, one per held-out row: the reward; the sum of the losses of the
row's supervised tokens, and their number, which only the line of step 0 has."""
ROW_SCORES, ROW_CONSTANT_SCORES = "row_scores", "row_constant_scores"
"""Keys of the scores of decisions, one question after another, or of the answers of a head, as in `RunSummary`; and of
those of the best constant answers, which only the line of step 0 has."""
FEWEST_ROWS = 16
"""On fewer held-out rows, the course of a loss is mostly chance, unless they have many tokens."""
MOST_RECORDED = 2000
"""Number of held-out rows up to which a run records their values; the intervals of more rows are narrow."""
_TOO_FEW = ": too few rows to be sure of the change"


def mean_gain(base: Sequence[float], adapted: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the mean gain per row or query and its 95 % interval, or None for fewer than two of them."""
    if len(base) < 2 or len(base) != len(adapted):
        return None
    return mean_interval([after - before for before, after in zip(base, adapted, strict=True)])


def query_gain(base: Sequence[float], adapted: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the `mean_gain` of scores from 0 to 1. If no query changed, others may: the interval is `share_gain`'s."""
    gain = mean_gain(base, adapted)
    return gain if gain is None or any(gain) else share_gain(base, adapted)


def share_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return the gain in the share of right answers to the same rows, and its 95 % interval.

    Two rows are added, one that only became right and one that only became wrong. The interval is the `mean_interval`
    of all changes, cut to those that are possible. These are the limits of Bonett and Price, with Student's quantile
    instead of the normal one [Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data, doi:10.3102/1076998611411915]. They are proper limits even if no row changed, or if all of them did.
    For 3 to 100 rows, they contain the true gain in at least 93 % of draws.

    Args:
        before, after: a value from 0 (wrong) to 1 (right) for each row, at least one.
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    _, low, high = mean_interval([*changes, 1.0, -1.0])
    return fmean(changes), max(-1.0, low), min(1.0, high)


def row_scores(values: Iterable[float]) -> tuple[float, ...]:
    """Return the scores for summary.json, or an empty tuple if there are more than `MOST_RECORDED` of them."""
    scores = tuple(round(float(value), 6) for value in values)
    return scores if len(scores) <= MOST_RECORDED else ()


def unpaired_gain(
    before: float, of_before: Sequence[float], after: float, of_after: Sequence[float]
) -> tuple[float, float, float]:
    """Return the gain in a score and the difference of both 95 % intervals, for rows whose values are not recorded."""
    return after - before, of_after[0] - of_before[1], of_after[1] - of_before[0]


def recorded_gain(records: Iterable[Mapping[str, Any]], best_step: int | None) -> tuple[float, float, float] | None:
    """Return the `mean_gain` of reward from the first evaluation to the best one, or None if either was not recorded.

    Args:
        records: lines of metrics.jsonl.
        best_step: the step whose adapter is kept.
    """
    first, best = first_and_best(records, ROW_REWARDS, best_step)
    return mean_gain(first, best)


def first_and_best(
    records: Iterable[Mapping[str, Any]], key: str, best_step: int | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the values per row before the first step and at the best one; empty where they were not recorded."""
    values = {line["step"]: line[key] for line in records if key in line}
    return values.get(0, ()), () if best_step is None else values.get(best_step, ())


def loss_change(
    base: Sequence[float], adapted: Sequence[float], tokens: Sequence[float]
) -> tuple[float, float, float] | None:
    """Return the change of the loss per token and its 95 % interval, or None for fewer than two rows.

    The loss is a mean of tokens, and rows are the independent samples. The interval is that of a ratio: the change of a
    row's nats, less its tokens times the mean change.

    Args:
        base, adapted: sum of the losses of each row's supervised tokens.
        tokens: number of supervised tokens of each row.
    """
    if len(base) < 2 or not len(base) == len(adapted) == len(tokens):
        return None
    mean, per_row = (sum(adapted) - sum(base)) / sum(tokens), sum(tokens) / len(tokens)
    rows = zip(base, adapted, tokens, strict=True)
    return mean_interval([mean + (after - before - count * mean) / per_row for before, after, count in rows])


def recorded_loss_change(
    records: Sequence[Mapping[str, Any]], best_step: int | None
) -> tuple[float, float, float] | None:
    """Return the `loss_change` from the first evaluation to the best one, see `recorded_gain`."""
    return loss_change(*first_and_best(records, ROW_NATS, best_step), first_and_best(records, ROW_TOKENS, best_step)[0])


def recorded_rise(records: Sequence[Mapping[str, Any]], best_step: int | None) -> tuple[float, float, float] | None:
    """Return the `loss_change` from the best evaluation to the last one, or that of the scores if these were recorded.

    It is None if neither was recorded, or the last evaluation is the best one.
    """
    last_step = max((line["step"] for line in records if "eval_loss" in line), default=None)
    if last_step == best_step:
        return None

    def best_and_last(key: str) -> tuple[Sequence[float], Sequence[float]]:
        return first_and_best(records, key, best_step)[1], first_and_best(records, key, last_step)[1]

    gain = mean_gain(*best_and_last(ROW_SCORES))
    tokens = first_and_best(records, ROW_TOKENS, best_step)[0]
    return loss_change(*best_and_last(ROW_NATS), tokens=tokens) or (gain and as_loss(gain))


Verdict = Literal["helped", "hurt", "unclear"]


def effect(verdict: str, unclear: str = "") -> str:
    """Return a verdict as the end of a clause about a change. One that is not clear has the words `unclear`."""
    return {"helped": ", so it helped", "hurt": ", so it did not help"}.get(verdict, unclear)


_RISEN = 0.03
"""A rise of the held-out loss above this share of it is more than noise. Better scores are then no clear success."""
UNCLEAR_RISE = "; the held-out loss rose, so it is not clear whether it helped"


def has_risen(before: float | None, after: float | None) -> bool:
    """Return True if the held-out loss rose so much that better scores are no clear success."""
    return before is not None and after is not None and after > before + _RISEN * abs(before)


def as_loss(gain: Sequence[float]) -> tuple[float, float, float]:
    """Convert the gain of a score to the change of a loss, which is the negative of the score, or the reverse."""
    mean, low, high = gain
    return -mean, -high, -low


def loss_verdict(change: Sequence[float]) -> Verdict:
    """Judge a `loss_change`: `helped` or `hurt` only if its interval does not contain 0."""
    return gain_verdict(as_loss(change))


def loss_words(change: Sequence[float], unit: str) -> str:
    """Return a clause about a `loss_change`."""
    if not any(change):
        return "the loss of no row changed"
    mean, low, high = (signed(value, 4) for value in change)
    unclear = _TOO_FEW if loss_verdict(change) == "unclear" else ""
    return f"loss changed by {mean} {unit} (95 % interval {low} to {high}){unclear}"


def gain_verdict(gain: Sequence[float] | None) -> Verdict:
    """Judge a `mean_gain`: `helped` or `hurt` only if its interval does not contain 0."""
    if gain is None or gain[1] <= 0 <= gain[2]:
        return "unclear"
    return "helped" if gain[1] > 0 else "hurt"


def right_words(gain: Sequence[float], before: str) -> str:
    """Return a clause about a `share_gain` over the model `before`."""
    mean, low, high = (signed(100 * value, 1) for value in gain)
    unclear = _TOO_FEW if gain_verdict(gain) == "unclear" else ""
    return f"right answers changed by {mean} points from {before} (95 % interval {low} to {high}){unclear}"


def gain_words(gain: Sequence[float] | None) -> str:
    """Return a clause about a `mean_gain` of reward."""
    if gain is None:
        return "too few rows to compare the rewards"
    if not any(gain):
        return "the reward of no held-out row changed"
    mean, low, high = gain
    verdict = _TOO_FEW if gain_verdict(gain) == "unclear" else ""
    return f"reward gained per row {mean:+.4g} (95 % interval {low:+.4g} to {high:+.4g}){verdict}"


SCORE_NAMES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "recall@1": "recall@1",
    "recall@10": "recall@10",
    "spearman": "Spearman",
}
"""Scores of vectors and rankings, in the order of tables."""


def main_score(scores: Mapping[str, Any]) -> str | None:
    """Return the name of the score that decides whether vectors or rankings are better, None if there is none."""
    return next((name for name in ("ndcg@10", "spearman") if name in scores), None)


def score_gain(base: Mapping[str, Any], adapted: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    """Return the gain in a score of vectors or rankings and its 95 % interval over the queries of both models.

    A base without scores of its own ranks in random order. Earlier versions recorded no changes: their gains have the
    difference of both intervals.

    Args:
        base, adapted: the scores in summary.json; base is empty if it has none.

    Returns:
        None if neither the base's score nor that of a random order is known, or on a single query.
    """
    if "change" in adapted:
        gain = adapted["change"].get(name)
        return None if gain is None else tuple(gain)
    before = base.get(name, adapted.get("chance", {}).get(name))
    if before is None:
        return None
    of_before = base["intervals"][name] if base else (before, before)
    return unpaired_gain(before, of_before, adapted[name], adapted["intervals"][name])


def score_verdict(base: Mapping[str, Any], adapted: Mapping[str, Any], name: str) -> Verdict:
    """Judge a `score_gain`. `helped` only if the score is clearly above that of a random order as well."""
    verdict = gain_verdict(score_gain(base, adapted, name))
    return "unclear" if verdict == "helped" and _may_be_random(adapted, name) else verdict


def _may_be_random(scores: Mapping[str, Any], name: str) -> bool:
    chance = scores.get("chance", {}).get(name)
    return chance is not None and scores["intervals"][name][0] <= chance


def score_words(base: Mapping[str, Any], adapted: Mapping[str, Any], name: str) -> str:
    """Return a clause about a `score_gain`."""
    shown, gain = SCORE_NAMES[name], score_gain(base, adapted, name)
    if gain is None:
        return f"too few queries to compare {shown}" if base else f"there is no {shown} before training"
    mean, low, high = (signed(value, 3) for value in gain)
    unclear = _TOO_FEW if gain_verdict(gain) == "unclear" else ""
    if not unclear and score_verdict(base, adapted, name) == "unclear":
        unclear = ": not clearly better than a random order"
    of_what = "changed by" if base else "differs from that of a random order by"
    return f"{shown} {of_what} {mean} (95 % interval {low} to {high}){unclear}"


_FEWEST_COMPARED_STEPS = 20
"""In a shorter run, the first and last tenth are one step each, whose rewards depend on their few prompts."""


def training_reward_words(first: float, last: float, steps: int) -> str:
    """Return a clause about the rewards of sampled answers at the beginning and at the end of a run.

    Args:
        first, last: mean reward in the first and in the last tenth of the steps.
        steps: number of steps of the run.
    """
    if first == last:
        return f"reward of its own answers to training rows {first:.4f}, at first and at last"
    compared = "first and last tenth of the steps, whose prompts differ"
    if steps < _FEWEST_COMPARED_STEPS:
        compared = "first and last step, whose prompts differ: too few to tell a change from chance"
    return f"reward of its own answers to training rows {first:.4f} → {last:.4f} ({compared})"
