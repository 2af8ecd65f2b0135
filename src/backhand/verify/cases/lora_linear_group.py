"""LoRA linear group: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.lora_linear_group import (
    Factors,
    LoRAGroupSaved,
    lora_linear_group_backward,
    lora_linear_group_forward,
    lora_linear_group_reference,
)
from backhand.verify.case import (
    Backward,
    ByHand,
    Case,
    Draw,
    Mutant,
    OpProof,
    Tensors,
    mean_mutants,
    rows_reversed,
    standard_mutants,
)
from backhand.verify.cases.lora_linear import dropped

SCALINGS = (1.7, 0.6, 2.3)


def _case(
    name: str,
    lead: tuple[int, ...],
    sizes: tuple[int, ...] = (6, 4, 9),
    ranks: tuple[int | None, ...] = (3, 2, 5),
    inputs: int = 7,
    *,
    bias: bool = False,
    dropout: Dropout | None = None,
    input_gradient: bool = True,
) -> Case:
    draw = Draw(f"lora_linear_group: {name}")
    tensors = {
        "x": draw.normal(*lead, inputs),
        "weight": draw.normal(sum(sizes), inputs),
        "d_y": draw.normal(*lead, sum(sizes)),
    }
    if bias:
        tensors["bias"] = draw.normal(sum(sizes))
    for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        if rank is not None:
            tensors[f"lora_A {i}"] = draw.normal(rank, inputs)
            tensors[f"lora_B {i}"] = draw.normal(size, rank)

    def factors(t: Tensors) -> list[Factors | None]:
        return [
            None if rank is None else Factors(t[f"lora_A {i}"], t[f"lora_B {i}"], SCALINGS[i])
            for i, rank in enumerate(ranks)
        ]

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = lora_linear_group_forward(t["x"], t["weight"], t.get("bias"), sizes, factors(t), dropout)
        grads = backward(t["d_y"], saved, input_gradient=input_gradient)
        gradients: Tensors = {"x": grads.d_x} if input_gradient else {}
        for i, (d_A, d_B) in enumerate(zip(grads.d_lora_A, grads.d_lora_B, strict=True)):
            if d_A is not None:
                gradients |= {f"lora_A {i}": d_A, f"lora_B {i}": d_B}
        return ByHand(y, gradients)

    def reference(t: Tensors) -> Tensor:
        mask = multiplier(t["x"], dropout)
        return lora_linear_group_reference(t["x"], t["weight"], t.get("bias"), sizes, factors(t), mask)

    def usual(t: Tensors) -> Tensor:
        x = dropped(t["x"], dropout)
        outputs = list(functional.linear(t["x"], t["weight"], t.get("bias")).split(sizes, dim=-1))
        for i, member in enumerate(factors(t)):
            if member is not None:
                h = functional.linear(x, member.lora_A)
                outputs[i] = outputs[i] + functional.linear(h, member.lora_B) * member.scaling
        return torch.cat(outputs, dim=-1)

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("three members", (5,)),
    _case("documents and rows", (2, 5)),
    _case("bias", (5,), bias=True),
    _case("dropout", (5,), dropout=Dropout(0.4, 17)),
    _case("dropout, bias", (2, 5), bias=True, dropout=Dropout(0.25, 99)),
    _case("only the last adapted", (5,), ranks=(None, None, 4), dropout=Dropout(0.4, 3)),
    _case("first and last adapted", (5,), ranks=(3, None, 2)),
    _case("none adapted", (5,), ranks=(None, None, None), bias=True, dropout=Dropout(0.4, 3)),
    _case("members of one shape", (5,), sizes=(6, 6), ranks=(3, 3)),
    _case("no input gradient", (5,), input_gradient=False, dropout=Dropout(0.4, 4)),
    _case("one row", (1,)),
    _case("no rows", (0,), bias=True, dropout=Dropout(0.4, 4)),
    _case("training size", (67,), sizes=(96, 40, 48), ranks=(8, 6, 4), inputs=88, dropout=Dropout(0.1, 5)),
)


def _redo(d_y: Tensor, saved: LoRAGroupSaved, **changes: Any) -> Any:
    """The right backward on changed saved values."""
    return lora_linear_group_backward(d_y, saved._replace(**changes))


def _with_scalings(saved: LoRAGroupSaved, scalings: list[float]) -> tuple[Factors | None, ...]:
    return tuple(
        None if member is None else member._replace(scaling=scaling)
        for member, scaling in zip(saved.factors, scalings, strict=True)
    )


def _unscaled(saved: LoRAGroupSaved) -> tuple[Factors | None, ...]:
    return _with_scalings(saved, [1.0] * len(saved.factors))


def _of_the_first(saved: LoRAGroupSaved) -> tuple[Factors | None, ...]:
    """Every member with the first adapted member's scaling."""
    first = next((member.scaling for member in saved.factors if member is not None), 1.0)
    return _with_scalings(saved, [first] * len(saved.factors))


def _one_member_only(d_y: Tensor, saved: LoRAGroupSaved) -> Tensor:
    """d_x from the frozen weights and the first member's adapter: the others' low-rank terms missing."""
    others = [None] * (len(saved.factors) - 1)
    first = saved.factors[0]
    h = saved.h[..., : 0 if first is None else first.lora_A.shape[0]]
    d_x: Tensor = _redo(d_y, saved, factors=(first, *others), h=h).d_x
    return d_x


def _backwards_if_alike(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The members' gradients in reverse order, where no shape gives it away."""
    shapes = {None if gradient is None else gradient.shape for gradient in gradients}
    return gradients[::-1] if len(shapes) == 1 else gradients


MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B"),
    Mutant("scaling forgotten", "d_x", lambda g, s, _right: _redo(g, s, factors=_unscaled(s)).d_x),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, factors=_unscaled(s)).d_lora_A),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, factors=_unscaled(s)).d_lora_B),
    Mutant("one scaling for all", "d_lora_A", lambda g, s, _right: _redo(g, s, factors=_of_the_first(s)).d_lora_A),
    Mutant("one scaling for all", "d_lora_B", lambda g, s, _right: _redo(g, s, factors=_of_the_first(s)).d_lora_B),
    Mutant("low-rank terms missing", "d_x", lambda g, s, _right: g @ s.weight),
    Mutant("first member's low-rank term only", "d_x", lambda g, s, _right: _one_member_only(g, s)),
    Mutant("members swapped", "d_lora_A", lambda _g, _s, right: _backwards_if_alike(right.d_lora_A)),
    Mutant("members swapped", "d_lora_B", lambda _g, _s, right: _backwards_if_alike(right.d_lora_B)),
    Mutant("rows reversed", "d_lora_A", lambda g, s, _right: _redo(rows_reversed(g), s).d_lora_A),
    Mutant("rows reversed", "d_lora_B", lambda g, s, _right: _redo(rows_reversed(g), s).d_lora_B),
    Mutant("mask ignored", "d_x", lambda g, s, _right: _redo(g, s, dropout=None).d_x),
    Mutant("mask ignored", "d_lora_A", lambda g, s, _right: _redo(g, s, dropout=None).d_lora_A),
    *mean_mutants("d_lora_B"),
)

PROOFS = (OpProof("lora_linear_group", lora_linear_group_backward, CASES, MUTANTS),)
