"""Linear: cases and mutants."""

from __future__ import annotations

from torch.nn import functional

from backhand.verify.mutants import flat_rows, mean_of_rows, rows_reversed, transpose_if_square, wrong
from backhand.verify.scaffold import Op

OP = Op(
    "linear",
    {"x": "*lead inputs", "weight": "outputs inputs", "d_y": "*lead outputs", "bias": "outputs"},
    {"lead": ..., "inputs": 7, "outputs": 4, "bias": False},
    baseline=lambda x, weight, bias: functional.linear(x, weight, bias),
)

CASES = (
    OP.case("rows", (5,)),
    OP.case("bias", (5,), bias=True),
    OP.case("documents and rows, bias", (2, 5), bias=True),
    OP.case("one input, one output", (6,), 1, 1, bias=True),
    OP.case("square weight", (5,), 7, 7),
    OP.case("one row", (1,), bias=True),
    OP.case("no rows", (0,), bias=True),
    OP.case("training size", (67,), 96, 160, bias=True),
)

MUTANTS = (
    OP.perturb("weight transposed", "d_x", weight=lambda s: transpose_if_square(s.weight)),
    wrong("transposed", "d_weight", transpose_if_square),
    wrong("mean for sum", "d_weight d_bias", mean_of_rows),
    OP.perturb("rows reversed", "d_weight", g=rows_reversed),
    wrong("last row missing", "d_weight", lambda g, s: flat_rows(g)[:-1].T @ flat_rows(s.x)[:-1]),
    wrong("last row missing", "d_bias", lambda g: flat_rows(g)[:-1].sum(0)),
)
