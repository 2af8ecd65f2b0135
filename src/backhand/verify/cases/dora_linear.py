"""DoRA linear: cases and mutants. The norm is a separate, constant input, as in the paper and in PEFT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.dora import dora_norm
from backhand.ops.dora_linear import DoRAConstants, DoRALinearSaved
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.weight_tiles import frozen_dense
from backhand.verify.cases.lora_linear import LAYER, dropped, layer_cases
from backhand.verify.measure import autograd_gradients
from backhand.verify.mutants import rows_reversed, transpose_if_square, wrong
from backhand.verify.scaffold import SCALING, Arguments, Op, Tensors


def _baseline(args: Arguments) -> Tensor:
    """Compute y in PEFT's form."""
    x, lora_A, lora_B, weight = dropped(args["x"], args["dropout"]), args["lora_A"], args["lora_B"], args["weight"]
    gain = args["magnitude"] / args["norm"]
    low_rank = functional.linear(functional.linear(x, lora_A), lora_B)
    base = functional.linear(args["x"], weight, args.get("bias"))
    y: Tensor = base + (gain - 1) * functional.linear(x, weight) + gain * low_rank * args["scaling"]
    return y


OP = Op(
    "dora_linear",
    dict(weight="outputs inputs", lora_A="rank inputs", lora_B="outputs rank", x="*lead inputs")
    | dict(magnitude=lambda draw, outputs: draw.normal(outputs) + 2.0)
    | dict(norm=lambda weight, lora_A, lora_B, scaling: dora_norm(weight, lora_A, lora_B, scaling))
    | dict(d_y="*lead outputs", bias="outputs"),
    {**LAYER, "bias": False, "dropout": None, "input_gradient": True, "scaling": SCALING},
    baseline=_baseline,
    derived={
        "mask": multiplier,
        "factors": lambda lora_A, lora_B: (lora_A, lora_B),
        "constants": lambda norm, scaling, dropout: DoRAConstants(norm, scaling, dropout),
    },
    compiled=True,
)


CASES = (
    *layer_cases(OP),
    OP.case("seed of 64 bits", dropout=Dropout(0.25, 2**40)),
)


def _through_the_norm(g: Tensor, s: DoRALinearSaved, gradient: str) -> Tensor:
    """Return the gradient by autograd through the norm, which the paper holds constant."""
    name = gradient.removeprefix("d_")

    def y(t: Tensors) -> Tensor:
        adapted = frozen_dense(s.weight) + s.scaling * (t["lora_B"] @ t["lora_A"])
        return functional.linear(dropped(s.x, s.dropout), s.magnitude[:, None] * functional.normalize(adapted, dim=1))

    return autograd_gradients(y, {"lora_A": s.lora_A, "lora_B": s.lora_B, "d_y": g}, (name,))[1][name]


MUTANTS = (
    OP.perturb("magnitude forgotten", "d_x d_lora_A", magnitude=lambda s: s.norm),
    OP.perturb("norm forgotten", "d_lora_B", norm=lambda s: torch.ones_like(s.norm)),
    wrong("norm not held fixed", "d_lora_A d_lora_B", _through_the_norm),
    OP.perturb("scaling forgotten", "d_x d_lora_A d_magnitude", scaling=1.0),
    wrong("frozen term not rescaled", "d_x", lambda g, s, d: d + (g - g * s.magnitude / s.norm) @ s.weight),
    OP.perturb("mask ignored", "d_x d_magnitude", dropout=None),
    wrong("what dropout lets by forgotten", "d_x", lambda s, d: dropped(d, s.dropout)),
    OP.perturb("low-rank part left out", "d_magnitude", h=lambda s: 0 * s.h),
    wrong("norm forgotten", "d_magnitude", lambda s, d: d * s.norm),
    OP.perturb("rows reversed", "d_magnitude d_lora_B", g=lambda g: rows_reversed(g)),
    wrong("transposed", "d_lora_A", transpose_if_square),
    OP.perturb("weight transposed", "d_x", weight=lambda s: transpose_if_square(s.weight)),
)
