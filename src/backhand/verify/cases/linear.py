"""Linear: cases and mutants."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from backhand.ops.linear import linear_backward, linear_forward, linear_reference
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


def _case(name: str, lead: tuple[int, ...], inputs: int = 7, outputs: int = 4, *, bias: bool = False) -> Case:
    draw = Draw(f"linear: {name}")
    tensors = {
        "x": draw.normal(*lead, inputs),
        "weight": draw.normal(outputs, inputs),
        "d_y": draw.normal(*lead, outputs),
    }
    if bias:
        tensors["bias"] = draw.normal(outputs)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = linear_forward(t["x"], t["weight"], t.get("bias"))
        grads = backward(t["d_y"], saved)
        return ByHand(y, {"x": grads.d_x, "weight": grads.d_weight} | ({"bias": grads.d_bias} if bias else {}))

    def reference(t: Tensors) -> Tensor:
        return linear_reference(t["x"], t["weight"], t.get("bias"))

    def usual(t: Tensors) -> Tensor:
        return functional.linear(t["x"], t["weight"], t.get("bias"))

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("rows", (5,)),
    _case("bias", (5,), bias=True),
    _case("documents and rows, bias", (2, 5), bias=True),
    _case("one input, one output", (6,), 1, 1, bias=True),
    _case("square weight", (5,), 7, 7),
    _case("one row", (1,), bias=True),
    _case("no rows", (0,), bias=True),
    _case("training size", (67,), 96, 160, bias=True),
)

MUTANTS = (
    *standard_mutants("d_x", "d_weight", "d_bias"),
    Mutant("weight transposed", "d_x", lambda g, s, _right: g @ transposed_if_square(s.weight)),
    *transposed_mutants("d_weight"),
    *mean_mutants("d_weight", "d_bias"),
    Mutant("rows reversed", "d_weight", lambda g, s, _right: rows_reversed(g).T @ flat_rows(s.x)),
    Mutant("last row missing", "d_weight", lambda g, s, _right: flat_rows(g)[:-1].T @ flat_rows(s.x)[:-1]),
    Mutant("last row missing", "d_bias", lambda g, _s, _right: flat_rows(g)[:-1].sum(0)),
)

PROOFS = (OpProof("linear", linear_backward, CASES, MUTANTS),)
