"""The decay gate: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.decay_gate import DecayGateSaved, decay_gate_backward, decay_gate_forward, decay_gate_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants


def _case(name: str, tokens: int, heads: int = 3, *, size: float = 1.0, shift: float = 0.0) -> Case:
    draw = Draw(f"decay_gate: {name}")
    tensors = {
        "a": draw.normal(tokens, heads, size=size) + shift,
        "log_rate": draw.normal(heads),
        "bias": draw.normal(heads),
        "d_y": draw.normal(tokens, heads),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = decay_gate_forward(t["a"], t["log_rate"], t["bias"])
        return ByHand(y, {"a": backward(t["d_y"], saved).d_a})

    def reference(t: Tensors) -> Tensor:
        return decay_gate_reference(t["a"], t["log_rate"], t["bias"])

    return Case(name, tensors, by_hand, reference)


CASES = (
    _case("tokens", 5),
    _case("one head", 5, 1),
    _case("large", 6, size=3.0, shift=12.0),
    _case("far below zero", 6, shift=-12.0),
    _case("one token", 1),
    _case("no tokens", 0),
    _case("training size", 67, 16),
)


def _z(s: DecayGateSaved) -> Tensor:
    return s.a + s.bias


MUTANTS = (
    *standard_mutants("d_a"),
    Mutant("rate forgotten", "d_a", lambda _g, s, right: right.d_a / s.log_rate.exp()),
    Mutant("logarithm of the rate", "d_a", lambda _g, s, right: right.d_a / s.log_rate.exp() * s.log_rate),
    Mutant("bias forgotten", "d_a", lambda g, s, _right: -s.log_rate.exp() * g * torch.sigmoid(s.a)),
    Mutant(
        "softplus in place of its slope",
        "d_a",
        lambda g, s, _right: -s.log_rate.exp() * g * torch.nn.functional.softplus(_z(s)),
    ),
    Mutant("heads reversed", "d_a", lambda g, s, _right: -s.log_rate.exp().flip(0) * g * torch.sigmoid(_z(s))),
)

PROOFS = (OpProof("decay_gate", decay_gate_backward, CASES, MUTANTS),)
