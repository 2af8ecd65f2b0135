"""ORPO: cases and mutants. Mean log-probabilities are below 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from backhand.verify.case import Case, Draw, wrong
from backhand.verify.scaffold import Op


def _usual(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    c, r = chosen.float(), rejected.float()
    return -c - beta * logsigmoid((c - r) - (torch.log1p(-c.exp()) - torch.log1p(-r.exp())))


OP = Op("orpo", usual=_usual)


def _case(name: str, pairs: int = 6, beta: float = 0.7, size: float = 1.0) -> Case:
    def below_zero(draw: Draw) -> Tensor:
        return -0.05 * size - draw.normal(pairs, size=size).abs()

    return OP.case(name, {"chosen": below_zero, "rejected": below_zero, "d_y": (pairs,)}, beta=beta)


CASES = (
    _case("pairs"),
    _case("small beta", beta=0.1),
    _case("nearly certain", size=1e-2),
    _case("unlikely", size=5.0),
    _case("one row", 1),
    _case("no pairs", 0),
    _case("training size", 97),
)


MUTANTS = (
    wrong("supervised term forgotten", "d_chosen", lambda g, d: d + g),
    wrong("supervised term alone", "d_chosen", lambda g: -g),
    wrong("ratio of probabilities, not of odds", "d_rejected", lambda s, d: d * -s.rejected.expm1()),
    wrong("odds' slope of the other", "d_rejected", lambda s, d: d * s.rejected.expm1() / s.chosen.expm1()),
    wrong("same as the other", "d_rejected", lambda g, right: -(right.d_chosen + g)),
    OP.redo("beta forgotten", "d_chosen d_rejected", beta=1.0),
    wrong("upstream gradient ignored", "d_chosen d_rejected", lambda g, d: d / g),
    wrong("pairs reversed", "d_rejected", lambda d: d.flip(0)),
)

PROOFS = (OP.proof(CASES, MUTANTS),)
