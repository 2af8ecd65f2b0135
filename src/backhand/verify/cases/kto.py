"""KTO: cases and mutants."""

from __future__ import annotations

import torch

from backhand.ops.kto import KTORule
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Op

RULE = KTORule(0.7, 1.3, 0.6)
OP = Op(
    "kto",
    {"log_ratio": "2: rows", "d_y": "rows"},
    {"rows": 7, "rule": RULE, "z": 0.4, "each": 2},
    derived={
        # The first of every `each` rows is undesirable.
        "desirable": lambda rows, each: torch.arange(rows) % each != 0,
        "kl": lambda z: torch.tensor(z, dtype=torch.float64),
    },
)

CASES = (
    OP.case("rows"),
    OP.case("two in three desirable", rule=KTORule(1.1, 0.7, 1.9), each=3),
    OP.case("none desirable", each=1),
    OP.case("kl of zero", z=0.0),
    OP.case("large kl", z=9.0),
    OP.case("one row", 1),
    OP.case("no rows", 0),
    OP.case("training size", 97),
)

MUTANTS = (
    wrong("every row desirable", "d_log_ratio", lambda d: -d.abs()),
    wrong("weight forgotten", "d_log_ratio", lambda s, d: d / s.signed.abs()),
    wrong("beta forgotten", "d_log_ratio", lambda s, d: d / s.beta),
    wrong("upstream gradient ignored", "d_log_ratio", lambda g, d: d / g),
    OP.perturb("kl forgotten", "d_log_ratio", apart=lambda s: s.apart + 0.4 * s.beta),
    wrong("as a logarithm", "d_log_ratio", lambda g, s: -s.beta * g * s.signed * torch.sigmoid(-s.apart)),
    wrong("rows reversed", "d_log_ratio", lambda d: d.flip(0)),
)
