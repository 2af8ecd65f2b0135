"""Linear: cases and mutants."""

from __future__ import annotations

from torch.nn import functional

from backhand.verify.mutants import flat_rows, mean_of_rows, rows_reversed, transpose_if_square, wrong
from backhand.verify.scaffold import ROWS, Axis, Op

OP = Op(
    "linear",
    {"x": "*lead inputs", "weight": "outputs inputs", "d_y": "*lead outputs", "bias": "outputs"},
    {"lead": ROWS, "inputs": Axis(7, 96), "outputs": Axis(4, 160), "bias": False},
    baseline=lambda x, weight, bias: functional.linear(x, weight, bias),
)

CASES = (
    *OP.standard_cases(bias=True),
    OP.case("no bias"),
    OP.case("one input, one output", (6,), 1, 1, bias=True),
    OP.case("square weight", (5,), 7, 7),
)

MUTANTS = (
    OP.perturb("weight transposed", "d_x", weight=lambda s: transpose_if_square(s.weight)),
    wrong("transposed", "d_weight", transpose_if_square),
    wrong("mean for sum", "d_weight d_bias", mean_of_rows),
    OP.perturb("rows reversed", "d_weight", g=rows_reversed),
    wrong("last row missing", "d_weight", lambda g, s: flat_rows(g)[:-1].T @ flat_rows(s.x)[:-1]),
    wrong("last row missing", "d_bias", lambda g: flat_rows(g)[:-1].sum(0)),
)
