"""Preference losses: cases of every row of the table, and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

from backhand.ops.preference import (
    CERTAIN,
    PreferenceGrads,
    PreferenceRule,
    PreferenceSaved,
    preference_backward,
    preference_reference,
)
from backhand.verify.mutants import Function, Mutant, wrong
from backhand.verify.scaffold import COUNT, Draw, Op


def _drawn(draw: Draw, pairs: int, size: float, rule: PreferenceRule, certain: bool) -> Tensor:
    """Draw c or r. For orpo it is below 0, and where certain some are 0, as float32 rounds those of certain tokens."""
    drawn = draw.normal(pairs, size=size)
    if rule.loss_type != "orpo":
        return drawn
    below = -0.05 * size - drawn.abs()
    return below * draw.integers(2, pairs) if certain else below


def _baseline(chosen: Tensor, rejected: Tensor, rule: PreferenceRule) -> Tensor:
    if rule.loss_type != "orpo":
        return preference_reference(chosen, rejected, rule)
    c, r = (t.float() - (t.detach().float() + CERTAIN).relu() for t in (chosen, rejected))
    return -c - rule.beta * logsigmoid((c - r) - (torch.log1p(-c.exp()) - torch.log1p(-r.exp())))


SIGMOID, KTO, ORPO = PreferenceRule("sigmoid", 0.7), PreferenceRule("kto", 0.7), PreferenceRule("orpo", 0.7)
SIMPO = PreferenceRule("sigmoid", 1.9, 0.13, 0.6)
OP = Op(
    "preference",
    {"chosen": _drawn, "rejected": _drawn, "d_y": "pairs"},
    {"rule": ..., "pairs": COUNT, "size": 1.0, "certain": False},
    baseline=_baseline,
)

FORMS = (
    SIGMOID,
    PreferenceRule("hinge", 0.3),
    PreferenceRule("ipo", 0.23),
    PreferenceRule("exo_pair", 0.7, 0.12),
    PreferenceRule("robust", 0.7, 0.17),
    PreferenceRule("discopop", 0.3, discopop_tau=0.4),
    PreferenceRule("nca_pair", 0.7),
    PreferenceRule("bco_pair", 0.7),
    PreferenceRule("sppo_hard", 0.23),
    PreferenceRule("apo_zero", 0.7),
    PreferenceRule("apo_down", 0.7),
    PreferenceRule("kto", 1.1),
)

CASES = (
    *(OP.case(rule.loss_type, rule, size=3.0) for rule in FORMS),
    *OP.standard_cases("sigmoid: ", rule=SIGMOID, size=3.0),
    OP.case("far apart", SIGMOID, size=20.0),
    OP.case("nearly equal", SIGMOID, size=1e-3),
    *OP.standard_cases("simpo: ", rule=SIMPO),
    OP.case("simpo without label smoothing", PreferenceRule("sigmoid", 2.3, simpo_gamma=0.5)),
    OP.case("label smoothing without a margin", PreferenceRule("sigmoid", 0.7, 0.2)),
    OP.case("simpo, far apart", SIMPO, size=9.0),
    OP.case("kto, far apart", KTO, size=9.0),
    *OP.standard_cases("kto: ", rule=KTO),
    *OP.standard_cases("orpo: ", rule=ORPO),
    OP.case("orpo, small beta", PreferenceRule("orpo", 0.1)),
    OP.case("orpo, nearly certain", ORPO, size=1e-2),
    OP.case("orpo, unlikely", ORPO, size=5.0),
    # No finite difference is small enough for the slope there, which continues below the range of float32.
    OP.case("orpo, certain", ORPO, 9, certain=True, exempt=("chosen", "rejected")),
)


def _in(loss_type: str, name: str, gradients: str, mistake: Function) -> tuple[Mutant, ...]:
    """Return mutants with a mistake in one row of the table, a function of g, s, d and the other side's d."""

    def only_there(g: Tensor, s: PreferenceSaved, d: Tensor, right: PreferenceGrads) -> Tensor:
        other = right.d_rejected if d is right.d_chosen else right.d_chosen
        return mistake(g, s, d, other) if s.rule.loss_type == loss_type else d

    return wrong(f"{loss_type}: {name}", gradients, only_there)


def _under(g: Tensor, s: PreferenceSaved, **changes: Any) -> PreferenceGrads:
    """Return the right gradients under a changed rule."""
    return preference_backward(g, s._replace(rule=s.rule._replace(**changes)))


MUTANTS = (
    wrong("chosen for rejected", "d_chosen", lambda right: right.d_rejected),
    wrong("rejected for chosen", "d_rejected", lambda right: right.d_chosen),
    wrong("beta forgotten", "d_chosen d_rejected", lambda s, d: d / s.rule.beta),
    wrong("upstream gradient ignored", "d_chosen d_rejected", lambda g, d: d / g),
    wrong("pairs reversed", "d_rejected", lambda d: d.flip(0)),
    OP.perturb("other side forgotten", "d_chosen", rejected=lambda s: torch.zeros_like(s.rejected)),
    wrong("every form as sigmoid", "d_rejected", lambda g, s: _under(g, s, loss_type="sigmoid").d_rejected),
    wrong("margin forgotten", "d_chosen", lambda g, s: _under(g, s, simpo_gamma=0.0).d_chosen),
    wrong("margin the other way", "d_rejected", lambda g, s: _under(g, s, simpo_gamma=-s.rule.simpo_gamma).d_rejected),
    _in(
        "sigmoid", "label smoothing forgotten", "d_chosen", lambda g, s, *_: _under(g, s, label_smoothing=0.0).d_chosen
    ),
    _in("robust", "label smoothing forgotten", "d_chosen", lambda g, s, *_: _under(g, s, label_smoothing=0.0).d_chosen),
    _in(
        *("sigmoid", "sure where unsure", "d_chosen"),
        lambda g, s, *_: -s.rule.beta * g * sigmoid(s.rule.beta * (s.chosen - s.rejected)),
    ),
    _in("kto", "as a logarithm", "d_chosen", lambda g, s, *_: _under(g, s, loss_type="sigmoid").d_chosen),
    _in("orpo", "supervised term forgotten", "d_chosen", lambda g, _, d, __: d + g),
    _in("orpo", "supervised term alone", "d_chosen", lambda g, *_: -g),
    _in("orpo", "ratio of probabilities, not of odds", "d_rejected", lambda _, s, d, __: d * -s.rejected.expm1()),
    _in(
        "orpo", "odds' slope of the other", "d_rejected", lambda _, s, d, __: d * s.rejected.expm1() / s.chosen.expm1()
    ),
    _in("orpo", "same as the other", "d_rejected", lambda g, _, __, d_other: -(d_other + g)),
)
