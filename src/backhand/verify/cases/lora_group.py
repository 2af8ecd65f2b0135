"""LoRA linears of one input, and one alone as a group of one: cases and mutants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_group import (
    LoRAGroup,
    LoRAGroupGrads,
    LoRAGroupSaved,
    lora_group_backward,
    lora_group_forward,
    lora_group_reference,
)
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.low_rank import Member
from backhand.ops.rms_norm import (
    RMSNormSaved,
    rms_norm_apply,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)
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
    transposed_if_square,
    transposed_mutants,
    wrong,
)
from backhand.verify.cases.lora_linear import dropped
from backhand.verify.scaffold import START, receiver

SCALINGS = (1.7, 0.6, 2.3)
EPS, OFFSET = 0.03, 0.7
Receivers = Sequence[tuple[Tensor, Tensor]]


def _backward(
    d_y: Tensor, saved: LoRAGroupSaved, *, input_gradient: bool = True, into: Receivers | None = None
) -> LoRAGroupGrads:
    """The backward with fresh tensors to add to, or those of `into`: mutants run it once more."""
    members = saved.group.members
    if into is None:
        into = [(torch.zeros_like(member.lora_A), torch.zeros_like(member.lora_B)) for member in members]
    receiving = tuple(
        member._replace(d_lora_A=d_A, d_lora_B=d_B) for member, (d_A, d_B) in zip(members, into, strict=True)
    )
    saved = saved._replace(group=saved.group._replace(members=receiving))
    return lora_group_backward(d_y, saved, input_gradient=input_gradient)


def _usual_input(t: Tensors) -> Tensor:
    """x as transformers would have it: of a norm, if there is one in front."""
    if "norm" not in t:
        return t["x"]
    wide = t["x"].float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return ((t["norm"].float() + OFFSET) * normed).to(t["x"].dtype)


def _reference_input(t: Tensors) -> Tensor:
    return rms_norm_reference(t["x"], t["norm"], EPS, OFFSET) if "norm" in t else t["x"]


def _input(t: Tensors) -> tuple[Tensor, RMSNormSaved | None]:
    """x by hand, and the norm that it comes from, if it does."""
    return rms_norm_forward(t["x"], t["norm"], EPS, OFFSET) if "norm" in t else (t["x"], None)


def _case(
    name: str,
    lead: tuple[int, ...],
    sizes: tuple[int, ...] = (6, 4, 9),
    ranks: tuple[int | None, ...] = (3, 2, 5),
    inputs: int = 7,
    *,
    bias: bool = False,
    residual: bool = False,
    dropout: Dropout | None = None,
    input_gradient: bool = True,
    strided: bool = False,
    accumulated: bool = False,
    of_norm: bool = False,
) -> Case:
    draw = Draw(f"lora_group: {name}")
    outputs = sum(sizes)
    tensors = {
        "x": draw.normal(*lead, 2 * inputs)[..., ::2] if strided else draw.normal(*lead, inputs),
        "weight": draw.normal(outputs, inputs),
        "d_y": draw.normal(outputs, *lead).movedim(0, -1) if strided else draw.normal(*lead, outputs),
    }
    if bias:
        tensors["bias"] = draw.normal(outputs)
    if residual:
        tensors["residual"] = draw.normal(*lead, outputs)
    if of_norm:
        tensors["norm"] = draw.normal(inputs)
    adapted = [(sum(sizes[:i]), sizes[i], rank, SCALINGS[i]) for i, rank in enumerate(ranks) if rank is not None]
    for i, (_, size, rank, _) in enumerate(adapted):
        tensors |= {f"lora_A {i}": draw.normal(rank, inputs), f"lora_B {i}": draw.normal(size, rank)}

    def group(t: Tensors) -> LoRAGroup:
        members = []
        for i, (column, _, _, scaling) in enumerate(adapted):
            factors = t[f"lora_A {i}"], t[f"lora_B {i}"]
            members.append(Member(column, *factors, scaling, *map(torch.zeros_like, factors)))
        return LoRAGroup(tuple(members), dropout)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        (x, norm), own = _input(t), group(t)
        y, saved = lora_group_forward(x, t["weight"], t.get("bias"), own, t.get("residual"))
        saved = saved if norm is None else saved._replace(x=norm)
        into = [(receiver(member.lora_A), receiver(member.lora_B)) for member in own.members] if accumulated else None
        grads = backward(t["d_y"], saved, input_gradient=input_gradient, into=into)
        before = START if accumulated else 0.0
        gradients: Tensors = {}
        if input_gradient:
            through = None if norm is None else rms_norm_backward(grads.d_x, norm, weight_gradient=False)
            gradients["x"] = grads.d_x if through is None else through.d_x
        for i, (d_A, d_B) in enumerate(zip(grads.d_lora_A, grads.d_lora_B, strict=True)):
            gradients |= {f"lora_A {i}": d_A - before, f"lora_B {i}": d_B - before}
        return ByHand(y, gradients)

    def reference(t: Tensors) -> Tensor:
        x = _reference_input(t)
        mask = multiplier(x, dropout)
        return lora_group_reference(x, t["weight"], t.get("bias"), group(t), t.get("residual"), mask)

    def usual(t: Tensors) -> Tensor:
        frozen_x = _usual_input(t)
        x = dropped(frozen_x, dropout)
        y = functional.linear(frozen_x, t["weight"], t.get("bias"))
        for i, (column, size, _, scaling) in enumerate(adapted):
            delta = functional.linear(functional.linear(x, t[f"lora_A {i}"]), t[f"lora_B {i}"]) * scaling
            y = y + functional.pad(delta, (column, outputs - column - size))
        return y + t["residual"] if "residual" in t else y

    return Case(name, tensors, by_hand, reference, usual)


def _lone(
    name: str,
    lead: tuple[int, ...],
    inputs: int = 7,
    outputs: int = 11,
    rank: int = 3,
    *,
    dropout: Dropout | None = None,
    **options: bool,
) -> Case:
    return _case(f"one alone: {name}", lead, (outputs,), (rank,), inputs, dropout=dropout, **options)


CASES = (
    _case("three members", (5,)),
    _case("documents and rows", (2, 5)),
    _case("bias", (5,), bias=True),
    _case("residual", (5,), residual=True),
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
    _case("members within a block", (37,), sizes=(45, 7, 13), ranks=(3, 16, 1), inputs=61, bias=True),
    _case("members over blocks", (19,), sizes=(33, 70, 40), ranks=(40, None, 3), inputs=64),
    _case("the one in the middle adapted", (70,), sizes=(5, 59, 33), ranks=(None, 16, None), inputs=35),
    _case("dropout, long sums", (37,), sizes=(45, 7), ranks=(3, 16), inputs=141, dropout=Dropout(0.4, 17)),
    _case("sums in parts", (9,), sizes=(20, 30, 17), ranks=(2, 1, None), inputs=1539),
    _case("added to what is there", (5,), ranks=(3, None, 2), bias=True, accumulated=True),
    _case("added, several blocks", (139,), sizes=(35, 4, 131), ranks=(3, 2, 19), inputs=141, accumulated=True),
    _case("added, several parts of rows", (541,), sizes=(33, 4), ranks=(4, None), inputs=5, accumulated=True),
    _case("of a norm", (2, 5), of_norm=True),
    _case("of a norm, dropout", (5,), ranks=(3, None, 2), of_norm=True, dropout=Dropout(0.4, 17)),
    _case("of a norm, none adapted", (5,), ranks=(None, None, None), of_norm=True),
    _case("of a norm, several blocks", (139,), sizes=(35, 4), ranks=(3, 16), inputs=141, of_norm=True),
    _lone("documents and rows", (2, 5)),
    _lone("residual", (5,), residual=True),
    _lone("bias and residual", (5,), bias=True, residual=True),
    _lone("dropout, bias, residual", (5,), bias=True, residual=True, dropout=Dropout(0.25, 2**40)),
    _lone("rank 1", (5,), rank=1),
    _lone("rank above both sizes", (6,), 4, 3, 5),
    _lone("square weight", (5,), 7, 7),
    _lone("square factors", (5,), 3, 3),
    _lone("no input gradient", (5,), input_gradient=False),
    _lone("strided x and d_y", (5,), strided=True),
    _lone("one row", (1,), bias=True),
    _lone("no rows", (0,), bias=True),
    _lone("more rows, odd sizes", (37,), 61, 45, bias=True, residual=True),
    _lone("more rows, rank 1", (9,), 33, 150, 1, bias=True),
    _lone("more rows, rank 16", (70,), 96, 64, 16),
    _lone("more rows, rank 40", (33,), 63, 35, 40, residual=True),
    _lone("sums in parts", (13,), 1541, 37, 3, bias=True),
    _lone("several panels", (11,), 37, 1559, 3),
    _lone("added to what is there", (5,), accumulated=True),
    _lone("added, rank 1, dropout", (5,), rank=1, dropout=Dropout(0.4, 17), accumulated=True),
    _lone("added, several blocks", (139,), 141, 35, 19, accumulated=True),
    _lone("added, several parts of rows", (300,), 5, 33, 4, accumulated=True),
    _lone("of a norm", (2, 5), of_norm=True),
    _lone("of a norm, dropout", (5,), of_norm=True, dropout=Dropout(0.4, 17)),
    _lone("of a norm, no rows", (0,), of_norm=True, bias=True),
    _lone("of a norm, added, several blocks", (139,), 141, 35, 19, of_norm=True, accumulated=True),
)


def _changed(saved: LoRAGroupSaved, **changes: object) -> LoRAGroup:
    """The group with each member's fields as the functions of `changes` have them."""
    members = tuple(
        member._replace(**{name: change(member) for name, change in changes.items() if callable(change)})
        for member in saved.group.members
    )
    return saved.group._replace(members=members)


def _first_scaling(s: LoRAGroupSaved) -> LoRAGroup:
    first = s.group.members[0].scaling if s.group.members else 1.0
    return _changed(s, scaling=lambda _member: first)


def _one_member_only(g: Tensor, s: LoRAGroupSaved) -> Tensor | None:
    """d_x from the frozen weights and the first layer's adapter: the others' low-rank terms missing."""
    first = tuple(member for member in s.group.members[:1] if member.column == 0)
    h = s.h[..., : sum(len(member.lora_A) for member in first)]
    return _backward(g, s._replace(group=s.group._replace(members=first), h=h)).d_x


def _backwards_if_alike(whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The members' gradients in reverse order, where no shape gives it away."""
    return whole[::-1] if len({gradient.shape for gradient in whole}) == 1 else whole


def _without_dropout(s: LoRAGroupSaved) -> LoRAGroup:
    return s.group._replace(dropout=None)


def _next_seed(s: LoRAGroupSaved) -> LoRAGroup:
    dropout = s.group.dropout
    return s.group._replace(dropout=dropout and dropout._replace(seed=dropout.seed + 1))


def _of_input(g: Tensor, s: LoRAGroupSaved) -> tuple[Tensor, ...]:
    """d_lora_B with an undropped x where its h belongs."""
    x = flat_rows(rms_norm_apply(*s.x) if isinstance(s.x, RMSNormSaved) else s.x)
    found = []
    for member in s.group.members:
        own = flat_rows(g)[:, member.column : member.column + len(member.lora_B)]
        found.append(0.5 * member.scaling * own.T @ (x @ member.lora_A.T))
    return tuple(found)


def _unscaled(s: LoRAGroupSaved) -> LoRAGroup:
    return _changed(s, scaling=lambda _member: 1.0)


def _transposed_B(s: LoRAGroupSaved) -> LoRAGroup:
    return _changed(s, lora_B=lambda member: transposed_if_square(member.lora_B))


MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B"),
    *again("scaling forgotten", "d_x d_lora_A d_lora_B", _backward, group=_unscaled),
    *again("one scaling for all", "d_lora_A d_lora_B", _backward, group=_first_scaling),
    *wrong("low-rank terms missing", "d_x", lambda g, s: g @ s.weight),
    *wrong("frozen term missing", "d_x", lambda g, s, d: d - g @ s.weight),
    *wrong("first member's low-rank term only", "d_x", _one_member_only),
    *again("lora_B transposed", "d_x", _backward, group=_transposed_B),
    *transposed_mutants("d_lora_A", "d_lora_B"),
    *wrong("members swapped", "d_lora_A d_lora_B", _backwards_if_alike),
    *again("rows reversed", "d_lora_A d_lora_B", _backward, g=lambda g: rows_reversed(g).view(g.shape)),
    *again("mask ignored", "d_x d_lora_A", _backward, group=_without_dropout),
    *again("mask of another seed", "d_x d_lora_A", _backward, group=_next_seed),
    *wrong("half of h", "d_lora_B", _of_input),
    *wrong("lora_B read as zero", "d_lora_A", lambda d: torch.zeros_like(d)),
    *mean_mutants("d_lora_A", "d_lora_B"),
)

PROOFS = (OpProof("lora_group", _backward, CASES, MUTANTS, loops=True),)
