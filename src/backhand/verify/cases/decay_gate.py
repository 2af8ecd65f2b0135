"""The decay gate: cases and mutants."""

from __future__ import annotations

import torch
from torch.nn import functional

from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Op

OP = Op(
    "decay_gate",
    dict(a=lambda draw, tokens, heads, size, shift: draw.normal(tokens, heads, size=size) + shift)
    | dict(log_rate="heads", bias="heads", d_y="tokens heads"),
    {"tokens": Axis(5, 67, 1, 0), "heads": Axis(3, 16), "size": 1.0, "shift": 0.0},
)

CASES = (
    *OP.standard_cases(),
    OP.case("one head", 5, 1),
    OP.case("large", 6, size=3.0, shift=12.0),
    OP.case("far below zero", 6, shift=-12.0),
)


MUTANTS = (
    wrong("rate forgotten", "d_a", lambda s, d: d / s.log_rate.exp()),
    wrong("logarithm of the rate", "d_a", lambda s, d: d / s.log_rate.exp() * s.log_rate),
    wrong("bias forgotten", "d_a", lambda g, s: -s.log_rate.exp() * g * torch.sigmoid(s.a)),
    wrong("softplus for its slope", "d_a", lambda g, s: -s.log_rate.exp() * g * functional.softplus(s.a + s.bias)),
    wrong("heads reversed", "d_a", lambda g, s: -s.log_rate.exp().flip(0) * g * torch.sigmoid(s.a + s.bias)),
)
