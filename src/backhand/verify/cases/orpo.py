"""ORPO: cases and mutants. Mean log-probabilities are below 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from backhand.ops.orpo import CERTAIN
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Draw, Op


def _baseline(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    c, r = (t.float() - (t.detach().float() + CERTAIN).relu() for t in (chosen, rejected))
    return -c - beta * logsigmoid((c - r) - (torch.log1p(-c.exp()) - torch.log1p(-r.exp())))


def _below_zero(draw: Draw, pairs: int, size: float, certain: bool) -> Tensor:
    """Draw log-probabilities. Some are 0, as float32 rounds those of certain tokens."""
    drawn = -0.05 * size - draw.normal(pairs, size=size).abs()
    return drawn * draw.integers(2, pairs) if certain else drawn


OP = Op(
    "orpo",
    {"chosen": _below_zero, "rejected": _below_zero, "d_y": "pairs"},
    {"pairs": 6, "beta": 0.7, "size": 1.0, "certain": False},
    baseline=_baseline,
)

CASES = (
    OP.case("pairs"),
    OP.case("small beta", beta=0.1),
    OP.case("nearly certain", size=1e-2),
    OP.case("unlikely", size=5.0),
    # No finite difference is small enough for the slope there, which continues below the range of float32.
    OP.case("certain", 9, certain=True, exempt=("chosen", "rejected")),
    OP.case("one row", 1),
    OP.case("no pairs", 0),
    OP.case("training size", 97),
)


MUTANTS = (
    wrong("supervised term forgotten", "d_chosen", lambda g, d: d + g),
    wrong("supervised term alone", "d_chosen", lambda g: -g),
    wrong("ratio of probabilities, not of odds", "d_rejected", lambda s, d: d * -s.rejected.expm1()),
    wrong("odds' slope of the other", "d_rejected", lambda s, d: d * s.rejected.expm1() / s.chosen.expm1()),
    wrong("same as the other", "d_rejected", lambda g, right: -(right.d_chosen + g)),
    OP.perturb("beta forgotten", "d_chosen d_rejected", beta=1.0),
    wrong("upstream gradient ignored", "d_chosen d_rejected", lambda g, d: d / g),
    wrong("pairs reversed", "d_rejected", lambda d: d.flip(0)),
)
