"""Elementwise activations: cases and mutants of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops import elementwise
from backhand.ops.elementwise import SiLUSaved
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

Function = Callable[[Tensor], Tensor]

USUAL: dict[str, Function] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def _case(op: str, name: str, shape: tuple[int, ...], *, size: float = 1.5) -> Case:
    draw = Draw(f"{op}: {name}")
    x = draw.normal(*shape, size=size)
    # Away from zero, where relu has no derivative for finite differences to find.
    tensors = {"x": x + 0.02 * torch.sign(x), "d_y": draw.normal(*shape)}
    forward: Callable[[Tensor], tuple[Tensor, Any]] = getattr(elementwise, f"{op}_forward")
    reference: Function = getattr(elementwise, f"{op}_reference")

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = forward(t["x"])
        return ByHand(y, {"x": backward(t["d_y"], saved).d_x})

    return Case(name, tensors, by_hand, lambda t: reference(t["x"]), lambda t: USUAL[op](t["x"]))


def _cases(op: str) -> tuple[Case, ...]:
    return (
        _case(op, "rows", (5, 7)),
        _case(op, "documents and rows", (2, 5, 3)),
        _case(op, "near zero", (5, 7), size=0.05),
        _case(op, "saturated", (5, 7), size=20.0),
        _case(op, "one number", ()),
        _case(op, "one row", (1, 7)),
        _case(op, "no rows", (0, 7)),
        _case(op, "training size", (67, 96)),
    )


def _sigmoid(s: SiLUSaved) -> Tensor:
    return torch.sigmoid(s.x)


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _normal_distribution(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_tanh_without_cubic(x: Tensor) -> Tensor:
    """The slope as if the argument of tanh were √(2/π) x."""
    slope = math.sqrt(2 / math.pi)
    t = torch.tanh(slope * x)
    return (1 + t) / 2 + x * (1 - t * t) * slope / 2


OWN_MUTANTS: dict[str, tuple[Mutant, ...]] = {
    "relu": (
        Mutant("mask ignored", "d_x", lambda g, _s, _right: g.clone()),
        Mutant("mask inverted", "d_x", lambda g, s, _right: g * ~s.mask),
        Mutant("leak of 0.01", "d_x", lambda g, s, _right: torch.where(s.mask, g, 0.01 * g)),
        Mutant("mask of the gradient's sign", "d_x", lambda g, _s, _right: g * (g > 0)),
    ),
    "tanh": (
        Mutant("square forgotten", "d_x", lambda g, s, _right: g * (1 - s.y)),
        Mutant("plus for minus", "d_x", lambda g, s, _right: g * (1 + s.y * s.y)),
        Mutant("y taken for x", "d_x", lambda g, s, _right: g * (1 - torch.tanh(s.y) ** 2)),
    ),
    "sigmoid": (
        Mutant("tanh's slope", "d_x", lambda g, s, _right: g * (1 - s.y * s.y)),
        Mutant("second factor missing", "d_x", lambda g, s, _right: g * s.y),
        Mutant("y taken for x", "d_x", lambda g, s, _right: g * torch.sigmoid(s.y) * (1 - torch.sigmoid(s.y))),
    ),
    "gelu": (
        Mutant("density term missing", "d_x", lambda g, s, _right: g * _normal_distribution(s.x)),
        Mutant("x forgotten", "d_x", lambda g, s, _right: g * (_normal_distribution(s.x) + _normal_density(s.x))),
        Mutant("the tanh form's slope", "d_x", lambda g, s, _right: elementwise.gelu_tanh_backward(g, s).d_x),
    ),
    "gelu_tanh": (
        Mutant("cubic term forgotten", "d_x", lambda g, s, _right: g * _gelu_tanh_without_cubic(s.x)),
        Mutant("the exact form's slope", "d_x", lambda g, s, _right: elementwise.gelu_backward(g, s).d_x),
    ),
    "silu": (
        Mutant("second term missing", "d_x", lambda g, s, _right: g * _sigmoid(s)),
        Mutant("x forgotten", "d_x", lambda g, s, _right: g * _sigmoid(s) * (2 - _sigmoid(s))),
        Mutant("sigmoid's slope", "d_x", lambda g, s, _right: g * _sigmoid(s) * (1 - _sigmoid(s))),
    ),
}

PROOFS = tuple(
    OpProof(op, getattr(elementwise, f"{op}_backward"), _cases(op), (*standard_mutants("d_x"), *own))
    for op, own in OWN_MUTANTS.items()
)
