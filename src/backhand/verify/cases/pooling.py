"""Pooling: cases of every mode, and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.pooling import PoolingSaved
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import DOCUMENTS, PACKED, Axis, Op

OP = Op(
    "pooling",
    {"x": "tokens hidden", "d_y": "count hidden"},
    {"lengths": DOCUMENTS, "hidden": Axis(6, 96), "mode": "mean"},
    derived={"tokens": lambda lengths: PACKED["tokens"](lengths), "count": lambda lengths: len(lengths)},
)

CASES = (
    *OP.standard_cases(),
    *OP.standard_cases("cls: ", mode="cls"),
    *OP.standard_cases("last: ", mode="last"),
    OP.case("equal lengths", (3, 3, 3)),
)


def _spread(g: Tensor, s: PoolingSaved) -> Tensor:
    """Return the gradient of each token's document."""
    return g.repeat_interleave(torch.tensor(s.lengths, device=g.device), dim=0)


MUTANTS = (
    wrong("sum for mean", "d_x", lambda g, s, d: _spread(g, s).to(d.dtype) * (d != 0)),
    wrong("documents in reverse", "d_x", lambda d: d.flip(0)),
    wrong("next token", "d_x", lambda d: d.roll(1, 0)),
    wrong("mean over all tokens", "d_x", lambda g, s, d: d if s.mode != "mean" else _spread(g, s) / max(1, len(d))),
    wrong("first for last", "d_x", lambda g, s, d: d if s.mode == "mean" else _spread(g, s) / 2),
)
