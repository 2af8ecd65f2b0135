"""LoRA linear, alone and in a group: cases and mutants; the right formulas stand in `ops/lora_linear.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_linear import (
    Dropout,
    Factors,
    LoRAGroupSaved,
    LoRASaved,
    lora_linear_backward,
    lora_linear_forward,
    lora_linear_group_backward,
    lora_linear_group_forward,
    lora_linear_group_reference,
    lora_linear_reference,
    multiplier,
)
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
    Mutant,
    OpProof,
    Tensors,
    flat_rows,
    mean_mutants,
    rows_reversed,
    standard_mutants,
    transposed_if_square,
    transposed_mutants,
)

SCALING = 1.7
START = 0.5
EPS, OFFSET = 0.03, 0.7


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x after dropout, in its own shape."""
    mask = multiplier(x, dropout)
    return x if mask is None else x * mask.view(x.shape)


def formed(x: Tensor | RMSNormSaved) -> Tensor:
    """x, where it may be given as the norm that it comes from."""
    return rms_norm_apply(*x) if isinstance(x, RMSNormSaved) else x


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


def _before_norm(d_x: Tensor, norm: RMSNormSaved | None) -> Tensor:
    """The gradient of what is drawn as x: through the norm in front, if there is one."""
    return d_x if norm is None else rms_norm_backward(d_x, norm, weight_gradient=False).d_x


def _receiver(factor: Tensor) -> Tensor:
    """A gradient buffer in which something stands already, float32 or wider as in training."""
    return torch.full_like(factor, START, dtype=torch.promote_types(factor.dtype, torch.float32))


def _case(
    name: str,
    lead: tuple[int, ...],
    inputs: int = 7,
    outputs: int = 11,
    rank: int = 3,
    *,
    bias: bool = False,
    residual: bool = False,
    dropout: Dropout | None = None,
    input_gradient: bool = True,
    strided: bool = False,
    accumulated: bool = False,
    of_norm: bool = False,
) -> Case:
    draw = Draw(f"lora_linear: {name}")
    tensors = {
        "x": draw.normal(*lead, inputs),
        "weight": draw.normal(outputs, inputs),
        "lora_A": draw.normal(rank, inputs),
        "lora_B": draw.normal(outputs, rank),
        "d_y": draw.normal(*lead, outputs),
    }
    if strided:
        tensors["x"] = draw.normal(*lead, 2 * inputs)[..., ::2]
        tensors["d_y"] = draw.normal(outputs, *lead).movedim(0, -1)
    if bias:
        tensors["bias"] = draw.normal(outputs)
    if residual:
        tensors["residual"] = draw.normal(*lead, outputs)
    if of_norm:
        tensors["norm"] = draw.normal(inputs)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        x, norm = _input(t)
        y, saved = lora_linear_forward(
            x, t["weight"], t.get("bias"), t["lora_A"], t["lora_B"], SCALING, dropout, t.get("residual")
        )
        saved = saved if norm is None else saved._replace(x=norm)
        into = (_receiver(t["lora_A"]), _receiver(t["lora_B"])) if accumulated else None
        grads = backward(t["d_y"], saved, input_gradient=input_gradient, into=into)
        before = START if accumulated else 0.0
        gradients = {"lora_A": grads.d_lora_A - before, "lora_B": grads.d_lora_B - before}
        return ByHand(y, gradients | {"x": _before_norm(grads.d_x, norm)} if input_gradient else gradients)

    def reference(t: Tensors) -> Tensor:
        mask = multiplier(t["x"], dropout)
        return lora_linear_reference(
            _reference_input(t), t["weight"], t.get("bias"), t["lora_A"], t["lora_B"], SCALING, mask, t.get("residual")
        )

    def usual(t: Tensors) -> Tensor:
        x = _usual_input(t)
        h = functional.linear(dropped(x, dropout), t["lora_A"])
        delta = functional.linear(h, t["lora_B"]) * SCALING
        y = functional.linear(x, t["weight"], t.get("bias")) + delta
        return y + t["residual"] if "residual" in t else y

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("rows", (5,)),
    _case("documents and rows", (2, 5)),
    _case("bias", (5,), bias=True),
    _case("residual", (5,), residual=True),
    _case("bias and residual", (5,), bias=True, residual=True),
    _case("dropout", (2, 5), dropout=Dropout(0.4, 17)),
    _case("dropout, bias, residual", (5,), bias=True, residual=True, dropout=Dropout(0.25, 2**40)),
    _case("rank 1", (5,), rank=1),
    _case("rank above both sizes", (6,), 4, 3, 5),
    _case("square weight", (5,), 7, 7),
    _case("square factors", (5,), 3, 3),
    _case("no input gradient", (5,), input_gradient=False),
    _case("no input gradient, dropout", (5,), input_gradient=False, dropout=Dropout(0.4, 3)),
    _case("strided x and d_y", (5,), strided=True),
    _case("one row", (1,), bias=True),
    _case("no rows", (0,), bias=True),
    _case("no rows, dropout", (2, 0), dropout=Dropout(0.4, 17)),
    _case("training size", (67,), 96, 160, 8, dropout=Dropout(0.1, 5)),
    _case("more rows, odd sizes", (37,), 61, 45, bias=True, residual=True),
    _case("more rows, rank 1", (9,), 33, 150, 1, bias=True),
    _case("more rows, rank 16", (70,), 96, 64, 16),
    _case("more rows, rank 40", (33,), 63, 35, 40, residual=True),
    _case("sums in parts", (13,), 1541, 37, 3, bias=True),
    _case("several panels", (11,), 37, 1559, 3),
    _case("added to what is there", (5,), accumulated=True),
    _case("added, rank 1, dropout", (5,), rank=1, dropout=Dropout(0.4, 17), accumulated=True),
    _case("added, several blocks", (139,), 141, 35, 19, accumulated=True),
    _case("added, several parts of rows", (300,), 5, 33, 4, accumulated=True),
    _case("of a norm", (2, 5), of_norm=True),
    _case("of a norm, dropout", (5,), of_norm=True, dropout=Dropout(0.4, 17)),
    _case("of a norm, no rows", (0,), of_norm=True, bias=True),
    _case("of a norm, added, several blocks", (139,), 141, 35, 19, of_norm=True, accumulated=True),
)


def _redo(d_y: Tensor, saved: LoRASaved, **changes: Any) -> Any:
    """The right backward on changed saved values."""
    return lora_linear_backward(d_y, saved._replace(**changes))


def _unscaled_mask(d_y: Tensor, saved: LoRASaved) -> Tensor:
    """d_lora_A with a mask of zeros and ones: the factor 1 / (1 - p) forgotten."""
    d_h = saved.scaling * flat_rows(d_y) @ saved.lora_B
    x = formed(saved.x)
    kept = dropped(x, saved.dropout) != 0
    return d_h.T @ flat_rows(x * kept)


MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B"),
    Mutant("scaling forgotten", "d_x", lambda g, s, _right: _redo(g, s, scaling=1.0).d_x),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, scaling=1.0).d_lora_A),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, scaling=1.0).d_lora_B),
    Mutant("scaling twice", "d_lora_A", lambda _g, s, right: s.scaling * right.d_lora_A),
    Mutant("low-rank term missing", "d_x", lambda g, s, _right: g @ s.weight),
    Mutant("frozen term missing", "d_x", lambda g, s, right: right.d_x - g @ s.weight),
    Mutant("weight transposed", "d_x", lambda g, s, _right: _redo(g, s, weight=transposed_if_square(s.weight)).d_x),
    Mutant("lora_A transposed", "d_x", lambda g, s, _right: _redo(g, s, lora_A=transposed_if_square(s.lora_A)).d_x),
    Mutant("lora_B transposed", "d_x", lambda g, s, _right: _redo(g, s, lora_B=transposed_if_square(s.lora_B)).d_x),
    *transposed_mutants("d_lora_A", "d_lora_B"),
    Mutant("rows reversed", "d_lora_A", lambda g, s, _right: _redo(rows_reversed(g), s).d_lora_A),
    Mutant("rows reversed", "d_lora_B", lambda g, s, _right: _redo(rows_reversed(g), s).d_lora_B),
    *mean_mutants("d_lora_A", "d_lora_B"),
    Mutant("mask ignored", "d_x", lambda g, s, _right: _redo(g, s, dropout=None).d_x),
    Mutant("mask ignored", "d_lora_A", lambda g, s, _right: _redo(g, s, dropout=None).d_lora_A),
    Mutant("mask of another seed", "d_x", lambda g, s, _right: _redo(g, s, dropout=_next_seed(s)).d_x),
    Mutant("mask not scaled up", "d_lora_A", lambda g, s, _right: _unscaled_mask(g, s)),
    Mutant(
        "x for h", "d_lora_B", lambda g, s, _right: s.scaling * flat_rows(g).T @ flat_rows(formed(s.x)) @ s.lora_A.T
    ),
    Mutant("last row missing", "d_lora_B", lambda g, s, _right: s.scaling * flat_rows(g)[:-1].T @ flat_rows(s.h)[:-1]),
    Mutant("lora_B read as zero", "d_lora_A", lambda _g, _s, right: torch.zeros_like(right.d_lora_A)),
)


def _next_seed(saved: LoRASaved) -> Dropout | None:
    return saved.dropout and saved.dropout._replace(seed=saved.dropout.seed + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Several that share their input.


SCALINGS = (1.7, 0.6, 2.3)


def _group_case(
    name: str,
    lead: tuple[int, ...],
    sizes: tuple[int, ...] = (6, 4, 9),
    ranks: tuple[int | None, ...] = (3, 2, 5),
    inputs: int = 7,
    *,
    bias: bool = False,
    dropout: Dropout | None = None,
    input_gradient: bool = True,
    accumulated: bool = False,
    of_norm: bool = False,
) -> Case:
    draw = Draw(f"lora_linear_group: {name}")
    tensors = {
        "x": draw.normal(*lead, inputs),
        "weight": draw.normal(sum(sizes), inputs),
        "d_y": draw.normal(*lead, sum(sizes)),
    }
    if bias:
        tensors["bias"] = draw.normal(sum(sizes))
    if of_norm:
        tensors["norm"] = draw.normal(inputs)
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
        x, norm = _input(t)
        y, saved = lora_linear_group_forward(x, t["weight"], t.get("bias"), sizes, factors(t), dropout)
        saved = saved if norm is None else saved._replace(x=norm)
        into = [member and (_receiver(member.lora_A), _receiver(member.lora_B)) for member in factors(t)]
        grads = backward(t["d_y"], saved, input_gradient=input_gradient, into=into if accumulated else None)
        before = START if accumulated else 0.0
        gradients: Tensors = {"x": _before_norm(grads.d_x, norm)} if input_gradient else {}
        for i, (d_A, d_B) in enumerate(zip(grads.d_lora_A, grads.d_lora_B, strict=True)):
            if d_A is not None:
                gradients |= {f"lora_A {i}": d_A - before, f"lora_B {i}": d_B - before}
        return ByHand(y, gradients)

    def reference(t: Tensors) -> Tensor:
        mask = multiplier(t["x"], dropout)
        return lora_linear_group_reference(_reference_input(t), t["weight"], t.get("bias"), sizes, factors(t), mask)

    def usual(t: Tensors) -> Tensor:
        frozen_x = _usual_input(t)
        x = dropped(frozen_x, dropout)
        outputs = list(functional.linear(frozen_x, t["weight"], t.get("bias")).split(sizes, dim=-1))
        for i, member in enumerate(factors(t)):
            if member is not None:
                h = functional.linear(x, member.lora_A)
                outputs[i] = outputs[i] + functional.linear(h, member.lora_B) * member.scaling
        return torch.cat(outputs, dim=-1)

    return Case(name, tensors, by_hand, reference, usual)


GROUP_CASES = (
    _group_case("three members", (5,)),
    _group_case("documents and rows", (2, 5)),
    _group_case("bias", (5,), bias=True),
    _group_case("dropout", (5,), dropout=Dropout(0.4, 17)),
    _group_case("dropout, bias", (2, 5), bias=True, dropout=Dropout(0.25, 99)),
    _group_case("only the last adapted", (5,), ranks=(None, None, 4), dropout=Dropout(0.4, 3)),
    _group_case("first and last adapted", (5,), ranks=(3, None, 2)),
    _group_case("none adapted", (5,), ranks=(None, None, None), bias=True, dropout=Dropout(0.4, 3)),
    _group_case("members of one shape", (5,), sizes=(6, 6), ranks=(3, 3)),
    _group_case("no input gradient", (5,), input_gradient=False, dropout=Dropout(0.4, 4)),
    _group_case("one row", (1,)),
    _group_case("no rows", (0,), bias=True, dropout=Dropout(0.4, 4)),
    _group_case("training size", (67,), sizes=(96, 40, 48), ranks=(8, 6, 4), inputs=88, dropout=Dropout(0.1, 5)),
    _group_case("members within a block", (37,), sizes=(45, 7, 13), ranks=(3, 16, 1), inputs=61, bias=True),
    _group_case("members over blocks", (19,), sizes=(33, 70, 40), ranks=(40, None, 3), inputs=64),
    _group_case("the one in the middle adapted", (70,), sizes=(5, 59, 33), ranks=(None, 16, None), inputs=35),
    _group_case("dropout, long sums", (37,), sizes=(45, 7), ranks=(3, 16), inputs=141, dropout=Dropout(0.4, 17)),
    _group_case("sums in parts", (9,), sizes=(20, 30, 17), ranks=(2, 1, None), inputs=1539),
    _group_case("added to what is there", (5,), ranks=(3, None, 2), bias=True, accumulated=True),
    _group_case("added, several blocks", (139,), sizes=(35, 4, 131), ranks=(3, 2, 19), inputs=141, accumulated=True),
    _group_case("added, several parts of rows", (541,), sizes=(33, 4), ranks=(4, None), inputs=5, accumulated=True),
    _group_case("of a norm", (2, 5), of_norm=True),
    _group_case("of a norm, dropout", (5,), ranks=(3, None, 2), of_norm=True, dropout=Dropout(0.4, 17)),
    _group_case("of a norm, none adapted", (5,), ranks=(None, None, None), of_norm=True),
    _group_case("of a norm, several blocks", (139,), sizes=(35, 4), ranks=(3, 16), inputs=141, of_norm=True),
)


def _again(d_y: Tensor, saved: LoRAGroupSaved, **changes: Any) -> Any:
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
    d_x: Tensor = _again(d_y, saved, factors=(first, *others), h=h).d_x
    return d_x


def _backwards_if_alike(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The members' gradients in reverse order, where no shape gives it away."""
    shapes = {None if gradient is None else gradient.shape for gradient in gradients}
    return gradients[::-1] if len(shapes) == 1 else gradients


GROUP_MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B"),
    Mutant("scaling forgotten", "d_x", lambda g, s, _right: _again(g, s, factors=_unscaled(s)).d_x),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _again(g, s, factors=_unscaled(s)).d_lora_A),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _again(g, s, factors=_unscaled(s)).d_lora_B),
    Mutant("one scaling for all", "d_lora_A", lambda g, s, _right: _again(g, s, factors=_of_the_first(s)).d_lora_A),
    Mutant("one scaling for all", "d_lora_B", lambda g, s, _right: _again(g, s, factors=_of_the_first(s)).d_lora_B),
    Mutant("low-rank terms missing", "d_x", lambda g, s, _right: g @ s.weight),
    Mutant("first member's low-rank term only", "d_x", lambda g, s, _right: _one_member_only(g, s)),
    Mutant("members swapped", "d_lora_A", lambda _g, _s, right: _backwards_if_alike(right.d_lora_A)),
    Mutant("members swapped", "d_lora_B", lambda _g, _s, right: _backwards_if_alike(right.d_lora_B)),
    Mutant("rows reversed", "d_lora_A", lambda g, s, _right: _again(rows_reversed(g), s).d_lora_A),
    Mutant("rows reversed", "d_lora_B", lambda g, s, _right: _again(rows_reversed(g), s).d_lora_B),
    Mutant("mask ignored", "d_x", lambda g, s, _right: _again(g, s, dropout=None).d_x),
    Mutant("mask ignored", "d_lora_A", lambda g, s, _right: _again(g, s, dropout=None).d_lora_A),
    *mean_mutants("d_lora_B"),
)

PROOFS = (
    OpProof("lora_linear", lora_linear_backward, CASES, MUTANTS, loops=True),
    OpProof("lora_linear_group", lora_linear_group_backward, GROUP_CASES, GROUP_MUTANTS, loops=True),
)
