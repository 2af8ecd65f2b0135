"""Scores of a model as a classifier, from the most probable label of each row (see `generation.labels`).

    precision = share of correct rows among those predicted to have the label
    recall    = share of correct rows among those that have the label
    F1        = 2 · precision · recall / (precision + recall), 0 if no row is correct
    accuracy  = correct rows / rows
    majority  = rows with the most frequent label / rows, the accuracy of a constant answer
    macro F1  = mean F1 of the labels that rows have

These are the definitions of scikit-learn's f1_score with average="macro", labels=(the labels that rows have) and
zero_division=0. By default, scikit-learn also counts a label that no row has, with F1 = 0, as soon as it is predicted
once. That error is in the recall of the true label already. Recall and F1 of such a label are None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from backhand.runs.row_changes import share_gain
from backhand.runs.summary import LabelRow
from backhand.terminal import console_for_tables, table_of
from backhand.words import share_interval

Gain = tuple[float, float, float]
"""A mean gain per row, and the ends of its 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """The scores of a model on each row, and its gains in their mean.

    A score is 1 for a right row and 0 for a wrong one, or the answer's share of a soft target. More is better.
    """

    row_scores: Sequence[float] = field(repr=False)
    constant_scores: Sequence[float] = field(default=(), repr=False)  # of the most frequent answer
    # over the base model and over the most frequent answer; None without such a model, see `compared_with`
    gain: Gain | None = None
    gain_over_constant: Gain | None = None

    def compared_with(self, base: RowScores | None) -> Self:
        """Return these scores with their gains over those of the base model, or unchanged without one."""
        if base is None:
            return self
        over_constant = self.gain_over(self.constant_scores) if self.constant_scores else None
        return replace(self, gain=self.gain_over(base.row_scores), gain_over_constant=over_constant)

    def gain_over(self, before: Sequence[float]) -> Gain | None:
        """Return the gain over other scores of the same rows, or None if it cannot be measured."""
        return share_gain(before, self.row_scores)

    def to_json(self) -> dict[str, Any]:
        """Return the scores as JSON values, without those of each row and gains that are not known."""
        values = asdict(self)
        del values["row_scores"], values["constant_scores"]
        gains = {name: one for name in ("gain", "gain_over_constant") if (one := values.pop(name)) is not None}
        return values | gains


@dataclass(frozen=True)
class LabelScore(RowScores):
    """The scores of one model on rows whose answers are labels."""

    accuracy: float
    accuracy_interval: tuple[float, float]  # 95 % interval
    majority: float
    f1_macro: float
    # precision, recall, f1 and support (number of rows that have the label) of each label, also of labels without rows
    per_label: dict[str, LabelRow]
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
    per_label: dict[str, LabelRow] = {}
    f1_of: dict[str, float] = {}  # of the labels that rows have
    for label in labels:
        hits = pairs[label, label]
        precision = hits / (got[label] or 1) if has[label] or got[label] else None
        if has[label]:
            f1_of[label] = 2 * hits / (has[label] + got[label])
        recall = hits / has[label] if has[label] else None
        per_label[label] = LabelRow(precision=precision, recall=recall, f1=f1_of.get(label), support=has[label])
    confusion = {one: {other: pairs[one, other] for other in labels if pairs[one, other]} for one in labels if has[one]}
    inventions = Counter(answer for answer in free if answer not in per_label)
    accuracy = sum(pairs[label, label] for label in labels) / len(right)
    most_frequent = max(has, key=has.__getitem__)
    return LabelScore(
        accuracy,
        share_interval(accuracy, len(right)),
        max(has.values()) / len(right),
        sum(f1_of.values()) / len(f1_of),
        per_label,
        confusion,
        inventions.total(),
        dict(inventions.most_common(_INVENTIONS)),
        row_scores=[float(one == other) for one, other in zip(right, given, strict=True)],
        constant_scores=[float(one == most_frequent) for one in right],
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
        shares = ("–" if share is None else f"{share:.3f}" for share in (one["precision"], one["recall"], one["f1"]))
        shown.add_row(label, f"{one['support']:,}", *shares, mistaken_for(score, label))
    console_for_tables().print(shown)
    if score.inventions:
        examples = ", ".join(f"{text!r} {count}" for text, count in score.inventions.items())
        line = f"free answers that are no label: {score.invented}, such as {examples}"
        console_for_tables().print(line, soft_wrap=True)
