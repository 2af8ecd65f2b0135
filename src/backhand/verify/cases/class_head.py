"""Classification head: cases of the forms of decoders, BERT and ModernBERT, and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backhand.ops.class_head import ClassHeadSaved, class_head_backward
from backhand.verify.mutants import Function, Mutant, flat_rows, mean_of_rows, transpose_if_square, wrong
from backhand.verify.scaffold import COUNT, Axis, Op

_BERT: dict[str, Any] = {"output_bias": True, "dense": True, "dense_bias": True}
_MODERN: dict[str, Any] = {"output_bias": True, "dense": True, "norm": True, "activation": "gelu"}
_EVERYTHING: dict[str, Any] = {**_BERT, "norm": True, "norm_bias": True}

OP = Op(
    "class_head",
    {
        "x": "rows hidden",
        "output": "labels hidden",
        "output_bias": "labels",
        "dense": "0.4: hidden hidden",
        "dense_bias": "hidden",
        "norm": "hidden",
        "norm_bias": "hidden",
        "d_y": "rows labels",
    },
    {"rows": COUNT, "hidden": Axis(7, 96), "labels": Axis(3, 28), "activation": "tanh", "eps": 0.03}
    | dict.fromkeys(("output_bias", "dense", "dense_bias", "norm", "norm_bias"), False),
)

CASES = (
    *OP.standard_cases(),
    *OP.standard_cases("BERT: ", **_BERT),
    *OP.standard_cases("ModernBERT: ", **_MODERN),
    OP.case("ModernBERT with biases", **{**_EVERYTHING, "activation": "gelu_tanh"}),
    OP.case("silu", **{**_BERT, "activation": "silu"}),
    OP.case("relu", **{**_EVERYTHING, "activation": "relu"}),
    OP.case("one number", labels=1, **_BERT),
)


def _parts(name: str, gradients: str, needs: str, mistake: Function) -> tuple[Mutant, ...]:
    """Return mutants of heads that have the part `needs`; other heads are right."""

    def if_there(g: Tensor, s: ClassHeadSaved, d: Any) -> Any:
        return d if getattr(s, needs) is None else mistake(g, s, d)

    return wrong(name, gradients, if_there)


def _before_dense(g: Tensor, s: ClassHeadSaved, **changes: Any) -> Tensor:
    """Return ∂L/∂x for changed saved values."""
    return class_head_backward(g, s._replace(**changes)).d_x


MUTANTS = (
    wrong("rows reversed", "d_output", lambda g, s: flat_rows(g).flip(0).T @ s.output.x),
    wrong("mean for sum", "d_output d_output_bias d_dense d_dense_bias d_norm d_norm_bias", mean_of_rows),
    wrong("last row missing", "d_output", lambda g, s: g[:-1].T @ s.output.x[:-1]),
    _parts("input of the dense layer", "d_output", "dense", lambda g, s, _: g.T @ s.dense.x),
    _parts("norm forgotten", "d_x", "norm", lambda g, s, _: _before_dense(g, s, norm=None)),
    _parts("activation forgotten", "d_x", "dense", lambda g, s, _: _without_slope(g, s)),
    _parts("dense layer forgotten", "d_x", "dense", lambda g, s, _: _before_dense(g, s, dense=None)),
    _parts("weight transposed", "d_dense", "dense", lambda _g, _s, d: transpose_if_square(d)),
    _parts("gradient before the norm", "d_norm", "norm", lambda _g, s, d: d / (1 + s.norm.weight)),
)


def _without_slope(g: Tensor, s: ClassHeadSaved) -> Tensor:
    """Return ∂L/∂x without φ'."""
    d_a = _before_dense(g, s, dense=None)
    assert s.dense is not None
    return d_a @ torch.as_tensor(s.dense.weight)
