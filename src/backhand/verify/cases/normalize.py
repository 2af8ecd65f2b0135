"""L2 normalization: cases and mutants."""

from __future__ import annotations

import torch
from torch.nn import functional

from backhand.verify.mutants import wrong
from backhand.verify.scaffold import SHAPE, Op

OP = Op(
    "normalize",
    {"x": "size: *shape", "d_y": "*shape"},
    {"shape": SHAPE, "size": 1.5},
    baseline=lambda x: functional.normalize(x, dim=-1),
)

CASES = (
    *OP.standard_cases(),
    OP.case("short rows", size=1e-3),
    OP.case("long rows", size=1e3),
    OP.case("two features", (6, 2)),
)

MUTANTS = (
    wrong("projection forgotten", "d_x", lambda g, s: g / s.n),
    wrong("length forgotten", "d_x", lambda s, d: d * s.n),
    wrong("squared length", "d_x", lambda s, d: d / s.n),
    wrong("projection added", "d_x", lambda g, s: (g + s.y * (s.y * g).sum(-1, keepdim=True)) / s.n),
    wrong("mean for sum", "d_x", lambda g, s: (g - s.y * (s.y * g).mean(-1, keepdim=True)) / s.n),
    wrong("one projection for all rows", "d_x", lambda g, s: (g - s.y * (s.y * g).sum()) / s.n),
    wrong("no gradient", "d_x", lambda d: torch.zeros_like(d)),
)
