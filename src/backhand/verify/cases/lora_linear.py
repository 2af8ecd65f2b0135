"""LoRA linear: cases and mutants. The mutants' formulas stand beside the right ones in `ops/lora_linear.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_linear import (
    Dropout,
    LoRASaved,
    lora_linear_backward,
    lora_linear_forward,
    lora_linear_reference,
    multiplier,
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


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x after dropout, in its own shape."""
    mask = multiplier(x, dropout)
    return x if mask is None else x * mask.view(x.shape)


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

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = lora_linear_forward(
            t["x"], t["weight"], t.get("bias"), t["lora_A"], t["lora_B"], SCALING, dropout, t.get("residual")
        )
        grads = backward(t["d_y"], saved, input_gradient=input_gradient)
        gradients = {"lora_A": grads.d_lora_A, "lora_B": grads.d_lora_B}
        return ByHand(y, gradients | {"x": grads.d_x} if input_gradient else gradients)

    def reference(t: Tensors) -> Tensor:
        mask = multiplier(t["x"], dropout)
        return lora_linear_reference(
            t["x"], t["weight"], t.get("bias"), t["lora_A"], t["lora_B"], SCALING, mask, t.get("residual")
        )

    def usual(t: Tensors) -> Tensor:
        h = functional.linear(dropped(t["x"], dropout), t["lora_A"])
        delta = functional.linear(h, t["lora_B"]) * SCALING
        y = functional.linear(t["x"], t["weight"], t.get("bias")) + delta
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
)


def _redo(d_y: Tensor, saved: LoRASaved, **changes: Any) -> Any:
    """The right backward on changed saved values."""
    return lora_linear_backward(d_y, saved._replace(**changes))


def _unscaled_mask(d_y: Tensor, saved: LoRASaved) -> Tensor:
    """d_lora_A with a mask of zeros and ones: the factor 1 / (1 - p) forgotten."""
    d_h = saved.scaling * flat_rows(d_y) @ saved.lora_B
    kept = dropped(saved.x, saved.dropout) != 0
    return d_h.T @ flat_rows(saved.x * kept)


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
    Mutant("x for h", "d_lora_B", lambda g, s, _right: s.scaling * flat_rows(g).T @ flat_rows(s.x) @ s.lora_A.T),
    Mutant("last row missing", "d_lora_B", lambda g, s, _right: s.scaling * flat_rows(g)[:-1].T @ flat_rows(s.h)[:-1]),
    Mutant("lora_B read as zero", "d_lora_A", lambda _g, _s, right: torch.zeros_like(right.d_lora_A)),
)


def _next_seed(saved: LoRASaved) -> Dropout | None:
    return saved.dropout and saved.dropout._replace(seed=saved.dropout.seed + 1)


PROOFS = (OpProof("lora_linear", lora_linear_backward, CASES, MUTANTS),)
