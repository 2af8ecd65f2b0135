"""SimPO: cases and mutants."""

from __future__ import annotations

from torch import sigmoid

from backhand.ops.simpo import SimPORule
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Op

RULE = SimPORule(1.9, 0.6, 0.13)
OP = Op(
    "simpo",
    {"chosen": "size: pairs", "rejected": "size: pairs", "d_y": "pairs"},
    {"pairs": 6, "rule": RULE, "size": 1.0},
)

CASES = (
    OP.case("pairs"),
    OP.case("no label smoothing", rule=SimPORule(2.3, 0.5)),
    OP.case("no margin", rule=SimPORule(0.7, 0.0, 0.2)),
    OP.case("far apart", size=9.0),
    OP.case("one row", 1),
    OP.case("no pairs", 0),
    OP.case("training size", 97),
)

MUTANTS = (
    wrong("same sign as the other", "d_rejected", lambda right: right.d_chosen),
    wrong("beta forgotten", "d_chosen d_rejected", lambda s, d: d / s.rule.beta),
    wrong("upstream gradient ignored", "d_chosen d_rejected", lambda g, d: d / g),
    wrong("label smoothing forgotten", "d_chosen", lambda g, s: -s.rule.beta * g * sigmoid(-s.z)),
    OP.perturb("margin forgotten", "d_chosen", z=lambda s: s.z + s.rule.simpo_gamma),
    OP.perturb("margin the other way", "d_rejected", z=lambda s: s.z + 2 * s.rule.simpo_gamma),
    wrong("pairs reversed", "d_rejected", lambda d: d.flip(0)),
)
