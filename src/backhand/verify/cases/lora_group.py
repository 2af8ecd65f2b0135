"""LoRA linears that share an input, also a single one: cases and mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_group import (
    LoRAGroup,
    LoRAGroupGrads,
    LoRAGroupSaved,
    lora_group_backward,
    lora_group_reference,
)
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.low_rank import LoRAFactors
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference
from backhand.verify.cases.lora_linear import dropped, next_seed
from backhand.verify.cases.rms_norm import baseline_norm
from backhand.verify.mutants import (
    Backward,
    mean_of_rows,
    rotate_equal_shapes,
    rows_reversed,
    transpose_if_square,
    wrong,
)
from backhand.verify.scaffold import ROWS, SMALLEST_TILES, Arguments, Axis, Case, Draw, Op, Tensors, grad_buffer

SCALINGS = (1.7, 0.6, 2.3)
EPS, OFFSET = 0.03, 0.7


def regrouped(group: LoRAGroup, **changes: Callable[[LoRAFactors], Any]) -> LoRAGroup:
    """Return the group with changed fields of every member."""
    members = (one._replace(**{field: change(one) for field, change in changes.items()}) for one in group.factors)
    return group._replace(factors=tuple(members))


def _backward(
    d_y: Tensor, saved: LoRAGroupSaved, *, input_gradient: bool = True, accumulate_into: bool | None = None
) -> LoRAGroupGrads:
    """Run the backward with separate gradient buffers, which are not zero with `accumulate_into`."""
    new = grad_buffer if accumulate_into else torch.zeros_like
    group = regrouped(saved.group, d_lora_A=lambda one: new(one.lora_A), d_lora_B=lambda one: new(one.lora_B))
    return lora_group_backward(d_y, saved._replace(group=group), input_gradient=input_gradient)


def _adapted(sizes: tuple[int, ...], ranks: tuple[int | None, ...]) -> list[tuple[int, int, int, float]]:
    """Return (first column, outputs, rank, scaling) of each adapted layer."""
    return [(sum(sizes[:i]), sizes[i], rank, SCALINGS[i]) for i, rank in enumerate(ranks) if rank is not None]


def _factors(draw: Draw, adapted: list[tuple[int, int, int, float]], inputs: int) -> Tensors:
    drawn: Tensors = {}
    for i, (_, size, rank, _) in enumerate(adapted):
        drawn |= {f"lora_A {i}": draw.normal(rank, inputs), f"lora_B {i}": draw.normal(size, rank)}
    return drawn


def member(column: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> LoRAFactors:
    """Return a member with separate gradient buffers."""
    return LoRAFactors(column, lora_A, lora_B, scaling, torch.zeros_like(lora_A), torch.zeros_like(lora_B))


def _group(args: Arguments) -> LoRAGroup:
    adapted = enumerate(args["adapted"])
    members = (member(column, args[f"lora_A {i}"], args[f"lora_B {i}"], s) for i, (column, _, _, s) in adapted)
    return LoRAGroup(tuple(members), args["dropout"])


def _of_norm(t: Arguments, backward: Backward) -> tuple[Tensor, LoRAGroupGrads]:
    """Call the op on the output of a norm. The backward receives what the norm saved instead of x."""
    x, norm = rms_norm_forward(t["x"], t["norm"], EPS, OFFSET)
    y, saved = t.call(OP.forward, x=x)
    grads = backward(t["d_y"], saved._replace(x=norm), **OP.arguments(t))
    return y, grads._replace(d_x=rms_norm_backward(grads.d_x, norm, weight_gradient=False).d_x)


def _reference(x: Tensor, norm: Tensor | None, dropout: Dropout | None, args: Arguments) -> Tensor:
    x = x if norm is None else rms_norm_reference(x, norm, EPS, OFFSET)
    y: Tensor = args.call(lora_group_reference, x=x, m=multiplier(x, dropout))
    return y


def _baseline(args: Arguments) -> Tensor:
    weight = args["weight"]
    frozen_x = baseline_norm(args["x"], args["norm"], EPS, OFFSET) if "norm" in args else args["x"]
    x = dropped(frozen_x, args["dropout"])
    y = functional.linear(frozen_x, weight, args.get("bias"))
    for i, (column, size, _, scaling) in enumerate(args["adapted"]):
        delta = functional.linear(functional.linear(x, args[f"lora_A {i}"]), args[f"lora_B {i}"]) * scaling
        y = y + functional.pad(delta, (column, len(weight) - column - size))
    return y + args["residual"] if "residual" in args else y


OP = Op(
    "lora_group",
    dict(x="*lead inputs", weight="outputs inputs", d_y="*lead outputs", bias="outputs")
    | dict(residual="*lead outputs", norm=lambda draw, inputs, of_norm: draw.normal(inputs) if of_norm else None)
    | dict(factors=_factors),
    dict(lead=ROWS, sizes=Axis((6, 4, 9), (96, 40, 48)), ranks=Axis((3, 2, 5), (8, 6, 4)), inputs=Axis(7, 88))
    | dict(bias=False, residual=False, dropout=None, input_gradient=True, accumulated=False, of_norm=False)
    | dict(tile_bytes=None),
    baseline=_baseline,
    derived={
        "outputs": lambda sizes: sum(sizes),
        "adapted": _adapted,
        "group": _group,
        "accumulate_into": lambda accumulated: accumulated or None,
    },
    runners={"of_norm": _of_norm},
    backward=_backward,
    reference=_reference,
    compiled=True,
)


def _alone(name: str, lead: tuple[int, ...], inputs: int = 7, outputs: int = 11, rank: int = 3, **options: Any) -> Case:
    return OP.case(f"one alone: {name}", lead, (outputs,), (rank,), inputs, **options)


CASES = (
    *OP.standard_cases(bias=True, dropout=Dropout(0.3, 17)),
    OP.case("no bias, no dropout"),
    OP.case("residual", residual=True),
    OP.case("only the last adapted", (5,), ranks=(None, None, 4), dropout=Dropout(0.4, 3)),
    OP.case("first and last adapted", (5,), ranks=(3, None, 2)),
    OP.case("none adapted", (5,), ranks=(None, None, None), bias=True, dropout=Dropout(0.4, 3)),
    OP.case("members of one shape", (5,), sizes=(6, 6), ranks=(3, 3)),
    OP.case("no input gradient", (5,), input_gradient=False, dropout=Dropout(0.4, 4)),
    OP.case("members within a block", (37,), sizes=(45, 7, 13), ranks=(3, 16, 1), inputs=61, bias=True),
    OP.case("members over blocks", (19,), sizes=(33, 70, 40), ranks=(40, None, 3), inputs=64),
    OP.case("the one in the middle adapted", (70,), sizes=(5, 59, 33), ranks=(None, 16, None), inputs=35),
    OP.case("dropout, long sums", (37,), sizes=(45, 7), ranks=(3, 16), inputs=141, dropout=Dropout(0.4, 17)),
    OP.case("sums in parts", (9,), sizes=(20, 30, 17), ranks=(2, 1, None), inputs=1539),
    OP.case("members over tiles", (9,), (33, 70, 40), (4, None, 3), 300, bias=True, tile_bytes=SMALLEST_TILES),
    OP.case(
        "residual, norm, tiles", (9,), (100, 43), (4, 3), 300, residual=True, of_norm=True, tile_bytes=SMALLEST_TILES
    ),
    OP.case("added to what is there", (5,), ranks=(3, None, 2), bias=True, accumulated=True),
    OP.case("added, several blocks", (139,), sizes=(35, 4, 131), ranks=(3, 2, 19), inputs=141, accumulated=True),
    OP.case("added, several parts of rows", (541,), sizes=(33, 4), ranks=(4, None), inputs=5, accumulated=True),
    OP.case("threads", (141,), sizes=(70, 4, 131), ranks=(19, 5, 23), inputs=259, accumulated=True, threads=3),
    OP.case("threads, several parts of rows", (541,), sizes=(67,), ranks=(21,), inputs=97, threads=3),
    OP.case("of a norm", (2, 5), of_norm=True),
    OP.case("of a norm, dropout", (5,), ranks=(3, None, 2), of_norm=True, dropout=Dropout(0.4, 17)),
    OP.case("of a norm, none adapted", (5,), ranks=(None, None, None), of_norm=True),
    OP.case("of a norm, several blocks", (139,), sizes=(35, 4), ranks=(3, 16), inputs=141, of_norm=True, threads=3),
    *OP.standard_cases("one alone: ", sizes=(11,), ranks=(3,), bias=True, residual=True),
    _alone("no bias", (5,), residual=True),
    _alone("dropout", (5,), bias=True, residual=True, dropout=Dropout(0.25, 2**40)),
    _alone("rank 1", (5,), rank=1),
    _alone("rank above both sizes", (6,), 4, 3, 5),
    _alone("square weight", (5,), 7, 7),
    _alone("square factors", (5,), 3, 3),
    _alone("no input gradient", (5,), input_gradient=False),
    _alone("more rows, odd sizes", (37,), 61, 45, bias=True, residual=True),
    _alone("more rows, rank 1", (9,), 33, 150, 1, bias=True),
    _alone("more rows, rank 16", (70,), 96, 64, 16),
    _alone("more ranks than a block", (27,), 70, 35, 67),
    _alone("more rows, rank 40", (33,), 63, 35, 40, residual=True),
    _alone("sums in parts", (13,), 1541, 37, 3, bias=True),
    _alone("several panels", (11,), 37, 1559, 3),
    _alone("added to what is there", (5,), accumulated=True),
    _alone("added, rank 1, dropout", (5,), rank=1, dropout=Dropout(0.4, 17), accumulated=True),
    _alone("added, several blocks", (139,), 141, 35, 19, accumulated=True),
    _alone("added, several parts of rows", (300,), 5, 33, 4, accumulated=True),
    _alone("of a norm", (2, 5), of_norm=True),
    _alone("of a norm, dropout", (5,), of_norm=True, dropout=Dropout(0.4, 17)),
    _alone("of a norm, no rows", (0,), of_norm=True, bias=True),
    _alone("of a norm, added, several blocks", (139,), 141, 35, 19, of_norm=True, accumulated=True),
)


def _one_member_only(g: Tensor, s: LoRAGroupSaved) -> Tensor | None:
    """Return d_x without the low-rank terms of all layers but the first."""
    first = tuple(member for member in s.group.factors[:1] if member.column == 0)
    h = s.h[..., : sum(len(member.lora_A) for member in first)]
    return _backward(g, s._replace(group=s.group._replace(factors=first), h=h)).d_x


def _scaled(s: LoRAGroupSaved, scaling: float) -> LoRAGroup:
    return regrouped(s.group, scaling=lambda _one: scaling)


def _transposed(s: LoRAGroupSaved) -> LoRAGroup:
    return regrouped(s.group, lora_B=lambda one: transpose_if_square(one.lora_B))


MUTANTS = (
    OP.perturb("scaling forgotten", "d_x d_lora_A d_lora_B", group=lambda s: _scaled(s, 1.0)),
    OP.perturb("one scaling for all", "d_lora_A d_lora_B", group=lambda s: _scaled(s, SCALINGS[0])),
    wrong("low-rank terms missing", "d_x", lambda g, s: g @ s.weight),
    wrong("frozen term missing", "d_x", lambda g, s, d: d - g @ s.weight),
    wrong("first member's low-rank term only", "d_x", _one_member_only),
    OP.perturb("lora_B transposed", "d_x", group=_transposed),
    wrong("transposed", "d_lora_A d_lora_B", transpose_if_square),
    wrong("members swapped", "d_lora_A d_lora_B", rotate_equal_shapes),
    OP.perturb("rows reversed", "d_lora_A d_lora_B", g=lambda g: rows_reversed(g).view(g.shape)),
    OP.perturb("mask ignored", "d_x d_lora_A", group=lambda s: s.group._replace(dropout=None)),
    OP.perturb("mask of another seed", "d_x d_lora_A", group=lambda s: s.group._replace(dropout=next_seed(s.group))),
    OP.perturb("half of h", "d_lora_B", h=lambda s: 0.5 * s.h),
    wrong("lora_B read as zero", "d_lora_A", lambda d: torch.zeros_like(d)),
    wrong("mean for sum", "d_lora_A d_lora_B", mean_of_rows),
)
