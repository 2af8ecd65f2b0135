"""CoSENT: cases with equal and different targets, and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from backhand.ops.cosent import CosentSaved
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import COUNT, Axis, Draw, Op


def _rows(draw: Draw, rows: int, width: int) -> Tensor:
    return normalize(draw.normal(rows, width), dim=1)


def _targets(draw: Draw, rows: int, levels: int) -> Tensor:
    """Draw targets; few levels make many of them equal."""
    return draw.integers(levels, rows).double() / 5


OP = Op(
    "cosent",
    {"first": _rows, "second": _rows, "targets": _targets, "d_y": lambda: torch.tensor(1.3, dtype=torch.float64)},
    {"rows": COUNT, "width": Axis(7, 33), "levels": 4, "scale": 20.0},
)

CASES = (
    *OP.standard_cases(),
    OP.case("different targets", levels=10_000),
    OP.case("two targets", levels=2),
    OP.case("small scale", scale=1.7),
    OP.case("two pairs", 2, levels=10_000),
)


def _d_cosines(g: Tensor, s: CosentSaved, shares: Tensor) -> Tensor:
    return (g * s.scale * shares)[:, None]


MUTANTS = (
    wrong("scale forgotten", "d_first d_second", lambda s, d: d / s.scale),
    wrong("upstream gradient ignored", "d_first d_second", lambda g, d: d / g),
    wrong("lower targets forgotten", "d_first", lambda g, s: _d_cosines(g, s, s.below) * s.second),
    wrong("higher targets forgotten", "d_second", lambda g, s: _d_cosines(g, s, -s.above) * s.first),
    wrong("both added", "d_first", lambda g, s: _d_cosines(g, s, s.below + s.above) * s.second),
    wrong("its own side", "d_first", lambda g, s: _d_cosines(g, s, s.below - s.above) * s.first),
    wrong("its own side", "d_second", lambda g, s: _d_cosines(g, s, s.below - s.above) * s.second),
    wrong("pairs in reverse", "d_first d_second", lambda d: d.flip(0)),
)
