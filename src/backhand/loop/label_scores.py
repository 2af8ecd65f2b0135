"""How well a model tells labels apart, by the most probable label of each row; see `generate.labels`.

precision = right among the rows it gave the label,   recall = right among the rows that have it
F1        = 2 · precision · recall / (precision + recall),   0 where nothing is right
accuracy  = right / rows,   macro F1 = mean F1 of the labels that some row has or was given
                                       [scikit-learn's f1_score(average="macro"), zero_division=0]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backhand.terminal import console_for_tables, table_of


@dataclass(frozen=True)
class LabelScore:
    """What a model makes of rows whose answers are labels."""

    accuracy: float
    f1_macro: float
    # precision, recall, f1 and support (rows that have it) of each label, also of those without rows
    per_label: dict[str, dict[str, float]]
    confusion: dict[str, dict[str, int]]  # of each label that rows have, how many of them were given which label
    invented: int  # rows whose free, greedy answer is none of the labels
    inventions: dict[str, int]  # the most frequent of these answers, cut, and how often each was given


_INVENTIONS = 5


def label_score(right: Sequence[str], given: Sequence[str], labels: Iterable[str], free: Iterable[str]) -> LabelScore:
    """Judge the labels given to rows.

    Args:
        right: what each row says, among `labels`; at least one row.
        given: the label that was found the most probable for each.
        free: the greedy answers of the rows.
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
        sum(met) / len(met),
        per_label,
        confusion,
        inventions.total(),
        dict(inventions.most_common(_INVENTIONS)),
    )


def mistaken_for(score: LabelScore, label: str) -> str:
    """What the rows of a label were taken for, such as `shipping 3, praise 1`, the most frequent first."""
    others = Counter(score.confusion.get(label, {}))
    del others[label]
    return ", ".join(f"{other} {count}" for other, count in others.most_common())


def print_labels(model: str, score: LabelScore) -> None:
    """A table on the terminal, a line a label: how well it is told from the others, and what it is taken for."""
    figures = ("rows", "precision", "recall", "F1")
    shown = table_of("label", *figures, "taken for", right=figures, title=f"labels, {model} model")
    for label, one in score.per_label.items():
        shares = (f"{one[what]:.3f}" for what in ("precision", "recall", "f1"))
        shown.add_row(label, f"{one['support']:,}", *shares, mistaken_for(score, label))
    console_for_tables().print(shown)
    if score.inventions:
        said = ", ".join(f"{text!r} {count}" for text, count in score.inventions.items())
        console_for_tables().print(f"free answers that are no label: {score.invented}, such as {said}", soft_wrap=True)
