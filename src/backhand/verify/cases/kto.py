"""KTO: cases and mutants."""

from __future__ import annotations

import torch

from backhand.ops.kto import KTORule
from backhand.verify.case import Case, wrong
from backhand.verify.scaffold import Input, Op

OP = Op("kto")
RULE = KTORule(0.7, 1.3, 0.6)


def _case(name: str, rows: int = 7, rule: KTORule = RULE, *, kl: float = 0.4, desirable: int = 2) -> Case:
    """Of `desirable` rows each is desirable but the first."""
    inputs: dict[str, Input] = {"log_ratio": lambda draw: draw.normal(rows, size=2.0), "d_y": (rows,)}
    labels = torch.arange(rows) % desirable != 0
    return OP.case(name, inputs, desirable=labels, kl=torch.tensor(kl, dtype=torch.float64), rule=rule)


CASES = (
    _case("rows"),
    _case("two in three desirable", rule=KTORule(1.1, 0.7, 1.9), desirable=3),
    _case("none desirable", desirable=1),
    _case("kl of zero", kl=0.0),
    _case("large kl", kl=9.0),
    _case("one row", 1),
    _case("no rows", 0),
    _case("training size", 97),
)

MUTANTS = (
    wrong("every row desirable", "d_log_ratio", lambda d: -d.abs()),
    wrong("weight forgotten", "d_log_ratio", lambda s, d: d / s.signed.abs()),
    wrong("beta forgotten", "d_log_ratio", lambda s, d: d / s.beta),
    wrong("upstream gradient ignored", "d_log_ratio", lambda g, d: d / g),
    OP.redo("kl forgotten", "d_log_ratio", apart=lambda s: s.apart + 0.4 * s.beta),
    wrong("as a logarithm", "d_log_ratio", lambda g, s: -s.beta * g * s.signed * torch.sigmoid(-s.apart)),
    wrong("rows reversed", "d_log_ratio", lambda d: d.flip(0)),
)

PROOFS = (OP.proof(CASES, MUTANTS),)
