"""Gated linear units: cases and mutants."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.glu import CHUNK_ELEMENTS, GLUSaved, glu_backward, glu_forward, glu_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants


def usual_unit(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The unit as one writes it for autograd."""
    if activation == "silu":
        return functional.silu(gate) * up
    if activation == "sigmoid":
        return torch.sigmoid(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def _case(
    name: str, activation: str, lead: tuple[int, ...], n: int = 7, *, size: float = 1.5, side_by_side: bool = False
) -> Case:
    draw = Draw(f"glu: {name}")
    tensors = {
        "gate": draw.normal(*lead, n, size=size),
        "up": draw.normal(*lead, n),
        "d_y": draw.normal(*lead, n),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        if not side_by_side:
            y, saved = glu_forward(t["gate"], t["up"], activation)
            grads = backward(t["d_y"], saved)
        else:
            # As the decoder block calls it: both are columns of one buffer, and so are their gradients; the y that is
            # compared is the one that the backward leaves in d_y's place.
            gate_up = torch.cat([t["gate"], t["up"]], dim=-1)
            used, y = torch.full_like(t["gate"], math.nan), t["d_y"].clone()
            _, saved = glu_forward(gate_up[..., :n], gate_up[..., n:], activation, out=used)
            grads = backward(y, saved, out=torch.empty_like(gate_up), again=y)
        return ByHand(y, {"gate": grads.d_gate, "up": grads.d_up})

    def reference(t: Tensors) -> Tensor:
        return glu_reference(t["gate"], t["up"], activation)

    def usual(t: Tensors) -> Tensor:
        return usual_unit(t["gate"], t["up"], activation)

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("SwiGLU", "silu", (5,)),
    _case("GeGLU", "gelu_tanh", (5,)),
    _case("SwiGLU, documents and rows", "silu", (2, 5)),
    _case("SwiGLU, side by side in one buffer", "silu", (5,), side_by_side=True),
    _case("GeGLU, side by side in one buffer", "gelu_tanh", (2, 5), side_by_side=True),
    _case("GLU", "sigmoid", (5,)),
    _case("GLU, side by side in one buffer", "sigmoid", (2, 5), side_by_side=True),
    _case("GLU, saturated", "sigmoid", (5,), size=20.0),
    _case("SwiGLU, saturated", "silu", (5,), size=30.0),
    _case("GeGLU, saturated", "gelu_tanh", (5,), size=30.0),
    _case("SwiGLU, several chunks", "silu", (CHUNK_ELEMENTS // 257 + 3,), 257, side_by_side=True),
    _case("GeGLU, many columns", "gelu_tanh", (5,), 83, side_by_side=True),
    _case("SwiGLU, one row", "silu", (1,)),
    _case("GeGLU, one row", "gelu_tanh", (1,)),
    _case("SwiGLU, no rows", "silu", (0,)),
    _case("GeGLU, no rows", "gelu_tanh", (2, 0), side_by_side=True),
)


def _value(s: GLUSaved) -> Tensor:
    if s.activation == "sigmoid":
        return torch.sigmoid(s.gate)
    return functional.silu(s.gate) if s.activation == "silu" else functional.gelu(s.gate, approximate="tanh")


def _gelu_slope_without_inner(s: GLUSaved) -> Tensor:
    """The tanh form's slope with the derivative of its argument forgotten; for SiLU σ alone."""
    if s.activation != "gelu_tanh":
        return torch.sigmoid(s.gate)
    t = 2 * _value(s) / s.gate - 1
    return (1 + t) / 2 + s.gate * (1 - t * t) / 2


def _other(s: GLUSaved) -> GLUSaved:
    return s._replace(activation="gelu_tanh" if s.activation == "silu" else "silu")


MUTANTS = (
    *standard_mutants("d_gate", "d_up"),
    Mutant("up forgotten", "d_gate", lambda g, s, _right: glu_backward(g, s._replace(up=torch.ones_like(s.up))).d_gate),
    Mutant("inner derivative missing", "d_gate", lambda g, s, _right: g * s.up * _gelu_slope_without_inner(s)),
    Mutant("φ for φ′", "d_gate", lambda g, s, _right: g * s.up * _value(s)),
    Mutant("activation forgotten", "d_gate", lambda g, s, _right: g * s.up),
    Mutant("the other activation", "d_gate", lambda g, s, _right: glu_backward(g, _other(s)).d_gate),
    Mutant("activation forgotten", "d_up", lambda g, s, _right: g * s.gate),
    Mutant("the other activation", "d_up", lambda g, s, _right: glu_backward(g, _other(s)).d_up),
    Mutant("gate and up swapped", "d_up", lambda g, s, _right: g * s.up),
    Mutant("rows reversed", "d_up", lambda g, s, _right: g.flip(0) * _value(s)),
)

PROOFS = (OpProof("glu", glu_backward, CASES, MUTANTS, loops=True),)
