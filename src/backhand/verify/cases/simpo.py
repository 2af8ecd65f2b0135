"""SimPO: cases and mutants."""

from __future__ import annotations

from torch import sigmoid

from backhand.ops.simpo import SimPORule
from backhand.verify.case import Case, wrong
from backhand.verify.scaffold import Op

OP = Op("simpo")
RULE = SimPORule(1.9, 0.6, 0.13)


def _case(name: str, pairs: int = 6, rule: SimPORule = RULE, size: float = 1.0) -> Case:
    both = dict.fromkeys(("chosen", "rejected"), lambda draw: draw.normal(pairs, size=size))
    return OP.case(name, {**both, "d_y": (pairs,)}, rule=rule)


CASES = (
    _case("pairs"),
    _case("no label smoothing", rule=SimPORule(2.3, 0.5)),
    _case("no margin", rule=SimPORule(0.7, 0.0, 0.2)),
    _case("far apart", size=9.0),
    _case("one row", 1),
    _case("no pairs", 0),
    _case("training size", 97),
)

MUTANTS = (
    wrong("same sign as the other", "d_rejected", lambda right: right.d_chosen),
    wrong("beta forgotten", "d_chosen d_rejected", lambda s, d: d / s.rule.beta),
    wrong("upstream gradient ignored", "d_chosen d_rejected", lambda g, d: d / g),
    wrong("label smoothing forgotten", "d_chosen", lambda g, s: -s.rule.beta * g * sigmoid(-s.z)),
    OP.redo("margin forgotten", "d_chosen", z=lambda s: s.z + s.rule.simpo_gamma),
    OP.redo("margin the other way", "d_rejected", z=lambda s: s.z + 2 * s.rule.simpo_gamma),
    wrong("pairs reversed", "d_rejected", lambda d: d.flip(0)),
)

PROOFS = (OP.proof(CASES, MUTANTS),)
