"""Pairs of answers, and answers that are labelled desirable or undesirable.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits
from backhand.objectives.pairs.options import OF_LABELS, OF_PAIRS, check_form, check_smoothing, check_strength


class _Compared(Spec):
    """An objective that compares answers.

    Args:
        name: value of `--objective`.
        traits: its facts.
        reads: its options.
        forms: forms of the loss, the usual one first.
        usual_beta: default of `beta`.
    """

    row_kinds = {
        "pairs": "backhand.objectives.pairs.rows:PAIRS",
        "labels": "backhand.objectives.pairs.rows:LABELS",
        "labelled": "backhand.objectives.pairs.rows:LABELLED",
    }
    options = "backhand.objectives.pairs.options:PairOptions"
    training = "backhand.objectives.pairs.training:PairTraining"

    def __init__(
        self, name: str, traits: Traits, reads: tuple[str, ...], forms: tuple[str, ...], usual_beta: float = 0.1
    ) -> None:
        self.name, self._traits, self.reads, self.usual_beta = name, traits, ("beta", *reads), usual_beta
        self.forms = forms
        self.page = "" if name == "ipo" else f"backhand.objectives.pairs.page:{name.upper()}"

    def traits(self, options: Any) -> Traits:
        return self._traits

    def defaults(self, options: Any) -> dict[str, Any]:
        beta = self.usual_beta if options.beta is None else options.beta
        form = {"loss_type": options.loss_type or self.forms[0]} if "loss_type" in self.reads else {}
        return {"beta": beta, **form}

    def check_options(self, options: Any) -> None:
        check_strength(options.beta)
        if "loss_type" in self.reads:
            check_form(options, self.forms)
        if self.forms == OF_PAIRS:
            check_smoothing(options)


class _Labelled(_Compared):
    training = "backhand.objectives.pairs.training:LabelledTraining"


DPO = _Compared(
    "dpo", Traits(rows="pairs", has_reference=True), ("loss_type", "label_smoothing", "discopop_tau"), OF_PAIRS
)
IPO = _Compared("ipo", Traits(rows="pairs", has_reference=True), (), ("ipo",))
ORPO = _Compared("orpo", Traits(rows="pairs", rate_rule=True), (), ("orpo",))  # its loss is mainly that of answers
SIMPO = _Compared("simpo", Traits(rows="pairs"), ("simpo_gamma", "label_smoothing"), ("sigmoid",), 2.0)
KTO = _Labelled(
    "kto",
    Traits(rows="labels", has_reference=True),
    ("loss_type", "desirable_weight", "undesirable_weight"),
    OF_LABELS,
)
