"""Gated units between the factors of an adapter: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.adapted_glu import (
    AdaptedGLUGrads,
    AdaptedGLUSaved,
    adapted_glu_backward,
    adapted_glu_forward,
    adapted_glu_reference,
)
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward
from backhand.ops.lora_group import LoRAGroup
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.low_rank import Member
from backhand.verify.case import (
    Backward,
    ByHand,
    Case,
    Draw,
    OpProof,
    Tensors,
    again,
    flat_rows,
    mean_mutants,
    rows_reversed,
    standard_mutants,
    wrong,
)
from backhand.verify.cases.glu import usual_unit
from backhand.verify.cases.lora_linear import dropped
from backhand.verify.scaffold import START, receiver

SCALINGS = {"gate": 1.7, "up": -0.6, "both": 1.3}
Receivers = tuple[list[Tensor], list[Tensor]]


def _receiving(saved: AdaptedGLUSaved, into: Receivers) -> AdaptedGLUSaved:
    front = (member._replace(d_lora_B=d_B) for member, d_B in zip(saved.front.members, into[0], strict=True))
    behind = (member._replace(d_lora_A=d_A) for member, d_A in zip(saved.behind.members, into[1], strict=True))
    return saved._replace(
        front=saved.front._replace(members=tuple(front)), behind=saved.behind._replace(members=tuple(behind))
    )


def _backward(
    d_y: Tensor, saved: AdaptedGLUSaved, *, into: Receivers | None = None, in_place: bool = False
) -> AdaptedGLUGrads:
    """The backward on copies of what it may overwrite, since mutants read that afterwards.

    into: gradients of lora_B and of lora_A to add to; fresh ones if None. in_place: as the decoder block calls it,
    where a and u make place for their gradients.
    """
    if into is None:
        into = (
            [torch.zeros_like(member.lora_B) for member in saved.front.members],
            [torch.zeros_like(member.lora_A) for member in saved.behind.members],
        )
    saved = _receiving(saved, into)
    if not in_place:
        return adapted_glu_backward(d_y.clone(), saved)
    place = saved.gate_up.clone()
    return adapted_glu_backward(d_y.clone(), saved._replace(gate_up=place), out=place)


def _case(
    name: str,
    activation: str,
    lead: tuple[int, ...],
    n: int = 7,
    ranks: tuple[int, int, int] = (3, 2, 4),
    *,
    in_place: bool = False,
    fused: int = 0,
    dropout: Dropout | None = None,
) -> Case:
    """The output compared is [p | t]; ranks of gate's, up's and the factor behind, 0 for none.

    fused: rank of one factor of gate and up together, in place of theirs. dropout: of what is behind.
    """
    draw = Draw(f"adapted_glu: {name}")
    gate, up, behind = ranks
    sizes = {"gate": (0, n, 0 if fused else gate), "up": (n, n, 0 if fused else up), "both": (0, 2 * n, fused)}
    front = {key: place for key, place in sizes.items() if place[2]}
    tensors = {
        "gate_up": draw.normal(*lead, 2 * n),
        "h": draw.normal(*lead, sum(rank for _, _, rank in front.values())),
        "d_y": draw.normal(*lead, n + behind),
    }
    tensors |= {
        f"lora_B {i}": draw.normal(outputs, rank, size=0.5) for i, (_, outputs, rank) in enumerate(front.values())
    }
    tensors |= {} if not behind else {"lora_A 0": draw.normal(behind, n, size=0.5)}

    def in_front(t: Tensors) -> LoRAGroup:
        members = []
        for i, (key, (column, _, rank)) in enumerate(front.items()):
            lora_B = t[f"lora_B {i}"]
            unread = lora_B.new_zeros(rank, 0)
            members.append(Member(column, unread, lora_B, SCALINGS[key], unread, torch.zeros_like(lora_B)))
        return LoRAGroup(tuple(members))

    def after(t: Tensors) -> LoRAGroup:
        if "lora_A 0" not in t:
            return LoRAGroup((), dropout)
        lora_A = t["lora_A 0"]
        unread = lora_A.new_zeros(0, behind)
        return LoRAGroup((Member(0, lora_A, unread, 1.0, torch.zeros_like(lora_A), unread),), dropout)

    def joined(p: Tensor, t: Tensor | None) -> Tensor:
        return p if t is None else torch.cat([p, t], dim=-1)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        (p, product), saved = adapted_glu_forward(t["gate_up"], activation, in_front(t), t["h"], after(t))
        d_p = t["d_y"][..., :n]
        if behind:
            saved = saved._replace(d_t=t["d_y"][..., n:])
            d_p = d_p + dropped(t["d_y"][..., n:] @ t["lora_A 0"], dropout)
        into = None
        if in_place:
            into = (
                [receiver(member.lora_B) for member in saved.front.members],
                [receiver(member.lora_A) for member in saved.behind.members],
            )
        before = START if in_place else 0.0
        grads = backward(d_p, saved, into=into, in_place=in_place)
        gradients = {"gate_up": grads.d_gate_up, "h": grads.d_h}
        gradients |= {f"lora_B {i}": gradient - before for i, gradient in enumerate(grads.d_lora_B)}
        gradients |= {f"lora_A {i}": gradient - before for i, gradient in enumerate(grads.d_lora_A)}
        return ByHand(joined(p, product), gradients)

    def reference(t: Tensors) -> Tensor:
        mask = multiplier(t["gate_up"][..., :n], dropout)
        return joined(*adapted_glu_reference(t["gate_up"], activation, in_front(t), t["h"], after(t), mask))

    def usual(t: Tensors) -> Tensor:
        whole, first = t["gate_up"], 0
        for i, (key, (column, outputs, rank)) in enumerate(front.items()):
            added = SCALINGS[key] * functional.linear(t["h"][..., first : first + rank], t[f"lora_B {i}"])
            whole = whole + functional.pad(added, (column, 2 * n - column - outputs))
            first += rank
        p = usual_unit(whole[..., :n], whole[..., n:], activation)
        return joined(p, functional.linear(dropped(p, dropout), t["lora_A 0"]) if behind else None)

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
    _case("gate and up as one", "silu", (6,), fused=5),
    _case("gate and up as one, in place", "gelu_tanh", (6,), fused=3, in_place=True),
    _case("dropout behind", "silu", (2, 6), dropout=Dropout(0.4, 17)),
    _case("dropout behind, in place", "gelu_tanh", (13,), 19, in_place=True, dropout=Dropout(0.4, 3)),
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


def _unscaled(s: AdaptedGLUSaved) -> LoRAGroup:
    return s.front._replace(members=tuple(member._replace(scaling=1.0) for member in s.front.members))


def _without_up(g: Tensor, s: AdaptedGLUSaved) -> Tensor:
    """∂L/∂a as if the unit were the activation alone."""
    unit = _unit(s)
    return torch.cat(glu_backward(g, unit._replace(up=torch.ones_like(unit.up))), dim=-1)


def _halves_swapped(d: Tensor) -> Tensor:
    return torch.cat(d.chunk(2, dim=-1)[::-1], dim=-1)


def _behind_of(s: AdaptedGLUSaved, factor: Tensor, right: Any) -> tuple[Tensor, ...]:
    """∂L/∂A with something else, of p's shape, in p̃'s place."""
    return tuple(flat_rows(s.d_t).T @ flat_rows(factor) for _ in right.d_lora_A if s.d_t is not None)


def _of_product(g: Tensor, s: AdaptedGLUSaved, right: AdaptedGLUGrads) -> AdaptedGLUGrads:
    """The gradients of factors with G beside each of them."""
    h: list[Tensor] = []
    found: list[Tensor] = []
    first, twice = 0, torch.cat([g, g], dim=-1)
    for column, _, lora_B, scaling, *_ in s.front.members:
        own = twice[..., column : column + len(lora_B)]
        part = s.h[..., first : first + lora_B.shape[1]]
        first += lora_B.shape[1]
        h.append(scaling * own @ lora_B)
        found.append(scaling * flat_rows(own).T @ flat_rows(part))
    return right._replace(d_h=torch.cat(h, dim=-1) if h else right.d_h, d_lora_B=tuple(found))


def _backwards_if_alike(whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """up's gradient for gate's, where no shape gives it away."""
    return whole[::-1] if len({gradient.shape for gradient in whole}) == 1 else whole


def _product(s: AdaptedGLUSaved) -> Tensor:
    return glu_forward(*_unit(s))[0]


def _undropped(s: AdaptedGLUSaved) -> LoRAGroup:
    return s.behind._replace(dropout=None)


MUTANTS = (
    *standard_mutants("d_gate_up", "d_h", "d_lora_B", "d_lora_A"),
    *wrong("up forgotten", "d_gate_up", _without_up),
    *wrong("gate and up swapped", "d_gate_up", _halves_swapped),
    *again("scaling forgotten", "d_h d_lora_B", _backward, front=_unscaled),
    *wrong("of ∂L/∂p in place of ∂L/∂a and ∂L/∂u", "d_h", lambda g, s, right: _of_product(g, s, right).d_h),
    *wrong("of ∂L/∂p in place of ∂L/∂a and ∂L/∂u", "d_lora_B", lambda g, s, right: _of_product(g, s, right).d_lora_B),
    *wrong("gate and up swapped", "d_lora_B", _backwards_if_alike),
    *wrong("up in place of p", "d_lora_A", lambda s, right: _behind_of(s, _unit(s).up, right)),
    *wrong("∂L/∂p in place of p", "d_lora_A", lambda g, s, right: _behind_of(s, g, right)),
    *wrong("rows reversed", "d_lora_A", lambda s, right: _behind_of(s, rows_reversed(_product(s)), right)),
    *again("mask ignored", "d_lora_A", _backward, behind=_undropped),
    *mean_mutants("d_lora_B", "d_lora_A"),
)

PROOFS = (OpProof("adapted_glu", _backward, CASES, MUTANTS, loops=True),)
