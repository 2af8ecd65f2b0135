"""Scores of a model as a classifier, from the most probable label of each row (see `generation.labels`).

    precision = share of correct rows among those predicted to have the label
    recall    = share of correct rows among those that have the label
    F1        = 2 · precision · recall / (precision + recall), 0 if no row is correct
    accuracy  = correct rows / rows
    majority  = rows with the most frequent label / rows, the accuracy of a constant answer
    macro F1  = mean F1 of the labels that occur as the true or the predicted label of a row

These are the definitions of scikit-learn's f1_score with average="macro" and zero_division=0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backhand.terminal import console_for_tables, table_of


@dataclass(frozen=True)
class LabelScore:
    """The scores of one model on rows whose answers are labels."""

    accuracy: float
    majority: float
    f1_macro: float
    # precision, recall, f1 and support (number of rows that have the label) of each label, also of labels without rows
    per_label: dict[str, dict[str, float]]
    confusion: dict[str, dict[str, int]]  # number of rows by true label, then by predicted label
    invented: int  # number of rows whose free, greedy answer is none of the labels
    inventions: dict[str, int]  # the most frequent of these answers with their counts


_INVENTIONS = 5


def label_score(right: Sequence[str], given: Sequence[str], labels: Iterable[str], free: Iterable[str]) -> LabelScore:
    """Compute the scores.

    Args:
        right: the true label of each row, at least one row.
        given: the most probable label of each row.
        labels: all labels.
        free: the greedy answer to each row.
    """
    labels = tuple(labels)
    pairs = Counter(zip(right, given, strict=True))
    has, got = Counter(right), Counter(given)
    per_label: dict[str, dict[str, float]] = {}
    for label in labels:
        hits = pairs[label, label]
        f1 = 2 * hits / ((has[label] + got[label]) or 1)
        precision, recall = hits / (got[label] or 1), hits / (has[label] or 1)
        per_label[label] = {"precision": precision, "recall": recall, "f1": f1, "support": has[label]}
    met = [per_label[label]["f1"] for label in labels if has[label] or got[label]]
    confusion = {one: {other: pairs[one, other] for other in labels if pairs[one, other]} for one in labels if has[one]}
    inventions = Counter(answer for answer in free if answer not in per_label)
    return LabelScore(
        sum(pairs[label, label] for label in labels) / len(right),
        max(has.values()) / len(right),
        sum(met) / len(met),
        per_label,
        confusion,
        inventions.total(),
        dict(inventions.most_common(_INVENTIONS)),
    )


def mistaken_for(score: LabelScore, label: str) -> str:
    """Return the wrong predictions for a label's rows, most frequent first, such as `shipping 3, praise 1`."""
    others = Counter(score.confusion.get(label, {}))
    del others[label]
    return ", ".join(f"{other} {count}" for other, count in others.most_common())


def print_labels(model: str, score: LabelScore) -> None:
    """Print a table with one line per label: its scores and its most frequent wrong predictions."""
    figures = ("rows", "precision", "recall", "F1")
    shown = table_of("label", *figures, "taken for", right=figures, title=f"labels, {model} model")
    for label, one in score.per_label.items():
        shares = (f"{one[name]:.3f}" for name in ("precision", "recall", "f1"))
        shown.add_row(label, f"{one['support']:,}", *shares, mistaken_for(score, label))
    console_for_tables().print(shown)
    if score.inventions:
        examples = ", ".join(f"{text!r} {count}" for text, count in score.inventions.items())
        line = f"free answers that are no label: {score.invented}, such as {examples}"
        console_for_tables().print(line, soft_wrap=True)
