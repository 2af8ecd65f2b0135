"""Elementwise activations: cases and mutants of all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops import elementwise
from backhand.verify.mutants import Mutant, wrong
from backhand.verify.scaffold import SHAPE, Case, Draw, Op

BASELINE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: functional.relu(x),
    "tanh": lambda x: torch.tanh(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "gelu": lambda x: functional.gelu(x),
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": lambda x: functional.silu(x),
}


def _off_zero(draw: Draw, shape: tuple[int, ...], size: float, zeros: bool) -> Tensor:
    """Draw inputs away from zero, where relu has no derivative, or with some zeros."""
    x = draw.normal(*shape, size=size)
    x = x + 0.02 * torch.sign(x)
    return x * (draw.integers(3, *shape) > 0) if zeros else x


def _cases(op: Op) -> tuple[Case, ...]:
    return (
        *op.standard_cases(),
        op.case("near zero", size=0.05),
        op.case("saturated", size=20.0),
        op.case("zeros", zeros=True, exempt=("x",) if op.name == "relu" else ()),
        op.case("one number", ()),
    )


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_without_cubic(x: Tensor) -> Tensor:
    """Return the slope for the argument √(2/π) x of tanh."""
    slope = math.sqrt(2 / math.pi)
    t = torch.tanh(slope * x)
    return (1 + t) / 2 + x * (1 - t * t) * slope / 2


OWN_MUTANTS: dict[str, tuple[tuple[Mutant, ...], ...]] = {
    "relu": (
        wrong("mask ignored", "d_x", lambda g: g.clone()),
        wrong("mask inverted", "d_x", lambda g, s: g * (s.y <= 0)),
        wrong("leak of 0.01", "d_x", lambda g, s: torch.where(s.y > 0, g, 0.01 * g)),
        wrong("mask of the gradient's sign", "d_x", lambda g: g * (g > 0)),
    ),
    "tanh": (
        wrong("square forgotten", "d_x", lambda g, s: g * (1 - s.y)),
        wrong("plus for minus", "d_x", lambda g, s: g * (1 + s.y * s.y)),
        wrong("y taken for x", "d_x", lambda g, s: g * (1 - torch.tanh(s.y) ** 2)),
    ),
    "sigmoid": (
        wrong("tanh's slope", "d_x", lambda g, s: g * (1 - s.y * s.y)),
        wrong("second factor missing", "d_x", lambda g, s: g * s.y),
        wrong("y taken for x", "d_x", lambda g, s: g * torch.sigmoid(s.y) * (1 - torch.sigmoid(s.y))),
    ),
    "gelu": (
        wrong("density term missing", "d_x", lambda g, s: g * torch.special.ndtr(s.x)),
        wrong("x forgotten", "d_x", lambda g, s: g * (torch.special.ndtr(s.x) + _normal_density(s.x))),
        wrong("the tanh form's slope", "d_x", lambda g, s: elementwise.gelu_tanh_backward(g, s).d_x),
    ),
    "gelu_tanh": (
        wrong("cubic term forgotten", "d_x", lambda g, s: g * _gelu_tanh_without_cubic(s.x)),
        wrong("the exact form's slope", "d_x", lambda g, s: elementwise.gelu_backward(g, s).d_x),
    ),
    "silu": (
        wrong("second term missing", "d_x", lambda g, s: g * torch.sigmoid(s.x)),
        wrong("x forgotten", "d_x", lambda g, s: g * torch.sigmoid(s.x) * (2 - torch.sigmoid(s.x))),
        wrong("sigmoid's slope", "d_x", lambda g, s: g * torch.sigmoid(s.x) * (1 - torch.sigmoid(s.x))),
    ),
}

PROOFS = tuple(
    op.proof(_cases(op), OWN_MUTANTS[op.name])
    for op in (
        Op(
            name,
            {"x": _off_zero, "d_y": "*shape"},
            {"shape": SHAPE, "size": 1.5, "zeros": False},
            baseline=BASELINE[name],
        )
        for name in OWN_MUTANTS
    )
)
