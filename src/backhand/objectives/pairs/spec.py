"""Pairs of answers, and answers that are labelled desirable or undesirable.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _Compared(Spec):
    """An objective that compares answers.

    Args:
        name: value of `--objective`.
        traits: its facts.
    """

    row_kinds = {
        "pairs": "backhand.objectives.pairs.rows:PAIRS",
        "labels": "backhand.objectives.pairs.rows:LABELS",
        "labelled": "backhand.objectives.pairs.rows:LABELLED",
    }

    def __init__(self, name: str, traits: Traits) -> None:
        self.name, self._traits = name, traits

    def traits(self, options: Any) -> Traits:
        return self._traits


DPO = _Compared("dpo", Traits(rows="pairs", has_reference=True))
IPO = _Compared("ipo", Traits(rows="pairs", has_reference=True))
ORPO = _Compared("orpo", Traits(rows="pairs", is_supervised=True))  # its loss is mainly that of answers
SIMPO = _Compared("simpo", Traits(rows="pairs"))
KTO = _Compared("kto", Traits(rows="labels", has_reference=True))
