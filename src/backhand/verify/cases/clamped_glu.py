"""The clamped gated linear unit: cases and mutants. No input lies where a finite difference crosses the bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backhand.ops.clamped_glu import (
    CHUNK_ELEMENTS,
    Clamp,
    ClampedGLUSaved,
    clamped_glu_backward,
    clamped_glu_forward,
    clamped_glu_reference,
)
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

CLAMP = Clamp(1.702, 1.1)
MARGIN = 0.02


def _off_bounds(x: Tensor, limit: float) -> Tensor:
    """Numbers as given, those near the bounds moved away from them."""
    near = (x.abs() - limit).abs() < MARGIN
    return torch.where(near, x * (1 + 3 * MARGIN / limit), x)


def _case(
    name: str,
    lead: tuple[int, ...],
    n: int = 7,
    *,
    size: float = 1.5,
    side_by_side: bool = False,
    clamp: Clamp = CLAMP,
) -> Case:
    draw = Draw(f"clamped_glu: {name}")
    tensors = {
        "gate": _off_bounds(draw.normal(*lead, n, size=size), clamp.limit),
        "up": _off_bounds(draw.normal(*lead, n, size=size), clamp.limit),
        "d_y": draw.normal(*lead, n),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        if not side_by_side:
            y, saved = clamped_glu_forward(t["gate"], t["up"], clamp)
            grads = backward(t["d_y"], saved)
        else:
            # As the decoder's experts call it: columns of one buffer, gradients too; y where something else was.
            gate_up = torch.cat([t["gate"], t["up"]], dim=-1)
            used = torch.full_like(t["gate"], math.nan)
            y, saved = clamped_glu_forward(gate_up[..., :n], gate_up[..., n:], clamp, out=used)
            grads = backward(t["d_y"], saved, out=torch.empty_like(gate_up))
        return ByHand(y, {"gate": grads.d_gate, "up": grads.d_up})

    def usual(t: Tensors) -> Tensor:
        gate, up = t["gate"].clamp(max=clamp.limit), t["up"].clamp(-clamp.limit, clamp.limit)
        return (up + 1) * gate * torch.sigmoid(clamp.gain * gate)

    return Case(name, tensors, by_hand, lambda t: clamped_glu_reference(t["gate"], t["up"], clamp), usual)


CASES = (
    _case("rows", (5,)),
    _case("documents and rows", (2, 5)),
    _case("side by side in one buffer", (5,), side_by_side=True),
    _case("side by side, documents and rows", (2, 5), side_by_side=True),
    _case("gpt-oss's numbers", (11,), size=5.0, clamp=Clamp(1.702, 7.0)),
    _case("nothing clamped", (5,), clamp=Clamp(0.9, 40.0)),
    _case("everything clamped", (5,), size=30.0, clamp=Clamp(1.3, 0.2)),
    _case("several chunks", (CHUNK_ELEMENTS // 257 + 3,), 257, side_by_side=True),
    _case("one row", (1,)),
    _case("no rows", (0,)),
    _case("no rows in documents", (2, 0), side_by_side=True),
)


def _unclamped(s: ClampedGLUSaved) -> ClampedGLUSaved:
    return s._replace(clamp=Clamp(s.clamp.gain, math.inf))


def _through(d_y: Tensor, s: ClampedGLUSaved) -> Tensor:
    """∂L/∂u as if the bounds let every gradient through."""
    gate = s.gate.clamp(max=s.clamp.limit)
    return d_y * gate * torch.sigmoid(s.clamp.gain * gate)


def _lower_bound_too(s: ClampedGLUSaved, right: Tensor) -> Tensor:
    """As if the gate were clamped from below as well."""
    return right.masked_fill(s.gate < -s.clamp.limit, 0.0)


def _upper_bound_alone(d_y: Tensor, s: ClampedGLUSaved) -> Tensor:
    return _through(d_y, s).masked_fill(s.up > s.clamp.limit, 0.0)


def _without_one(s: ClampedGLUSaved, right: Tensor) -> Tensor:
    """As if y were û ⊙ â σ."""
    up = s.up.clamp(-s.clamp.limit, s.clamp.limit)
    return right / (up + 1) * up


def _with_gain(s: ClampedGLUSaved, gain: float) -> ClampedGLUSaved:
    return s._replace(clamp=Clamp(gain, s.clamp.limit))


MUTANTS = (
    *standard_mutants("d_gate", "d_up"),
    Mutant("clamp ignored", "d_gate", lambda g, s, _right: clamped_glu_backward(g, _unclamped(s)).d_gate),
    Mutant("clamp ignored", "d_up", lambda g, s, _right: clamped_glu_backward(g, _unclamped(s)).d_up),
    Mutant("bounds let the gradient through", "d_up", lambda g, s, _right: _through(g, s)),
    Mutant("upper bound alone", "d_up", lambda g, s, _right: _upper_bound_alone(g, s)),
    Mutant("gate clamped from below", "d_gate", lambda _g, s, right: _lower_bound_too(s, right.d_gate)),
    Mutant("one not added", "d_gate", lambda _g, s, right: _without_one(s, right.d_gate)),
    Mutant("gain forgotten", "d_gate", lambda g, s, _right: clamped_glu_backward(g, _with_gain(s, 1.0)).d_gate),
    Mutant("gain forgotten", "d_up", lambda g, s, _right: clamped_glu_backward(g, _with_gain(s, 1.0)).d_up),
    Mutant("gate and up swapped", "d_up", lambda _g, _s, right: right.d_gate),
    Mutant("rows reversed", "d_up", lambda _g, _s, right: right.d_up.flip(0)),
)

PROOFS = (OpProof("clamped_glu", clamped_glu_backward, CASES, MUTANTS),)
