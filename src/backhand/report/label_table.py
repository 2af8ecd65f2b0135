"""Labels of held-out rows as a table: what the adapted model took for what."""

from __future__ import annotations

from typing import Any

from backhand.report.run_record import RunRecord
from backhand.training.label_scores import LabelScore, mistaken_for
from backhand.words import count_of

_MOST_COLUMNS = 16
"""So many labels stand side by side on a page; where there are more, each has what it was taken for."""


def label_table(run: RunRecord) -> dict[str, Any] | None:
    """What the template shows; None where rows have no labels, or summary.json is damaged."""
    try:
        base, score = (LabelScore(**run.summary[f"{which}_labels"]) for which in ("base", "adapted"))
        columns = list(score.per_label) if len(score.per_label) <= _MOST_COLUMNS else []
        return {
            "columns": columns,
            "rows": [_row(score, name, columns) for name in score.per_label],
            "sentence": f"Of {count_of(run.summary['exact_match_rows'], 'held-out row')} the adapted model labels "
            f"{score.accuracy:.1%} right, the base model {base.accuracy:.1%} (macro F1 {base.f1_macro:.3f} → "
            f"{score.f1_macro:.3f}). Free answers that are none of the labels: {base.invented:,} → {score.invented:,}.",
        }
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError):
        return None


def _row(score: LabelScore, name: str, columns: list[str]) -> dict[str, Any]:
    """A label's figures, and (rows that were given it, their share in percent, whether rightly) for each column."""
    given = score.confusion.get(name, {})
    total = sum(given.values()) or 1
    cells = [(count := given.get(other, 0), round(100 * count / total), other == name) for other in columns]
    figures = {what: float(score.per_label[name][what]) for what in ("precision", "recall", "f1")}
    return figures | {
        "name": name,
        "rows": total if given else 0,
        "cells": cells,
        "taken_for": mistaken_for(score, name),
    }
