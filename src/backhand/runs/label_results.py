"""Results of label rows and of decisions in words: accuracy with its interval, and that of the most frequent answer.

The loss of such rows falls as soon as the model knows the form of the answers. A run has helped only if its answers are
better than those of the base model and than one constant answer, by more than chance explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from backhand.runs.summary import LabelFigures
from backhand.words import changes_separate, count_of, gain_interval, interval_text, shorten


def most_frequent(per_label: Mapping[str, Mapping[str, Any]]) -> tuple[str, float]:
    """Return the most frequent true label, and the share of rows that have it: the accuracy of a constant answer."""
    label = max(per_label, key=lambda name: per_label[name]["support"], default="")
    rows = sum(one["support"] for one in per_label.values())
    return label, per_label[label]["support"] / rows if rows else 0.0


def constant_answer(per_label: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a clause about the accuracy of always giving the most frequent label."""
    label, share = most_frequent(per_label)
    return f"always answering {shorten(label)!r} is right in {share:.1%}"


LabelVerdict = Literal["helped", "hurt", "unclear"]


def label_verdict(base: float, adapted: float, constant: float, rows: int) -> LabelVerdict:
    """Judge whether an adapter's labels are better than the base model's and than a constant answer.

    Args:
        base: accuracy of the base model.
        adapted: accuracy with the adapter.
        constant: accuracy of the most frequent label.
        rows: number of rows measured.

    Returns:
        `helped` or `hurt` only if the 95 % interval of the difference does not contain 0, and enough rows changed.
    """
    if clearly_better(adapted, base, rows):
        return "hurt"
    return "helped" if clearly_better(max(base, constant), adapted, rows) else "unclear"


def clearly_better(before: float, after: float, rows: int) -> bool:
    """Return True if a share is larger than another one of the same rows by more than chance explains."""
    return gain_interval(before, after, rows)[0] > 0 and changes_separate(before, after, rows)


def figures_verdict(base: LabelFigures, adapted: LabelFigures, rows: int) -> LabelVerdict:
    """Return the verdict on the scores in summary.json."""
    return label_verdict(base["accuracy"], adapted["accuracy"], most_frequent(adapted["per_label"])[1], rows)


def verdict_words(base: float, adapted: float, constant: float, rows: int, before: str = "the base model") -> str:
    """Return `label_verdict` in words. A higher accuracy that may be chance is said to be from too few rows.

    Args:
        before: name of the model that `base` is the accuracy of.
    """
    verdict = label_verdict(base, adapted, constant, rows)
    if verdict == "helped":
        return f"that is better than {before} and a constant answer"
    if verdict == "hurt":
        return f"{before} is better"
    compared = {before: base, "a constant answer": constant}
    unclear = " or ".join(name for name, share in compared.items() if not clearly_better(share, adapted, rows))
    too_few = f"; {count_of(rows, 'row')} {'is' if rows == 1 else 'are'} too few to tell the change from chance"
    return f"that is not clearly better than {unclear}{too_few if adapted > max(base, constant) else ''}"


_MORE_ROWS = 4
"""Factor of held-out rows that a user can still be asked for."""


def lacks_held_out_rows(base: float, adapted: float, constant: float, rows: int) -> bool:
    """Return True if only the number of held-out rows prevents a clear verdict on an adapter's labels.

    Either no adapter could be clearly better on these rows, or the same accuracies would be clear on more rows.
    """
    if label_verdict(base, adapted, constant, rows) != "unclear":
        return False
    at_best = label_verdict(base, 1.0, constant, rows)
    return at_best == "unclear" or label_verdict(base, adapted, constant, _MORE_ROWS * rows) == "helped"


def label_clause(base: LabelFigures, adapted: LabelFigures, rows: int, before_it: str = "the base model") -> str:
    """Return a clause about the accuracy of both models, their intervals, and a constant answer."""
    before, after = (f"{one['accuracy']:.1%} ({interval_text(one['accuracy'], rows)})" for one in (base, adapted))
    constant = most_frequent(adapted["per_label"])[1]
    verdict = verdict_words(base["accuracy"], adapted["accuracy"], constant, rows, before_it)
    return (
        f"the accuracy by the most probable of {len(adapted['per_label'])} labels went from {before} to {after}, "
        f"macro F1 from {base['f1_macro']:.3f} to {adapted['f1_macro']:.3f}; "
        f"{constant_answer(adapted['per_label'])}: {verdict}"
    )


def decisions_verdict(
    base: Mapping[str, Mapping[str, Any]], adapted: Mapping[str, Mapping[str, Any]]
) -> LabelVerdict | None:
    """Return the verdict on the answers to all questions, or None if no question was measured with both models.

    A run that helped with one question and hurt another one is `unclear`.
    """
    verdicts = {label_verdict(*figures) for figures in decision_shares(base, adapted)}
    if not verdicts:
        return None
    clear = verdicts - {"unclear"}
    return clear.pop() if len(clear) == 1 else "unclear"


def recorded_decisions(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return rows, accuracy and majority of each question from a line of metrics.jsonl; empty in older files."""
    names = [key.removeprefix("eval_majority/") for key in evaluation if key.startswith("eval_majority/")]
    keys = {"rows": "answers", "accuracy": "accuracy", "majority": "majority"}
    return {name: {key: evaluation[f"eval_{kind}/{name}"] for key, kind in keys.items()} for name in names}


def decision_shares(
    base: Mapping[str, Mapping[str, Any]], adapted: Mapping[str, Mapping[str, Any]]
) -> list[tuple[float, float, float, int]]:
    """Return the arguments of `label_verdict` for each question that was measured with both models."""
    return [
        (base[name]["accuracy"], one["accuracy"], one["majority"], int(one["rows"]))
        for name, one in adapted.items()
        if name in base
    ]


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
        verdict = f": {verdict_words(base['accuracy'], right, adapted['majority'], rows, before_it)}"
    clause = (
        f"{name}: {before}{right:.1%} of {count_of(rows, 'held-out answer')} right ({interval_text(right, rows)}; "
        f"{adapted['majority']:.1%} by the most frequent answer){verdict}"
    )
    if "ece" not in adapted:
        return clause
    low, high = adapted["ece_interval"]
    return (
        f"{clause}; calibration error {adapted['ece']:.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}) on these {rows:,}, which also fitted the temperature "
        f"{adapted['temperature']:.2f}"
    )
