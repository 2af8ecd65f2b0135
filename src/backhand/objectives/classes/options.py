"""Options of a classification head.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from backhand.bounds import Check, Convert, GivenTexts, Options
from backhand.data.label_names import as_labels
from backhand.data.rows import ProblemType
from backhand.errors import UsageError
from backhand.words import shown


def _check_labels(where: str, labels: Any) -> None:
    """Raise UsageError unless `labels` are different texts."""
    if not all(isinstance(label, str) and label.strip() for label in labels) or len({*labels}) < len(labels):
        raise UsageError(f"{shown([*labels])} are not different labels", where=where)


@dataclass(frozen=True)
class ClassOptions(Options):
    """The labels of a classification head."""

    problem_type: ProblemType | None = None
    """Use of the logits of the head of `classify`, named as in transformers: one label per row (cross-entropy), all
    labels of a list (binary cross-entropy), or a number (squared error). Default: several labels if a row has a list,
    a number if (nearly) all labels are numbers and some are fractions, else one label."""

    class_labels: Annotated[GivenTexts, Convert(as_labels), Check(_check_labels)] = ()  # type: ignore[assignment]
    """Labels of `classify` in the order of the logits. Default: the labels of all rows, sorted."""
