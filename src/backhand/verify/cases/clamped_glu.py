"""The clamped gated linear unit: cases and mutants. No input is so near a bound that a finite difference crosses it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size
from backhand.ops.clamped_glu import CHUNK_ELEMENTS, Clamp, ClampedGLUSaved
from backhand.verify.mutants import Backward, later_pieces_missing, wrong
from backhand.verify.scaffold import ROWS, Arguments, Axis, Draw, Op

CLAMP = Clamp(1.702, 1.1)
MARGIN = 0.02


def _baseline(gate: Tensor, up: Tensor, clamp: Clamp) -> Tensor:
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return (up + 1) * gate * torch.sigmoid(clamp.gain * gate)


def _off_bounds(draw: Draw, lead: tuple[int, ...], n: int, size: float, clamp: Clamp) -> Tensor:
    """Draw random numbers, and move those near the bounds away from them."""
    x = draw.normal(*lead, n, size=size)
    near = (x.abs() - clamp.limit).abs() < MARGIN
    return torch.where(near, x * (1 + 3 * MARGIN / clamp.limit), x)


def _side_by_side(t: Arguments, backward: Backward) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Call the op as the decoder's experts do: gate, up and gradients are columns of one buffer. y is overwritten."""
    gate_up = torch.cat([t["gate"], t["up"]], dim=-1)
    gate, up = gate_up.chunk(2, dim=-1)
    y, saved = t.call(OP.forward, gate=gate, up=up, out=torch.full_like(t["gate"], math.nan))
    return y, backward(t["d_y"], saved, out=torch.empty_like(gate_up))


OP = Op(
    "clamped_glu",
    {"gate": _off_bounds, "up": _off_bounds, "d_y": "*lead n"},
    {"lead": ROWS, "n": Axis(7, 83), "size": 1.5, "side_by_side": False, "clamp": CLAMP},
    baseline=_baseline,
    runners={"side_by_side": _side_by_side},
)

CASES = (
    *OP.standard_cases(),
    OP.case("side by side in one buffer", (5,), side_by_side=True),
    OP.case("side by side, documents and rows", (2, 5), side_by_side=True),
    OP.case("gpt-oss's numbers", (11,), size=5.0, clamp=Clamp(1.702, 7.0)),
    OP.case("nothing clamped", (5,), clamp=Clamp(0.9, 40.0)),
    OP.case("everything clamped", (5,), size=30.0, clamp=Clamp(1.3, 0.2)),
    OP.case("several chunks", (9,), 5, side_by_side=True, pieces=20),
    OP.case("several chunks of documents", (5, 2), 5, pieces=20),
    OP.case("documents without rows", (2, 0), side_by_side=True),
)


def _through(d_y: Tensor, s: ClampedGLUSaved) -> Tensor:
    """Return ∂L/∂u without zeros outside of the bounds."""
    gate = s.gate.clamp(max=s.clamp.limit)
    return d_y * gate * torch.sigmoid(s.clamp.gain * gate)


def _without_one(s: ClampedGLUSaved, right: Tensor) -> Tensor:
    """Return ∂L/∂a for y = û ⊙ â σ."""
    up = s.up.clamp(-s.clamp.limit, s.clamp.limit)
    return right / (up + 1) * up


MUTANTS = (
    wrong(
        "first chunk alone",
        "d_gate d_up",
        lambda d: later_pieces_missing(d, piece_size(CHUNK_ELEMENTS) // max(d.shape[-1], 1)),
    ),
    OP.perturb("clamp ignored", "d_gate d_up", clamp=lambda s: Clamp(s.clamp.gain, math.inf)),
    wrong("bounds let the gradient through", "d_up", lambda g, s: _through(g, s)),
    wrong("upper bound alone", "d_up", lambda g, s: _through(g, s).masked_fill(s.up > s.clamp.limit, 0.0)),
    wrong("gate clamped from below", "d_gate", lambda s, d: d.masked_fill(s.gate < -s.clamp.limit, 0.0)),
    wrong("one not added", "d_gate", lambda s, d: _without_one(s, d)),
    OP.perturb("gain forgotten", "d_gate d_up", clamp=lambda s: Clamp(1.0, s.clamp.limit)),
    wrong("gate and up swapped", "d_up", lambda right: right.d_gate),
    wrong("rows reversed", "d_up", lambda d: d.flip(0)),
)
