"""Gated linear units: cases and mutants."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from backhand.kernels.pieces import piece_size
from backhand.ops.activation import CHUNK_ELEMENTS
from backhand.ops.glu import GLUGrads, GLUSaved
from backhand.verify.mutants import Backward, later_pieces_missing, wrong
from backhand.verify.scaffold import ROWS, Arguments, Axis, Op


def activated(gate: Tensor, activation: str) -> Tensor:
    """Compute φ as usually written for autograd."""
    if activation == "sigmoid":
        return torch.sigmoid(gate)
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def baseline_unit(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute the unit as usually written for autograd."""
    return activated(gate, activation) * up


def _side_by_side(t: Arguments, backward: Backward) -> tuple[Tensor, GLUGrads]:
    """Call the op as the decoder block does: gate and up are columns of one buffer, and so are their gradients.

    The proof compares the y that the backward writes over d_y.
    """
    gate_up = torch.cat([t["gate"], t["up"]], dim=-1)
    gate, up = gate_up.chunk(2, dim=-1)
    y = t["d_y"].clone()
    _, saved = t.call(OP.forward, gate=gate, up=up, out=torch.full_like(t["gate"], math.nan))
    return y, backward(y, saved, out=torch.empty_like(gate_up), output_buffer=y)


OP = Op(
    "glu",
    {"gate": "size: *lead n", "up": "*lead n", "d_y": "*lead n"},
    {"activation": ..., "lead": ROWS, "n": Axis(7, 83), "size": 1.5, "side_by_side": False},
    baseline=baseline_unit,
    runners={"side_by_side": _side_by_side},
    compiled=True,
)


CASES = (
    *OP.standard_cases("SwiGLU: ", activation="silu"),
    *OP.standard_cases("GeGLU: ", activation="gelu_tanh"),
    *OP.standard_cases("exact GeGLU: ", activation="gelu"),
    *OP.standard_cases("GLU: ", activation="sigmoid"),
    OP.case("SwiGLU, side by side in one buffer", "silu", (5,), side_by_side=True),
    OP.case("GeGLU, side by side in one buffer", "gelu_tanh", (2, 5), side_by_side=True),
    OP.case("GLU, side by side in one buffer", "sigmoid", (2, 5), side_by_side=True),
    OP.case("exact GeGLU, saturated", "gelu", (5,), size=30.0),
    OP.case("exact GeGLU, several chunks side by side", "gelu", (3, 3), 5, side_by_side=True, pieces=20),
    OP.case("GLU, saturated", "sigmoid", (5,), size=20.0),
    OP.case("SwiGLU, saturated", "silu", (5,), size=30.0),
    OP.case("GeGLU, saturated", "gelu_tanh", (5,), size=30.0),
    OP.case("SwiGLU, many rows", "silu", (67,), 257, side_by_side=True, threads=3),
    OP.case("GeGLU, several chunks", "gelu_tanh", (9,), 5, pieces=20),
    OP.case("GeGLU, several chunks side by side", "gelu_tanh", (3, 3), 5, side_by_side=True, pieces=20),
    OP.case("GeGLU, many rows", "gelu_tanh", (67,), 259, threads=3),
    OP.case("GeGLU, many columns", "gelu_tanh", (5,), 83, side_by_side=True),
    OP.case("GeGLU, documents without rows", "gelu_tanh", (2, 0), side_by_side=True),
)


def _gelu_slope_without_inner(s: GLUSaved) -> Tensor:
    """Return the tanh form's slope without the derivative of its argument; for SiLU only σ."""
    if s.activation != "gelu_tanh":
        return torch.sigmoid(s.gate)
    t = 2 * activated(s.gate, s.activation) / s.gate - 1
    return (1 + t) / 2 + s.gate * (1 - t * t) / 2


def _first_chunk(s: GLUSaved, d: Tensor) -> Tensor:
    """Return the gradient of the activation that is computed in chunks."""
    if s.activation not in ("gelu", "gelu_tanh"):
        return d
    return later_pieces_missing(d, piece_size(CHUNK_ELEMENTS) // max(d.shape[-1], 1))


MUTANTS = (
    wrong("slope of the first chunk alone", "d_gate", lambda s, d: _first_chunk(s, d)),
    OP.perturb("up forgotten", "d_gate", up=lambda s: torch.ones_like(s.up)),
    wrong("inner derivative missing", "d_gate", lambda g, s: g * s.up * _gelu_slope_without_inner(s)),
    wrong("density missing", "d_gate", lambda g, s: g * s.up * activated(s.gate, s.activation) / s.gate),
    wrong("φ for φ′", "d_gate", lambda g, s: g * s.up * activated(s.gate, s.activation)),
    wrong("activation forgotten", "d_gate", lambda g, s: g * s.up),
    OP.perturb(
        "the other activation", "d_gate d_up", activation=lambda s: "gelu_tanh" if s.activation == "silu" else "silu"
    ),
    wrong("activation forgotten", "d_up", lambda g, s: g * s.gate),
    wrong("gate and up swapped", "d_up", lambda g, s: g * s.up),
    wrong("rows reversed", "d_up", lambda g, s: g.flip(0) * activated(s.gate, s.activation)),
)
