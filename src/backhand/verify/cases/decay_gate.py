"""The decay gate: cases and mutants."""

from __future__ import annotations

import torch
from torch.nn import functional

from backhand.verify.case import Case, wrong
from backhand.verify.scaffold import Op

OP = Op("decay_gate")


def _case(name: str, tokens: int, heads: int = 3, *, size: float = 1.0, shift: float = 0.0) -> Case:
    inputs = {
        "a": lambda draw: draw.normal(tokens, heads, size=size) + shift,
        "log_rate": (heads,),
        "bias": (heads,),
        "d_y": (tokens, heads),
    }
    return OP.case(name, inputs)


CASES = (
    _case("tokens", 5),
    _case("one head", 5, 1),
    _case("large", 6, size=3.0, shift=12.0),
    _case("far below zero", 6, shift=-12.0),
    _case("one token", 1),
    _case("no tokens", 0),
    _case("training size", 67, 16),
)


MUTANTS = (
    wrong("rate forgotten", "d_a", lambda s, d: d / s.log_rate.exp()),
    wrong("logarithm of the rate", "d_a", lambda s, d: d / s.log_rate.exp() * s.log_rate),
    wrong("bias forgotten", "d_a", lambda g, s: -s.log_rate.exp() * g * torch.sigmoid(s.a)),
    wrong(
        "softplus in place of its slope",
        "d_a",
        lambda g, s: -s.log_rate.exp() * g * functional.softplus(s.a + s.bias),
    ),
    wrong("heads reversed", "d_a", lambda g, s: -s.log_rate.exp().flip(0) * g * torch.sigmoid(s.a + s.bias)),
)


PROOFS = (OP.proof(CASES, MUTANTS),)
