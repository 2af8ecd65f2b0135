"""DoRA linear: cases and mutants. The norm is an input of its own, a constant, as the paper and PEFT have it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.dora import dora_norm
from backhand.ops.dora_linear import DoRAConstants, DoRALinearSaved
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.weight_tiles import frozen_dense
from backhand.verify.case import rows_reversed, transposed_if_square, transposed_mutants, wrong
from backhand.verify.cases.lora_linear import dropped
from backhand.verify.scaffold import SCALING, Given, Op


def _usual(given: Given) -> Tensor:
    """As PEFT writes it."""
    x, lora_A, lora_B, weight = dropped(given["x"], given["dropout"]), given["lora_A"], given["lora_B"], given["weight"]
    gain = given["magnitude"] / given["norm"]
    low_rank = functional.linear(functional.linear(x, lora_A), lora_B)
    base = functional.linear(given["x"], weight, given.get("bias"))
    y: Tensor = base + (gain - 1) * functional.linear(x, weight) + gain * low_rank * given["scaling"]
    return y


OP = Op(
    "dora_linear",
    dict(weight="outputs inputs", lora_A="rank inputs", lora_B="outputs rank", x="*lead inputs")
    | dict(magnitude=lambda draw, outputs: draw.normal(outputs) + 2.0)
    | dict(norm=lambda weight, lora_A, lora_B, scaling: dora_norm(weight, lora_A, lora_B, scaling))
    | dict(d_y="*lead outputs", bias="outputs"),
    dict(lead=..., inputs=7, outputs=11, rank=3, bias=False, dropout=None) | dict(input_gradient=True, scaling=SCALING),
    usual=_usual,
    made={
        "mask": multiplier,
        "factors": lambda lora_A, lora_B: (lora_A, lora_B),
        "constants": lambda norm, scaling, dropout: DoRAConstants(norm, scaling, dropout),
    },
    loops=True,
)


CASES = (
    OP.case("rows", (5,)),
    OP.case("documents and rows", (2, 5)),
    OP.case("bias", (5,), bias=True),
    OP.case("bias of documents and rows", (2, 4), bias=True),
    OP.case("dropout", (2, 5), dropout=Dropout(0.4, 17)),
    OP.case("dropout, bias", (5,), bias=True, dropout=Dropout(0.25, 2**40)),
    OP.case("rank above both sizes", (6,), 4, 3, 5),
    OP.case("square weight", (5,), 7, 7),
    OP.case("square factors", (5,), 3, 3),
    OP.case("no input gradient, dropout", (5,), input_gradient=False, dropout=Dropout(0.4, 3)),
    OP.case("one row", (1,), bias=True),
    OP.case("no rows", (0,), bias=True),
    OP.case("no rows, dropout", (2, 0), dropout=Dropout(0.4, 17)),
    OP.case("training size", (67,), 96, 160, 8, dropout=Dropout(0.1, 5)),
)


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
    OP.redo("magnitude forgotten", "d_x d_lora_A", magnitude=lambda s: s.norm),
    OP.redo("norm forgotten", "d_lora_B", norm=lambda s: torch.ones_like(s.norm)),
    wrong("norm not held fixed", "d_lora_A", lambda g, s: _through_the_norm(g, s, "lora_A")),
    wrong("norm not held fixed", "d_lora_B", lambda g, s: _through_the_norm(g, s, "lora_B")),
    OP.redo("scaling forgotten", "d_x d_lora_A d_magnitude", scaling=1.0),
    wrong("frozen term not rescaled", "d_x", lambda g, s, d: d + (g - g * s.magnitude / s.norm) @ s.weight),
    OP.redo("mask ignored", "d_x d_magnitude", dropout=None),
    wrong("what dropout lets by forgotten", "d_x", lambda s, d: dropped(d, s.dropout)),
    OP.redo("low-rank part left out", "d_magnitude", h=lambda s: 0 * s.h),
    wrong("norm forgotten", "d_magnitude", lambda s, d: d * s.norm),
    OP.redo("rows reversed", "d_magnitude d_lora_B", g=lambda g: rows_reversed(g)),
    transposed_mutants("d_lora_A"),
    OP.redo("weight transposed", "d_x", weight=lambda s: transposed_if_square(s.weight)),
)
