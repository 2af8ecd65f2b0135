"""Results of label rows and of decisions in words: accuracy with its interval, and that of the most frequent answer.

The loss of such rows falls as soon as the model knows the form of the answers. A run has helped only if its answers are
better than those of the base model and than one constant answer, by more than the luck of few rows explains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from backhand.runs.row_changes import ROW_CONSTANT_SCORES, ROW_SCORES, Verdict, gain_verdict, share_gain, unpaired_gain
from backhand.runs.summary import LabelFigures
from backhand.words import count_of, interval_text, name_list, share_interval, shorten, signed


def most_frequent(per_label: Mapping[str, Mapping[str, Any]]) -> tuple[str, float]:
    """Return the most frequent true label, and the share of rows that have it: the accuracy of a constant answer."""
    label = max(per_label, key=lambda name: per_label[name]["support"], default="")
    rows = sum(one["support"] for one in per_label.values())
    return label, per_label[label]["support"] / rows if rows else 0.0


def constant_answer(per_label: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a clause about the accuracy of always giving the most frequent label."""
    label, share = most_frequent(per_label)
    return f"always answering {shorten(label)!r}, the most frequent of these rows, is right in {share:.1%}"


class Accuracies(NamedTuple):
    """Shares of right answers to the same rows, and the adapter's gains with their 95 % intervals."""

    base: float
    adapted: float
    constant: float  # of the most frequent answer
    rows: int
    # gains over the base and over the most frequent answer, see `row_changes.share_gain`
    gain: Sequence[float]
    gain_over_constant: Sequence[float]

    @classmethod
    def of(cls, base: float, adapted: Mapping[str, Any], constant: float, rows: int) -> Accuracies:
        """Return the shares. Figures without gains, as of earlier versions, have the difference of both intervals.

        Args:
            base: accuracy of the base model.
            adapted: the figures of the adapter.
            constant: accuracy of the most frequent answer.
            rows: number of rows measured.
        """
        after = adapted["accuracy"]
        gains = (
            adapted.get(name) or unpaired_gain(before, share_interval(before, rows), after, share_interval(after, rows))
            for name, before in (("gain", base), ("gain_over_constant", constant))
        )
        return cls(base, after, constant, rows, *gains)


def accuracies_of_labels(base: LabelFigures, adapted: LabelFigures, rows: int) -> Accuracies:
    """Return the shares of the scores in summary.json."""
    return Accuracies.of(base["accuracy"], adapted, most_frequent(adapted["per_label"])[1], rows)


def label_verdict(shares: Accuracies) -> Verdict:
    """Judge whether an adapter's labels are better than the base model's and than a constant answer.

    `helped` or `hurt` only if the 95 % intervals of the gains do not contain 0.
    """
    verdict = gain_verdict(shares.gain)
    return "unclear" if verdict == "helped" and gain_verdict(shares.gain_over_constant) != "helped" else verdict


def verdict_words(shares: Accuracies, before: str = "the base model") -> str:
    """Return `label_verdict` in words: which gains are clear and which are not, with their intervals.

    Args:
        before: name of the model that `shares.base` is the accuracy of.
    """
    if label_verdict(shares) == "hurt":
        return f"{before} is better"
    clear, unclear = list[str](), list[str]()
    for name, gains in ((before, shares.gain), ("a constant answer", shares.gain_over_constant)):
        gain, low, high = (100 * one for one in gains)
        words = f"{name} ({gain:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})"
        (clear if low > 0 else unclear).append(words)
    better = f"that is clearly better than {' and '.join(clear)}"
    if not unclear:
        return better
    others = " or ".join(unclear)
    rows, higher = shares.rows, shares.adapted > max(shares.base, shares.constant)
    too_few = f"; {count_of(rows, 'row')} {'is' if rows == 1 else 'are'} too few to be sure" if higher else ""
    return (
        f"{better}, but not clearly better than {others}{too_few}"
        if clear
        else f"that is not clearly better than {others}{too_few}"
    )


_MORE_ROWS = 4
"""Factor of held-out rows that a user can still be asked for."""


def lacks_held_out_rows(shares: Accuracies) -> bool:
    """Return True if only the number of held-out rows prevents a clear verdict on an adapter's labels.

    Either no adapter could be clearly better on these rows, or the same accuracies would be clear on more rows. The
    intervals of more rows are narrower by the root of their factor.
    """
    before = round(max(shares.base, shares.constant) * shares.rows)
    if label_verdict(shares) != "unclear" or before == shares.rows:
        return False
    at_best = share_gain([1.0] * before + [0.0] * (shares.rows - before), [1.0] * shares.rows)
    return at_best[1] <= 0 or all(map(is_clear_on_more_rows, (shares.gain, shares.gain_over_constant)))


def is_clear_on_more_rows(change: Sequence[float]) -> bool:
    """Return True if the same gain with its interval would not contain 0 on more rows that a user can be asked for."""
    gain, low, _ = change
    return gain - (gain - low) / math.sqrt(_MORE_ROWS) > 0


def label_clause(base: LabelFigures, adapted: LabelFigures, rows: int, before_it: str = "the base model") -> str:
    """Return a clause about the accuracy of both models, their intervals, and a constant answer."""
    before, after = (f"{one['accuracy']:.1%} ({interval_text(one['accuracy'], rows)})" for one in (base, adapted))
    verdict = verdict_words(accuracies_of_labels(base, adapted, rows), before_it)
    missing = never_given(adapted.get("confusion", {}))
    return (
        f"the accuracy by the most probable of {len(adapted['per_label'])} labels went from {before} to {after}, "
        f"macro F1 from {base['f1_macro']:.3f} to {adapted['f1_macro']:.3f}; "
        f"{constant_answer(adapted['per_label'])}: {verdict}{'; ' * bool(missing)}{missing}"
    )


def decisions_verdict(
    base: Mapping[str, Mapping[str, Any]], adapted: Mapping[str, Mapping[str, Any]]
) -> Verdict | None:
    """Return the verdict on the answers to all questions, or None if no question was measured with both models.

    A run that helped with one question and hurt another one is `unclear`.
    """
    verdicts = {label_verdict(shares) for shares in decision_shares(base, adapted)}
    if not verdicts:
        return None
    clear = verdicts - {"unclear"}
    return clear.pop() if len(clear) == 1 else "unclear"


def recorded_decisions(
    evaluation: Mapping[str, Any], first: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Return rows, accuracy, majority and gains of each question from a line of metrics.jsonl; empty in older files.

    Args:
        evaluation: the line.
        first: the line of step 0, for gains, which are left out without it.
    """
    names = [key.removeprefix("eval_majority/") for key in evaluation if key.startswith("eval_majority/")]
    keys = {"rows": "answers", "accuracy": "accuracy", "majority": "majority"}
    figures = {name: {key: evaluation[f"eval_{kind}/{name}"] for key, kind in keys.items()} for name in names}
    end = 0
    for one in figures.values():
        begin, end = end, end + int(one["rows"])
        one |= recorded_gains(evaluation, first, slice(begin, end))
    return figures


def recorded_gains(
    evaluation: Mapping[str, Any], first: Mapping[str, Any], answers: slice = slice(None)
) -> dict[str, tuple[float, float, float]]:
    """Return the gains of some answers over those of step 0 and over the most frequent one; empty if not recorded."""
    after, before, constant = (
        line.get(key, ())[answers]
        for line, key in ((evaluation, ROW_SCORES), (first, ROW_SCORES), (first, ROW_CONSTANT_SCORES))
    )
    if not after or not len(after) == len(before) == len(constant):
        return {}
    return {"gain": share_gain(before, after), "gain_over_constant": share_gain(constant, after)}


def decision_shares(
    base: Mapping[str, Mapping[str, Any]], adapted: Mapping[str, Mapping[str, Any]]
) -> list[Accuracies]:
    """Return the shares of each question that was measured with both models."""
    return [
        Accuracies.of(base[name]["accuracy"], one, one["majority"], int(one["rows"]))
        for name, one in adapted.items()
        if name in base
    ]


def soft_target_words(figures: Mapping[str, Any]) -> str:
    """Return a clause about the highest accuracy and the lowest loss that soft targets allow, or "" for certain ones.

    Args:
        figures: as in `DecisionFigures`.
    """
    ceiling, floor = figures.get("ceiling", 1.0), figures.get("nll_floor", 0.0)
    if ceiling == 1:
        return ""
    return (
        f"the answers are probabilities: a decision counts as right by the probability of its option, so that at most "
        f"{ceiling:.1%} can be right, and the lowest possible loss is {floor:.4f}"
    )


def constant_loss_words(figures: Mapping[str, Any]) -> str:
    """Return a clause about the loss, and that of always giving the answers' shares, or "" if it is not known.

    Args:
        figures: as in `DecisionFigures`.
    """
    if (constant := figures.get("constant_nll")) is None:
        return ""
    rows = "these" if figures.get("majority_answer") is None else "the training"
    words = f"the loss is {figures['nll']:.4f}, and {constant:.4f} by always giving the answers' shares of {rows} rows"
    if (change := figures.get("nll_change")) is None:
        return words
    mean, low, high = (signed(value, 4) for value in change)
    return f"{words} (difference {mean}, 95 % interval {low} to {high})"


def never_given(confusion: Mapping[str, Mapping[str, int]]) -> str:
    """Return a clause about the answers that rows have and a model never gives, or "" without any.

    Args:
        confusion: number of rows by right answer, then by given one.
    """
    given = {answer for row in confusion.values() for answer, count in row.items() if count}
    rows = {answer: sum(row.values()) for answer, row in confusion.items() if answer not in given}
    missing = [f"{shorten(answer)!r} ({count_of(count, 'row')})" for answer, count in rows.items() if count]
    return f"never given: {name_list(missing, limit=3)}" if missing and len(given) > 1 else ""


def tie_words(ties: str) -> str:
    """Return a clause about decisions of equally probable options.

    Args:
        ties: their number per question, in words.
    """
    return f"the two most probable answers are equal: {ties}; the first one is given"


def _constant_name(figures: Mapping[str, Any]) -> str:
    if (answer := figures.get("majority_answer")) is None:
        return "the most frequent answer"
    return f"always answering {shorten(answer)!r}, the most frequent answer of the training rows"


def decision_clause(
    name: str, base: Mapping[str, Any] | None, adapted: Mapping[str, Any], before_it: str = "the base model"
) -> str:
    """Return a clause about the held-out answers to a question: accuracy, verdict and, at the end, calibration."""
    rows, right = int(adapted["rows"]), adapted["accuracy"]
    if adapted.get("constant"):
        answered = f"{rows:,} held-out rows with a known one"
        return f"{name}: the adapter gives the same answer to all {answered}; it decides nothing"
    before = "" if base is None else f"{base['accuracy']:.1%} → "
    verdict = ""
    if base is not None:
        (shares,) = decision_shares({name: base}, {name: adapted})
        verdict = f": {verdict_words(shares, before_it)}"
    soft = soft_target_words(adapted)
    clause = (
        f"{name}: {before}{right:.1%} of {count_of(rows, 'held-out answer')} right ({interval_text(right, rows)}; "
        f"{adapted['majority']:.1%} by {_constant_name(adapted)}){verdict}{'; ' * bool(soft)}{soft}"
    )
    ties = tie_words(count_of(adapted["ties"], "row")) if adapted.get("ties") else ""
    more = [constant_loss_words(adapted), never_given(adapted.get("confusion", {})), ties]
    clause = "; ".join([clause, *filter(None, more)])
    if "ece" not in adapted:
        return clause
    low, high = adapted["ece_interval"]
    return (
        f"{clause}; calibration error {adapted['ece']:.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}) on the same answers, which also fitted the temperature "
        f"{adapted['temperature']:.2f}"
    )
