"""Layer norm: cases and mutants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.layer_norm import LayerNormSaved, layer_norm_apply, layer_norm_reference
from backhand.verify.mutants import Backward, flat_rows, mean_of_rows, wrong
from backhand.verify.scaffold import ROWS, Arguments, Axis, Op


def _with_residual(t: Arguments, backward: Backward) -> tuple[Tensor, Any]:
    """Call the norm with a residual and in the place of its gradient: y is the norm and the stream, concatenated.

    The proof compares the y that is recomputed from the saved tensors.
    """
    _, saved = t.call(OP.forward)
    d_y, around = (part.contiguous() for part in t["d_y"].chunk(2, dim=-1))
    grads = backward(d_y, saved, weight_gradient=True, residual=around, out=d_y)
    return _concatenated(layer_norm_apply(saved), t["x"], True), grads


def _concatenated(y: Tensor, x: Tensor, with_residual: bool) -> Tensor:
    return torch.cat([y, x], dim=-1) if with_residual else y


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, with_residual: bool) -> Tensor:
    return _concatenated(layer_norm_reference(x, weight, bias, eps), x, with_residual)


def _baseline(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, with_residual: bool) -> Tensor:
    return _concatenated(functional.layer_norm(x, x.shape[-1:], weight, bias, eps), x, with_residual)


OP = Op(
    "layer_norm",
    {"x": "size: *lead columns", "weight": "columns", "bias": "columns", "d_y": "*lead wide"},
    dict(lead=ROWS, columns=Axis(7, 96), eps=0.03, bias=True, size=1.0, weight_gradient=True, into_buffer=False)
    | dict(with_residual=False),
    baseline=_baseline,
    reference=_reference,
    derived={
        "wide": lambda columns, with_residual: 2 * columns if with_residual else columns,
        "out": lambda x, into_buffer: torch.full_like(x, math.nan) if into_buffer else None,
    },
    runners={"with_residual": _with_residual},
)

CASES = (
    *OP.standard_cases(),
    OP.case("no bias", (5,), bias=False),
    OP.case("tiny eps", (5,), eps=1e-12),
    OP.case("x below the root of eps", (5,), size=0.01),
    OP.case("large x", (5,), size=1e4, eps=1e-6),
    OP.case("frozen weight", (5,), weight_gradient=False, bias=False),
    OP.case("into a used buffer", (5,), into_buffer=True),
    OP.case("with a residual", (2, 5), 83, with_residual=True),
    OP.case("with a residual, no bias", (5,), bias=False, with_residual=True),
    OP.case("two columns", (5,), 2),
)


def _rho(s: LayerNormSaved) -> Tensor:
    return s.statistics[..., 1:]


def _x_hat(s: LayerNormSaved) -> Tensor:
    return (s.x - s.statistics[..., :1]) * _rho(s)


def _along(g: Tensor, s: LayerNormSaved) -> Tensor:
    """Return x̂ (g · x̂) / n."""
    return _x_hat(s) * (g * s.weight * _x_hat(s)).mean(-1, keepdim=True)


def _centred(g: Tensor) -> Tensor:
    return g - g.mean(-1, keepdim=True)


MUTANTS = (
    wrong("mean of g missing", "d_x", lambda g, s: _rho(s) * (g * s.weight - _along(g, s))),
    wrong("projection term missing", "d_x", lambda g, s: _rho(s) * _centred(g * s.weight)),
    wrong(
        "sum for mean in the projection",
        "d_x",
        lambda g, s: _rho(s) * (_centred(g * s.weight) - s.x.shape[-1] * _along(g, s)),
    ),
    wrong("mean of G for that of g", "d_x", lambda g, s, d: d + _rho(s) * (_mean(g * s.weight) - _mean(g))),
    wrong("factor forgotten", "d_x", lambda s, d: d / _rho(s)),
    OP.perturb("x not centred", "d_x d_weight", statistics=lambda s: s.statistics * torch.tensor([0.0, 1.0]).to(s.x)),
    OP.perturb("weight forgotten", "d_x", weight=lambda s: torch.ones_like(s.weight)),
    wrong("x not normalised", "d_weight", lambda g, s: flat_rows(g * s.x).sum(0)),
    wrong("mean for sum", "d_weight d_bias", mean_of_rows),
    wrong("weight inside", "d_weight d_bias", lambda s, d: d * s.weight),
    wrong("rows reversed", "d_weight", lambda g, s: (flat_rows(g) * flat_rows(_x_hat(s)).flip(0)).sum(0)),
    wrong("last row missing", "d_bias", lambda g: flat_rows(g)[:-1].sum(0)),
)


def _mean(g: Tensor) -> Tensor:
    return g.mean(-1, keepdim=True)
