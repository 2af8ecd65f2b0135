"""Mean squared error: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Op


def _baseline(prediction: Tensor, target: Tensor) -> Tensor:
    rows = prediction.shape[:-1].numel()
    return functional.mse_loss(prediction, target, reduction="sum") / max(rows, 1)


OP = Op(
    "mse",
    {"prediction": "size: *shape", "target": "size: *shape", "d_y": lambda: torch.tensor(1.3, dtype=torch.float64)},
    {"shape": Axis((6, 3), (67, 96), (1, 3), (0, 3), (2, 5, 3)), "size": 1.0},
    baseline=_baseline,
)

CASES = (
    *OP.standard_cases(),
    OP.case("one feature", (6, 1)),
    OP.case("small differences", size=1e-4),
    OP.case("one number", (1,)),
)


MUTANTS = (
    wrong("factor 2 forgotten", "d_prediction", lambda d: d / 2),
    wrong("sum for mean", "d_prediction", lambda s, d: d * max(s.rows, 1)),
    wrong("mean over features too", "d_prediction", lambda s, d: d / s.difference.shape[-1]),
    wrong("upstream gradient ignored", "d_prediction", lambda g, d: d / g),
    wrong("absolute value", "d_prediction", lambda d: d.abs()),
    wrong("same sign as the other", "d_target", lambda right: right.d_prediction),
    wrong("no gradient", "d_target", lambda d: torch.zeros_like(d)),
)
