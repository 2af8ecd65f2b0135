"""Gated units between the factors of an adapter: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.adapted_glu import (
    AdaptedGLUGrads,
    AdaptedGLUSaved,
    Receivers,
    Side,
    adapted_glu_backward,
    adapted_glu_forward,
    adapted_glu_reference,
)
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward
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
    rows_reversed,
    standard_mutants,
)
from backhand.verify.cases.glu import usual_unit

SCALINGS = 1.7, -0.6
START = 0.5


def _sides(t: Tensors) -> tuple[Side | None, Side | None]:
    gate, up = (
        Side(t[name], scaling) if name in t else None
        for name, scaling in zip(("lora_B gate", "lora_B up"), SCALINGS, strict=True)
    )
    return gate, up


def _receivers(saved: AdaptedGLUSaved, lora_A: Tensor | None) -> Receivers:
    """Gradient buffers in which something stands already, float32 or wider as in training."""

    def filled(factor: Tensor) -> Tensor:
        return torch.full_like(factor, START, dtype=torch.promote_types(factor.dtype, torch.float32))

    gate, up = (None if side is None else filled(side.lora_B) for side in saved.sides)
    return Receivers((gate, up), None if lora_A is None else filled(lora_A))


def _backward(
    d_y: Tensor, saved: AdaptedGLUSaved, *, into: Receivers | None = None, in_place: bool = False
) -> AdaptedGLUGrads:
    """The backward on copies of what it may overwrite, since mutants read that afterwards.

    in_place: as the decoder block calls it, where a and u make place for their gradients.
    """
    if not in_place:
        return adapted_glu_backward(d_y.clone(), saved, into=into)
    place = saved.gate_up.clone()
    return adapted_glu_backward(d_y.clone(), saved._replace(gate_up=place), out=place, into=into)


def _case(
    name: str,
    activation: str,
    lead: tuple[int, ...],
    n: int = 7,
    ranks: tuple[int, int, int] = (3, 2, 4),
    *,
    in_place: bool = False,
) -> Case:
    """The output compared is [p | t]; ranks of gate's, up's and the factor behind, 0 for none."""
    draw = Draw(f"adapted_glu: {name}")
    gate, up, behind = ranks
    tensors = {
        "gate_up": draw.normal(*lead, 2 * n),
        "h": draw.normal(*lead, gate + up),
        "d_y": draw.normal(*lead, n + behind),
    }
    tensors |= {} if not gate else {"lora_B gate": draw.normal(n, gate, size=0.5)}
    tensors |= {} if not up else {"lora_B up": draw.normal(n, up, size=0.5)}
    tensors |= {} if not behind else {"lora_A": draw.normal(behind, n, size=0.5)}

    def joined(p: Tensor, t: Tensor | None) -> Tensor:
        return p if t is None else torch.cat([p, t], dim=-1)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        lora_A = t.get("lora_A")
        (p, product), saved = adapted_glu_forward(t["gate_up"], activation, _sides(t), t["h"], lora_A)
        d_p = t["d_y"][..., :n]
        if lora_A is not None:
            saved = saved._replace(d_t=t["d_y"][..., n:])
            d_p = d_p + t["d_y"][..., n:] @ lora_A
        into = _receivers(saved, lora_A) if in_place else None
        before = START if in_place else 0.0
        grads = backward(d_p, saved, into=into, in_place=in_place)
        gradients = {"gate_up": grads.d_gate_up, "h": grads.d_h}
        for name, gradient in zip(("lora_B gate", "lora_B up"), grads.d_lora_B, strict=True):
            if gradient is not None:
                gradients[name] = gradient - before
        if grads.d_lora_A is not None:
            gradients["lora_A"] = grads.d_lora_A - before
        return ByHand(joined(p, product), gradients)

    def reference(t: Tensors) -> Tensor:
        return joined(*adapted_glu_reference(t["gate_up"], activation, _sides(t), t["h"], t.get("lora_A")))

    def usual(t: Tensors) -> Tensor:
        halves, first = [], 0
        for half, side in zip(t["gate_up"].chunk(2, dim=-1), _sides(t), strict=True):
            if side is None:
                halves.append(half)
                continue
            rank = side.lora_B.shape[1]
            halves.append(half + side.scaling * functional.linear(t["h"][..., first : first + rank], side.lora_B))
            first += rank
        p = usual_unit(halves[0], halves[1], activation)
        return joined(p, functional.linear(p, t["lora_A"]) if "lora_A" in t else None)

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("SwiGLU", "silu", (6,)),
    _case("GeGLU, documents and rows", "gelu_tanh", (2, 6)),
    _case("GLU", "sigmoid", (6,)),
    _case("SwiGLU, in place", "silu", (6,), in_place=True),
    _case("GeGLU, in place", "gelu_tanh", (2, 6), 19, in_place=True),
    _case("gate alone adapted", "silu", (6,), ranks=(3, 0, 0)),
    _case("up alone adapted", "silu", (6,), ranks=(0, 3, 0), in_place=True),
    _case("gate and up adapted", "gelu_tanh", (6,), ranks=(2, 3, 0)),
    _case("gate and up of one rank", "silu", (6,), ranks=(3, 3, 2)),
    _case("gate and what is behind adapted", "silu", (6,), ranks=(2, 0, 4), in_place=True),
    _case("only what is behind adapted", "silu", (6,), ranks=(0, 0, 3)),
    _case("none adapted", "silu", (6,), ranks=(0, 0, 0)),
    _case("ranks of whole registers", "silu", (9,), 32, (16, 16, 16), in_place=True),
    _case("ranks above a block", "gelu_tanh", (13,), 70, (19, 35, 17)),
    _case("several blocks", "silu", (101,), 141, (5, 3, 6), in_place=True),
    _case("several parts of rows", "gelu_tanh", (541,), 67, (4, 2, 3), in_place=True),
    _case("one row", "silu", (1,)),
    _case("no rows", "silu", (0,)),
    _case("no rows, in place", "gelu_tanh", (2, 0), in_place=True),
)


def _unit(s: AdaptedGLUSaved) -> GLUSaved:
    gate, up = s.gate_up.chunk(2, dim=-1)
    return GLUSaved(gate, up, s.activation)


def _again(d_y: Tensor, saved: AdaptedGLUSaved, **changes: Any) -> AdaptedGLUGrads:
    """The right backward on changed saved values."""
    return _backward(d_y, saved._replace(**changes))


def _unscaled(s: AdaptedGLUSaved) -> tuple[Side | None, Side | None]:
    gate, up = (None if side is None else side._replace(scaling=1.0) for side in s.sides)
    return gate, up


def _without_up(d_y: Tensor, s: AdaptedGLUSaved) -> Tensor:
    """∂L/∂a as if the unit were the activation alone."""
    unit = _unit(s)
    return torch.cat(glu_backward(d_y, unit._replace(up=torch.ones_like(unit.up))), dim=-1)


def _halves_swapped(gradient: Tensor) -> Tensor:
    return torch.cat(gradient.chunk(2, dim=-1)[::-1], dim=-1)


def _behind_of(s: AdaptedGLUSaved, factor: Tensor, right: Tensor | None) -> Tensor | None:
    """∂L/∂A with something else, of p's shape, in p's place."""
    return None if right is None or s.d_t is None else flat_rows(s.d_t).T @ flat_rows(factor)


def _of_product(d_y: Tensor, s: AdaptedGLUSaved, right: AdaptedGLUGrads) -> AdaptedGLUGrads:
    """The gradients of factors with G beside each of them."""
    h: list[Tensor] = []
    found: list[Tensor | None] = []
    first = 0
    for side in s.sides:
        if side is None:
            found.append(None)
            continue
        part = s.h[..., first : first + side.lora_B.shape[1]]
        first += side.lora_B.shape[1]
        h.append(side.scaling * d_y @ side.lora_B)
        found.append(side.scaling * flat_rows(d_y).T @ flat_rows(part))
    gate, up = found
    return right._replace(d_h=torch.cat(h, dim=-1) if h else right.d_h, d_lora_B=(gate, up))


def _backwards_if_alike(gradients: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """up's gradient for gate's, where no shape gives it away."""
    gate, up = gradients
    alike = gate is not None and up is not None and gate.shape == up.shape
    return (up, gate) if alike else gradients


def _product(s: AdaptedGLUSaved) -> Tensor:
    return glu_forward(*_unit(s))[0]


MUTANTS = (
    *standard_mutants("d_gate_up", "d_h", "d_lora_B", "d_lora_A"),
    Mutant("up forgotten", "d_gate_up", lambda g, s, _right: _without_up(g, s)),
    Mutant("gate and up swapped", "d_gate_up", lambda _g, _s, right: _halves_swapped(right.d_gate_up)),
    Mutant("scaling forgotten", "d_h", lambda g, s, _right: _again(g, s, sides=_unscaled(s)).d_h),
    Mutant("of ∂L/∂p in place of ∂L/∂a and ∂L/∂u", "d_h", lambda g, s, right: _of_product(g, s, right).d_h),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _again(g, s, sides=_unscaled(s)).d_lora_B),
    Mutant("of ∂L/∂p in place of ∂L/∂a and ∂L/∂u", "d_lora_B", lambda g, s, right: _of_product(g, s, right).d_lora_B),
    Mutant("gate and up swapped", "d_lora_B", lambda _g, _s, right: _backwards_if_alike(right.d_lora_B)),
    Mutant("up in place of p", "d_lora_A", lambda _g, s, right: _behind_of(s, _unit(s).up, right.d_lora_A)),
    Mutant("∂L/∂p in place of p", "d_lora_A", lambda g, s, right: _behind_of(s, g, right.d_lora_A)),
    Mutant(
        *("rows reversed", "d_lora_A"),
        lambda _g, s, right: _behind_of(s, rows_reversed(_product(s)), right.d_lora_A),
    ),
    *mean_mutants("d_lora_B", "d_lora_A"),
)

PROOFS = (OpProof("adapted_glu", _backward, CASES, MUTANTS, loops=True),)
