"""Dropout: cases and mutants."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.dropout import DropoutSaved, dropout_mask
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import SHAPE, Op

OP = Op(
    "dropout",
    {"x": "*shape", "d_y": "*shape"},
    {"shape": SHAPE, "probability": 0.3, "seed": 11},
    derived={"mask": lambda x, probability, seed: dropout_mask(x.shape, probability, seed, x.device)},
)

CASES = (
    *OP.standard_cases(),
    OP.case("seed of 64 bits", probability=0.1, seed=2**40),
    OP.case("probability 0", probability=0.0),
    OP.case("probability 0.95", (11, 13), 0.95, 5),
    OP.case("one number", (), 0.4, 3),
)


def _kept(s: DropoutSaved, g: Tensor) -> Tensor:
    return dropout_mask(s.shape, s.probability, s.seed, g.device)


MUTANTS = (
    wrong("mask ignored", "d_x", lambda g: g.clone()),
    wrong("mask ignored but scaled", "d_x", lambda g, s: g / (1 - s.probability)),
    wrong("not scaled up", "d_x", lambda g, s: g * _kept(s, g)),
    wrong("scaled by the wrong share", "d_x", lambda g, s: g * _kept(s, g) / max(s.probability, 0.001)),
    OP.perturb("mask of another seed", "d_x", seed=lambda s: s.seed + 1),
    wrong("mask inverted", "d_x", lambda g, s: g * ~_kept(s, g) / (1 - s.probability)),
)
