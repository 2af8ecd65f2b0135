"""LoRA linear: cases and mutants. The right formulas are in `ops/lora_linear.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_linear import Dropout, multiplier
from backhand.verify.mutants import flat_rows, mean_of_rows, rows_reversed, transpose_if_square, wrong
from backhand.verify.scaffold import ROWS, SCALING, Arguments, Axis, Case, Op


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Return x after dropout."""
    mask = multiplier(x, dropout)
    return x if mask is None else x * mask


def _baseline(args: Arguments) -> Tensor:
    h = functional.linear(dropped(args["x"], args["dropout"]), args["lora_A"])
    y: Tensor = functional.linear(args["x"], args["weight"], args.get("bias"))
    y = y + functional.linear(h, args["lora_B"]) * args["scaling"]
    return y


LAYER = {"lead": ROWS, "inputs": Axis(7, 96), "outputs": Axis(11, 160), "rank": Axis(3, 8)}
"""Sizes of an adapted linear layer."""

OP = Op(
    "lora_linear",
    dict(x="*lead inputs", weight="outputs inputs", lora_A="rank inputs", lora_B="outputs rank")
    | dict(d_y="*lead outputs", bias="outputs"),
    {**LAYER, "bias": False, "dropout": None, "input_gradient": True, "scaling": SCALING},
    baseline=_baseline,
    derived={"m": lambda x, dropout: multiplier(x, dropout)},
    compiled=True,
)


def layer_cases(op: Op) -> tuple[Case, ...]:
    """Return the cases of any adapted linear layer."""
    return (
        *op.standard_cases(bias=True, dropout=Dropout(0.3, 17)),
        op.case("no bias, no dropout"),
        op.case("bias", bias=True),
        op.case("dropout", dropout=Dropout(0.4, 17)),
        op.case("rank above both sizes", (6,), 4, 3, 5),
        op.case("square weight", (5,), 7, 7),
        op.case("square factors", (5,), 3, 3),
        op.case("no input gradient, dropout", (5,), input_gradient=False, dropout=Dropout(0.4, 3)),
        op.case("documents without rows", (2, 0), dropout=Dropout(0.4, 17)),
    )


CASES = (
    *layer_cases(OP),
    OP.case("seed of 64 bits", dropout=Dropout(0.25, 2**40)),
    OP.case("rank 1", (5,), rank=1),
    OP.case("no input gradient", (5,), input_gradient=False),
    OP.case("more rows, odd sizes", (37,), 61, 45, bias=True),
    OP.case("more rows, rank 1", (9,), 33, 150, 1, bias=True),
)


def next_seed(s: Any) -> Dropout | None:
    """Return the saved dropout with another seed."""
    dropout: Dropout | None = s.dropout
    return dropout and dropout._replace(seed=dropout.seed + 1)


MUTANTS = (
    OP.perturb("scaling forgotten", "d_x d_lora_A d_lora_B", scaling=1.0),
    wrong("scaling twice", "d_lora_A", lambda s, d: s.scaling * d),
    wrong("low-rank term missing", "d_x", lambda g, s: g @ s.weight),
    wrong("frozen term missing", "d_x", lambda g, s, d: d - g @ s.weight),
    OP.perturb("weight transposed", "d_x", weight=lambda s: transpose_if_square(s.weight)),
    OP.perturb("lora_A transposed", "d_x", lora_A=lambda s: transpose_if_square(s.lora_A)),
    OP.perturb("lora_B transposed", "d_x", lora_B=lambda s: transpose_if_square(s.lora_B)),
    wrong("transposed", "d_lora_A d_lora_B", transpose_if_square),
    OP.perturb("rows reversed", "d_lora_A d_lora_B", g=lambda g: rows_reversed(g).view(g.shape)),
    wrong("mean for sum", "d_lora_A d_lora_B", mean_of_rows),
    OP.perturb("mask ignored", "d_x d_lora_A", dropout=None),
    OP.perturb("mask of another seed", "d_x", dropout=next_seed),
    OP.perturb("mask not scaled up", "d_lora_A", x=lambda s: s.x * (1 - s.dropout.probability if s.dropout else 1)),
    wrong("x for h", "d_lora_B", lambda g, s: s.scaling * flat_rows(g).T @ flat_rows(s.x) @ s.lora_A.T),
    wrong("last row missing", "d_lora_B", lambda g, s: s.scaling * flat_rows(g)[:-1].T @ flat_rows(s.h)[:-1]),
    wrong("lora_B read as zero", "d_lora_A", lambda d: torch.zeros_like(d)),
)
