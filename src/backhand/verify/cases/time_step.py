"""The time step: cases and mutants."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.time_step import TimeStepSaved
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Op

OP = Op(
    "time_step",
    dict(a=lambda draw, tokens, heads, size, shift: draw.normal(tokens, heads, size=size) + shift)
    | dict(bias="heads", d_y="tokens heads"),
    {"tokens": Axis(5, 67, 1, 0), "heads": Axis(3, 16), "size": 1.0, "shift": 0.0, "limits": (0.4, 1.3)},
)

CASES = (
    *OP.standard_cases(),
    OP.case("one head", 5, 1),
    OP.case("no limits", 6, limits=None),
    OP.case("large, no limits", 6, size=3.0, shift=12.0, limits=None),
    OP.case("far below zero, no limits", 6, shift=-12.0, limits=None),
    OP.case("all above the limit", 6, shift=9.0),
)


def _within(s: TimeStepSaved, *, low: bool = True, high: bool = True) -> Tensor:
    """Return True where the limits that are not ignored do not apply."""
    steps = functional.softplus(s.a + s.bias)
    limits = (-math.inf, math.inf) if s.limits is None else s.limits
    return ((steps >= limits[0]) | (not low)) & ((steps <= limits[1]) | (not high))


MUTANTS = (
    wrong("limits forgotten", "d_a", lambda g, s: g * torch.sigmoid(s.a + s.bias)),
    wrong("lower limit forgotten", "d_a", lambda g, s: g * torch.sigmoid(s.a + s.bias) * _within(s, low=False)),
    wrong("upper limit forgotten", "d_a", lambda g, s: g * torch.sigmoid(s.a + s.bias) * _within(s, high=False)),
    wrong("bias forgotten", "d_a", lambda g, s: g * torch.sigmoid(s.a) * _within(s)),
    wrong("softplus for its slope", "d_a", lambda g, s: g * functional.softplus(s.a + s.bias) * _within(s)),
)
