"""Results of label rows in words: accuracy with its interval, next to that of the most frequent label.

The loss of label rows falls as soon as the model knows the form of the answers. A run has helped only if its labels are
better than those of the base model and than one constant answer, by more than chance explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from backhand.runs.summary import LabelFigures
from backhand.words import gain_interval, interval_text, shorten


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
        `helped` or `hurt` only if the 95 % interval of the difference does not contain 0.
    """
    if gain_interval(base, adapted, rows)[1] < 0:
        return "hurt"
    return "helped" if gain_interval(max(base, constant), adapted, rows)[0] > 0 else "unclear"


def figures_verdict(base: LabelFigures, adapted: LabelFigures, rows: int) -> LabelVerdict:
    """Return the verdict on the scores in summary.json."""
    return label_verdict(base["accuracy"], adapted["accuracy"], most_frequent(adapted["per_label"])[1], rows)


LABEL_VERDICTS: Mapping[LabelVerdict, str] = {
    "helped": "the labels are answered better than by the base model or a constant answer",
    "hurt": "the base model answers the labels better",
    "unclear": "that is not clearly better than the base model or a constant answer",
}


def label_clause(base: LabelFigures, adapted: LabelFigures, rows: int) -> str:
    """Return a clause about the accuracy of both models, their intervals, and a constant answer."""
    before, after = (f"{one['accuracy']:.1%} ({interval_text(one['accuracy'], rows)})" for one in (base, adapted))
    return (
        f"the accuracy by the most probable of {len(adapted['per_label'])} labels went from {before} to {after}, "
        f"macro F1 from {base['f1_macro']:.3f} to {adapted['f1_macro']:.3f}; "
        f"{constant_answer(adapted['per_label'])}: {LABEL_VERDICTS[figures_verdict(base, adapted, rows)]}"
    )
