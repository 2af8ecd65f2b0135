"""Dropout: cases and mutants."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.dropout import DropoutSaved, dropout_mask
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Op

OP = Op(
    "dropout",
    {"x": "*shape", "d_y": "*shape"},
    {"shape": ..., "probability": ..., "seed": ...},
    derived={"mask": lambda x, probability, seed: dropout_mask(x.shape, probability, seed, x.device)},
)

CASES = (
    OP.case("rows", (5, 7), 0.3, 11),
    OP.case("documents and rows", (2, 5, 7), 0.1, 2**40),
    OP.case("probability 0", (5, 7), 0.0, 11),
    OP.case("probability 0.95", (11, 13), 0.95, 5),
    OP.case("one row", (1, 7), 0.4, 3),
    OP.case("one number", (), 0.4, 3),
    OP.case("no rows", (0, 7), 0.3, 11),
    OP.case("training size", (67, 96), 0.05, 1),
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
