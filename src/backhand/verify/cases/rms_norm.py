"""RMSNorm: cases and mutants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from backhand.ops.rms_norm import RMSNormSaved, rms_norm_reference, weight_scale
from backhand.verify.mutants import Backward, flat_rows, mean_of_rows, wrong
from backhand.verify.scaffold import ROWS, Arguments, Axis, Op


def _with_residual(t: Arguments, backward: Backward) -> tuple[Tensor, Any]:
    """Call the norm with a residual: y is the norm and the stream, concatenated."""
    y, saved = t.call(OP.forward)
    d_y, around = (part.contiguous() if t["in_place"] else part for part in t["d_y"].chunk(2, dim=-1))
    grads = backward(d_y, saved, weight_gradient=True, residual=around.contiguous(), out=d_y if t["in_place"] else None)
    return _concatenated(y, t["x"], True), grads


def _concatenated(y: Tensor, x: Tensor, with_residual: bool) -> Tensor:
    return torch.cat([y, x], dim=-1) if with_residual else y


def _reference(x: Tensor, weight: Tensor, eps: float, offset: float, with_residual: bool) -> Tensor:
    return _concatenated(rms_norm_reference(x, weight, eps, offset), x, with_residual)


def baseline_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Compute the norm in transformers' form."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((weight.float() + offset) * normed).to(x.dtype)


def _baseline(x: Tensor, weight: Tensor, eps: float, offset: float, with_residual: bool) -> Tensor:
    return _concatenated(baseline_norm(x, weight, eps, offset), x, with_residual)


OP = Op(
    "rms_norm",
    {"x": "size: *lead columns", "weight": "columns", "d_y": "*lead wide"},
    dict(lead=ROWS, columns=Axis(7, 96), eps=0.03, offset=0.0, size=1.0, weight_gradient=True, into_buffer=False)
    | dict(with_residual=False, in_place=False),
    baseline=_baseline,
    reference=_reference,
    derived={
        "wide": lambda columns, with_residual: 2 * columns if with_residual else columns,
        "out": lambda x, into_buffer: torch.full_like(x, math.nan) if into_buffer else None,
    },
    runners={"with_residual": _with_residual},
    compiled=True,
)


CASES = (
    *OP.standard_cases(),
    OP.case("offset 1", (5,), offset=1.0),
    OP.case("tiny eps", (5,), eps=1e-6),
    OP.case("x below the root of eps", (5,), size=0.01),
    OP.case("large x", (5,), size=1e4, eps=1e-6, offset=1.0),
    OP.case("frozen weight", (5,), weight_gradient=False),
    OP.case("into a used buffer", (5,), offset=1.0, into_buffer=True),
    OP.case("with a residual", (5,), 83, with_residual=True),
    OP.case("one column", (5,), 1),
    OP.case("threads", (67,), 601, with_residual=True, threads=3),
    OP.case("heads, threads", (71, 3), 160, threads=3),
    OP.case("long rows", (3,), 2 * 1024 + 5),
    OP.case("with a residual, in the gradient's place", (5,), 83, with_residual=True, in_place=True),
)


def _x_hat(saved: RMSNormSaved) -> Tensor:
    return saved.x * saved.inverse_rms


def _g(d_y: Tensor, saved: RMSNormSaved) -> Tensor:
    return d_y * weight_scale(saved.weight, saved.offset, d_y.dtype)


MUTANTS = (
    wrong("projection term missing", "d_x", lambda g, s: s.inverse_rms * _g(g, s)),
    wrong(
        "sum for mean in the projection",
        "d_x",
        lambda g, s: s.inverse_rms * (_g(g, s) - _x_hat(s) * (_g(g, s) * _x_hat(s)).sum(-1, keepdim=True)),
    ),
    wrong("projection of the wrong sign", "d_x", lambda g, s, d: 2 * s.inverse_rms * _g(g, s) - d),
    wrong("factor forgotten", "d_x", lambda s, d: d / s.inverse_rms),
    OP.perturb("offset forgotten", "d_x", offset=0.0),
    OP.perturb("weight forgotten", "d_x", weight=lambda s: torch.ones_like(s.weight), offset=0.0),
    wrong("x not normalised", "d_weight", lambda g, s: flat_rows(g * s.x).sum(0)),
    wrong("mean for sum", "d_weight", mean_of_rows),
    wrong("weight inside", "d_weight", lambda g, s, d: d * weight_scale(s.weight, s.offset, g.dtype)),
    wrong("rows reversed", "d_weight", lambda g, s: (flat_rows(g) * flat_rows(_x_hat(s)).flip(0)).sum(0)),
)
