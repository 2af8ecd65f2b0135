"""DoRA linear: cases and mutants. The norm is an input of its own, a constant, as the paper and PEFT have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.dora import dora_norm
from backhand.ops.dora_linear import DoRALinearSaved, dora_linear_backward, dora_linear_forward, dora_linear_reference
from backhand.ops.frozen_matrix import frozen_dense
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.verify.case import (
    Backward,
    ByHand,
    Case,
    Draw,
    Mutant,
    OpProof,
    Tensors,
    rows_reversed,
    standard_mutants,
    transposed_if_square,
    transposed_mutants,
)
from backhand.verify.cases.lora_linear import dropped

SCALING = 1.7


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
) -> Case:
    draw = Draw(f"dora_linear: {name}")
    weight, lora_A, lora_B = draw.normal(outputs, inputs), draw.normal(rank, inputs), draw.normal(outputs, rank)
    tensors = {
        "x": draw.normal(*lead, inputs),
        "weight": weight,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "magnitude": draw.normal(outputs) + 2.0,
        "norm": dora_norm(weight, lora_A, lora_B, SCALING),
        "d_y": draw.normal(*lead, outputs),
    }
    if bias:
        tensors["bias"] = draw.normal(outputs)
    if residual:
        tensors["residual"] = draw.normal(*lead, outputs)

    def parts(t: Tensors) -> dict[str, Any]:
        names = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude", "norm", "residual")
        return {name: t.get(name) for name in names} | {"scaling": SCALING}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = dora_linear_forward(**parts(t), dropout=dropout)
        grads = backward(t["d_y"], saved, input_gradient=input_gradient)
        gradients = {"lora_A": grads.d_lora_A, "lora_B": grads.d_lora_B, "magnitude": grads.d_magnitude}
        return ByHand(y, gradients | {"x": grads.d_x} if input_gradient else gradients)

    def reference(t: Tensors) -> Tensor:
        return dora_linear_reference(**parts(t), mask=multiplier(t["x"], dropout))

    def usual(t: Tensors) -> Tensor:
        """As PEFT writes it."""
        x = dropped(t["x"], dropout)
        gain = t["magnitude"] / t["norm"]
        low_rank = functional.linear(functional.linear(x, t["lora_A"]), t["lora_B"])
        base = functional.linear(t["x"], t["weight"], t.get("bias"))
        y = base + (gain - 1) * functional.linear(x, t["weight"]) + gain * low_rank * SCALING
        return y + t["residual"] if "residual" in t else y

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("rows", (5,)),
    _case("documents and rows", (2, 5)),
    _case("bias", (5,), bias=True),
    _case("bias and residual", (5,), bias=True, residual=True),
    _case("dropout", (2, 5), dropout=Dropout(0.4, 17)),
    _case("dropout, bias, residual", (5,), bias=True, residual=True, dropout=Dropout(0.25, 2**40)),
    _case("rank above both sizes", (6,), 4, 3, 5),
    _case("square weight", (5,), 7, 7),
    _case("square factors", (5,), 3, 3),
    _case("no input gradient, dropout", (5,), input_gradient=False, dropout=Dropout(0.4, 3)),
    _case("one row", (1,), bias=True),
    _case("no rows", (0,), bias=True),
    _case("no rows, dropout", (2, 0), dropout=Dropout(0.4, 17)),
    _case("training size", (67,), 96, 160, 8, dropout=Dropout(0.1, 5)),
)


def _redo(d_y: Tensor, saved: DoRALinearSaved, **changes: Any) -> Any:
    """The right backward on changed saved values."""
    return dora_linear_backward(d_y, saved._replace(**changes))


def _gain(saved: DoRALinearSaved) -> Tensor:
    return saved.magnitude / saved.norm


def _through_the_norm(g: Tensor, s: DoRALinearSaved, name: str) -> Tensor:
    """The gradient by autograd of everything, the norm's own included: what the paper leaves out."""
    factors = {"lora_A": s.lora_A.detach().clone(), "lora_B": s.lora_B.detach().clone()}
    with torch.enable_grad():
        leaf = factors[name].requires_grad_()
        adapted = frozen_dense(s.weight) + s.scaling * (factors["lora_B"] @ factors["lora_A"])
        rescaled = s.magnitude[:, None] * functional.normalize(adapted, dim=1)
        (gradient,) = torch.autograd.grad(functional.linear(dropped(s.x, s.dropout), rescaled), leaf, g)
    return gradient


MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B", "d_magnitude"),
    Mutant("magnitude forgotten", "d_x", lambda g, s, _right: _redo(g, s, magnitude=s.norm).d_x),
    Mutant("magnitude forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, magnitude=s.norm).d_lora_A),
    Mutant("norm forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, norm=torch.ones_like(s.norm)).d_lora_B),
    Mutant("norm not held fixed", "d_lora_A", lambda g, s, _right: _through_the_norm(g, s, "lora_A")),
    Mutant("norm not held fixed", "d_lora_B", lambda g, s, _right: _through_the_norm(g, s, "lora_B")),
    Mutant("scaling forgotten", "d_x", lambda g, s, _right: _redo(g, s, scaling=1.0).d_x),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, scaling=1.0).d_lora_A),
    Mutant("scaling forgotten", "d_magnitude", lambda g, s, _right: _redo(g, s, scaling=1.0).d_magnitude),
    Mutant("frozen term not rescaled", "d_x", lambda g, s, right: right.d_x + (g - g * _gain(s)) @ s.weight),
    Mutant("mask ignored", "d_x", lambda g, s, _right: _redo(g, s, dropout=None).d_x),
    Mutant("mask ignored", "d_magnitude", lambda g, s, _right: _redo(g, s, dropout=None).d_magnitude),
    Mutant("what dropout lets by forgotten", "d_x", lambda _g, s, right: dropped(right.d_x, s.dropout)),
    Mutant("low-rank part left out", "d_magnitude", lambda g, s, _right: _redo(g, s, h=0 * s.h).d_magnitude),
    Mutant("norm forgotten", "d_magnitude", lambda _g, s, right: right.d_magnitude * s.norm),
    Mutant("rows reversed", "d_magnitude", lambda g, s, _right: _redo(rows_reversed(g), s).d_magnitude),
    Mutant("rows reversed", "d_lora_B", lambda g, s, _right: _redo(rows_reversed(g), s).d_lora_B),
    *transposed_mutants("d_lora_A"),
    Mutant("weight transposed", "d_x", lambda g, s, _right: _redo(g, s, weight=transposed_if_square(s.weight)).d_x),
)

PROOFS = (OpProof("dora_linear", dora_linear_backward, CASES, MUTANTS, loops=True),)
