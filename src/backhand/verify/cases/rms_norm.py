"""RMSNorm: cases and mutants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from backhand.ops.rms_norm import RMSNormSaved, gain, rms_norm_backward, rms_norm_forward, rms_norm_reference
from backhand.verify.case import (
    Backward,
    ByHand,
    Case,
    Draw,
    Mutant,
    OpProof,
    Tensors,
    flat_rows,
    mean_mutants,
    standard_mutants,
)


def _case(
    name: str,
    lead: tuple[int, ...],
    columns: int = 7,
    *,
    eps: float = 0.03,
    offset: float = 0.0,
    size: float = 1.0,
    weight_gradient: bool = True,
    into_buffer: bool = False,
    residual: bool = False,
    in_place: bool = False,
) -> Case:
    draw = Draw(f"rms_norm: {name}")
    tensors = {
        "x": draw.normal(*lead, columns, size=size),
        "weight": draw.normal(columns),
        # With a residual the stream goes around the norm as well: y is both, side by side.
        "d_y": draw.normal(*lead, 2 * columns if residual else columns),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        used = torch.full_like(t["x"], math.nan) if into_buffer else None
        y, saved = rms_norm_forward(t["x"], t["weight"], eps, offset, out=used)
        if residual:
            d_y, around = t["d_y"].split(columns, dim=-1)
            if in_place:
                d_y = d_y.contiguous()
            given = {"residual": around.contiguous(), "out": d_y if in_place else None}
            grads = backward(d_y, saved, weight_gradient=weight_gradient, **given)
            y = torch.cat([y, t["x"]], dim=-1)
        else:
            grads = backward(t["d_y"], saved, weight_gradient=weight_gradient)
        return ByHand(y, {"x": grads.d_x} | ({"weight": grads.d_weight} if weight_gradient else {}))

    def reference(t: Tensors) -> Tensor:
        y = rms_norm_reference(t["x"], t["weight"], eps, offset)
        return torch.cat([y, t["x"]], dim=-1) if residual else y

    def usual(t: Tensors) -> Tensor:
        wide = t["x"].float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        y = ((t["weight"].float() + offset) * normed).to(t["x"].dtype)
        return torch.cat([y, t["x"]], dim=-1) if residual else y

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("rows", (5,)),
    _case("heads", (5, 3)),
    _case("offset 1", (5,), offset=1.0),
    _case("tiny eps", (5,), eps=1e-6),
    _case("x below the root of eps", (5,), size=0.01),
    _case("large x", (5,), size=1e4, eps=1e-6, offset=1.0),
    _case("frozen weight", (5,), weight_gradient=False),
    _case("into a used buffer", (5,), offset=1.0, into_buffer=True),
    _case("with a residual", (5,), 83, residual=True),
    _case("one column", (5,), 1),
    _case("one row", (1,)),
    _case("no rows", (0,)),
    _case("training size", (67,), 96),
    _case("with a residual, in the gradient's place", (5,), 83, residual=True, in_place=True),
)


def _x_hat(saved: RMSNormSaved) -> Tensor:
    return saved.x * saved.factor


def _g(d_y: Tensor, saved: RMSNormSaved) -> Tensor:
    return d_y * gain(saved.weight, saved.offset, d_y.dtype)


def _redo(d_y: Tensor, saved: RMSNormSaved, **changes: Any) -> Any:
    return rms_norm_backward(d_y, saved._replace(**changes))


MUTANTS = (
    *standard_mutants("d_x", "d_weight"),
    Mutant("projection term missing", "d_x", lambda g, s, _right: s.factor * _g(g, s)),
    Mutant(
        "sum for mean in the projection",
        "d_x",
        lambda g, s, _right: s.factor * (_g(g, s) - _x_hat(s) * (_g(g, s) * _x_hat(s)).sum(-1, keepdim=True)),
    ),
    Mutant("projection of the wrong sign", "d_x", lambda g, s, right: 2 * s.factor * _g(g, s) - right.d_x),
    Mutant("factor forgotten", "d_x", lambda _g, s, right: right.d_x / s.factor),
    Mutant("offset forgotten", "d_x", lambda g, s, _right: _redo(g, s, offset=0.0).d_x),
    Mutant(
        "weight forgotten", "d_x", lambda g, s, _right: _redo(g, s, weight=torch.ones_like(s.weight), offset=0.0).d_x
    ),
    Mutant("x not normalised", "d_weight", lambda g, s, _right: flat_rows(g * s.x).sum(0)),
    *mean_mutants("d_weight"),
    Mutant("weight inside", "d_weight", lambda g, s, right: right.d_weight * gain(s.weight, s.offset, g.dtype)),
    Mutant("rows reversed", "d_weight", lambda g, s, _right: (flat_rows(g) * flat_rows(_x_hat(s)).flip(0)).sum(0)),
)

PROOFS = (OpProof("rms_norm", rms_norm_backward, CASES, MUTANTS, loops=True),)
