"""Scores of a classification head on rows with labels, and those of the best constant answer.

    one label       accuracy, macro F1, and NLL, the mean -log p of the label
    several labels  accuracy, the share of rows with exactly the right labels; macro F1 over labels; NLL, the mean
                    binary cross-entropy per label. A label is given if its probability is above 1/2
    a number        MSE, the mean squared error; R², its improvement over the mean of the numbers; Spearman's
                    correlation of the ranks; both with 95 % intervals, of resampled rows

The best constant answer gives the same output to every row: the frequencies of the labels, or the mean of the numbers.
A model that is not better has learned nothing from the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.data.class_examples import target_of
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.rows import MULTI, NUMBER, ClassLabel, ProblemType
from backhand.loop.label_scores import Gain, RowScores, label_score
from backhand.loop.retrieval_scores import Floats, resampled, resampled_spearman, spearman
from backhand.ops.binary_cross_entropy import binary_cross_entropy_forward
from backhand.ops.cross_entropy import cross_entropy_forward
from backhand.runs.row_changes import mean_gain
from backhand.words import share_interval

_SURPRISES = 5


@dataclass(frozen=True)
class ClassScores(RowScores):
    """Scores of one model on the same rows. The score of a row with a number is -(its squared error)."""

    rows: int
    problem_type: ProblemType
    loss: float  # mean loss of a row
    values: dict[str, float]  # by name: accuracy, f1_macro and nll, or mse, r2 and spearman
    constant: bool  # True if the model gives the same answer to all rows, although their answers differ
    # number of rows by label, then by answer; empty unless a row has one label
    confusion: dict[str, dict[str, int]]
    # rows with the largest losses: source, answer, given, loss; also text, see `add_texts`
    surprises: list[dict[str, Any]]
    accuracy_interval: tuple[float, float] | None  # 95 % interval of the accuracy; None for numbers
    numbers: Floats | None = field(default=None, repr=False)  # given numbers and right ones, (2, rows); None for labels

    @property
    def accuracy(self) -> float | None:
        """Share of rows with exactly the right labels; None for numbers."""
        return self.values.get("accuracy")

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of `r2` and `spearman`; empty for labels, for one row, and if all answers are equal."""
        if self.numbers is None or self.constant or self.rows < 2:
            return {}
        return {"r2": resampled(_r2, *self.numbers), "spearman": resampled_spearman(*self.numbers)}

    def gain_over(self, before: Sequence[float]) -> Gain | None:
        return mean_gain(before, self.row_scores) if self.problem_type == NUMBER else super().gain_over(before)

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        del values["numbers"]
        return values | ({"intervals": self.intervals} if self.intervals else {})

    def figures(self) -> dict[str, Any]:
        """Return `to_json` in the form of summary.json, where the values have no name of their own."""
        fields = self.to_json()
        return {**fields.pop("values"), **fields}


def row_losses(logits: Tensor, targets: Tensor, problem: ProblemType) -> Tensor:
    """Return the loss of every row, (rows,) float64.

    Args:
        logits: (rows, outputs) float64.
        targets: (rows, outputs) float64, see `data.class_examples.target_of`.
    """
    if problem == NUMBER:
        return (logits - targets).square().sum(1)
    if problem == MULTI:
        return binary_cross_entropy_forward(logits, targets)[0].mean(1)
    return cross_entropy_forward(logits, targets.argmax(1))[0]


def constant_logits(targets: Tensor, problem: ProblemType) -> Tensor:
    """Return the logits of the best constant answer to these rows, (rows, outputs)."""
    mean = targets.mean(0, keepdim=True)
    if problem != NUMBER:
        tiny = torch.finfo(torch.float64).tiny
        mean = mean.clamp_min(tiny).log() - ((1 - mean).clamp_min(tiny).log() if problem == MULTI else 0)
    return mean.expand(len(targets), -1)


def score_classes(
    logits: Tensor, targets: Tensor, problem: ProblemType, labels: Sequence[str], sources: Sequence[str]
) -> ClassScores:
    """Score the logits of rows.

    Args:
        logits, targets: as in `row_losses`.
        labels: names of the outputs.
        sources: location of each row.
    """
    losses = row_losses(logits, targets, problem)
    confusion: dict[str, dict[str, int]] = {}
    numbers: Floats | None = None
    right, given = ([_shown(row, problem, labels) for row in each] for each in (targets, _decided(logits, problem)))
    if problem == NUMBER:
        numbers = np.stack((logits[:, 0].numpy(), targets[:, 0].numpy()))
        of_rows: list[float] = (-losses).tolist()
        values = {"mse": float(losses.mean()), "r2": _r2(*numbers), "spearman": spearman(*numbers)}
    else:
        of_rows = [float(one == other) for one, other in zip(right, given, strict=True)]
        values = {"accuracy": sum(of_rows) / len(of_rows), "nll": float(losses.mean())}
        if problem == MULTI:
            values["f1_macro"] = _macro_f1(_decided(logits, problem), targets)
        else:
            of_labels = label_score(right, given, dict.fromkeys(labels), right)
            values["f1_macro"], confusion = of_labels.f1_macro, of_labels.confusion
    order = losses.argsort(descending=True, stable=True)[:_SURPRISES].tolist()
    surprises = [
        {"source": sources[row], "answer": right[row], "given": given[row], "loss": float(losses[row])} for row in order
    ]
    constant = len({*given}) == 1 and len({*right}) > 1
    interval = None if problem == NUMBER else share_interval(values["accuracy"], len(targets))
    return ClassScores(
        *(len(targets), problem, float(losses.mean()), values, constant, confusion, surprises, interval, numbers),
        row_scores=of_rows,
    )


def add_texts(scores: Mapping[str, Any], examples: Iterable[Example]) -> None:
    """Add the beginning of its text to each row with a large loss.

    Args:
        scores: `base_classes` and `adapted_classes` of summary.json.
        examples: all rows.
    """
    rows = [row for name in ("base_classes", "adapted_classes") for row in scores[name]["surprises"]]
    places = {row["source"] for row in rows}
    texts = {one.source: one.facts_as(ClassLabel).text for one in examples if one.source in places}
    for row in rows:
        row["text"] = texts[row["source"]]


def _r2(given: Floats, right: Floats) -> float:
    """Return R², rounded so that the mean of the numbers has exactly 0; 0 if all numbers are equal."""
    spread = float(right.var())
    return round(1 - float(((given - right) ** 2).mean()) / spread, 12) + 0.0 if spread else 0.0


def _decided(logits: Tensor, problem: ProblemType) -> Tensor:
    """Return the answer of every row in the form of targets."""
    if problem == NUMBER:
        return logits
    if problem == MULTI:
        return (logits > 0).to(logits.dtype)
    return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)


def _shown(row: Tensor, problem: ProblemType, labels: Sequence[str]) -> str:
    """Return an answer as text."""
    if problem == NUMBER:
        return f"{float(row):.6g}"
    return ", ".join(label for label, applies in zip(labels, row.tolist(), strict=True) if applies) or "none"


def _macro_f1(given: Tensor, targets: Tensor) -> float:
    """Return the mean F1 of the labels. A label that neither occurs nor is given is left out."""
    both, either = (given * targets).sum(0), given.sum(0) + targets.sum(0)
    occurs = either > 0
    return float((2 * both[occurs] / either[occurs]).mean()) if bool(occurs.any()) else 1.0


def targets_of(packer: RowPacker, problem: ProblemType, labels: Sequence[str]) -> Tensor:
    """Return the targets of all rows, (rows, outputs) float64. Raises DataError for a label that does not fit.

    The rows of a run have been checked before it, so that an error is one of rows for a trained head.
    """
    examples = packer.examples
    found = [
        target_of(label, problem, labels, examples[row].source, trained=True)
        for row, label in enumerate(examples.facts(ClassLabel))
    ]
    return torch.tensor(found, dtype=torch.float64)
