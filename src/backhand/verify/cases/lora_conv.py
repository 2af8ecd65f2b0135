"""LoRA convolution: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backhand.ops.lora_conv import ConvGeometry, convolution
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.verify.cases.lora_linear import next_seed
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import SCALING, Arguments, Axis, Op


def _baseline(args: Arguments) -> Tensor:
    x, geometry, mask = args["x"], args["geometry"], args["mask"]
    ones = (1,) * (x.ndim - 2)
    h = convolution(x if mask is None else x * mask, args["lora_A"], None, geometry._replace(groups=1))
    at_one_place = ConvGeometry(ones, (0,) * len(ones), ones, geometry.groups)
    y: Tensor = convolution(x, args["weight"], args.get("bias"), geometry)
    y = y + args["scaling"] * convolution(h, args["lora_B"], None, at_one_place)
    return y


def _geometry(kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> ConvGeometry:
    """Return the geometry, given one number for all axes or one per axis."""
    each = [value if isinstance(value, tuple) else (value,) * len(kernel) for value in (stride, padding, dilation)]
    return ConvGeometry(each[0], each[1], each[2], groups)


def _steps(batch: int, places: tuple[int, ...], kernel: tuple[int, ...], geometry: ConvGeometry) -> torch.Size:
    """Return the spatial shape of the output."""
    x, weight = torch.zeros(batch, 1, *places), torch.zeros(1, 1, *kernel)
    return convolution(x, weight, None, geometry._replace(groups=1)).shape[2:]


OP = Op(
    "lora_conv",
    dict(x="batch inputs *places", weight="outputs group *kernel", lora_A="rank inputs *kernel")
    | dict(
        lora_B=lambda draw, outputs, rank, groups, kernel: draw.normal(outputs, rank // groups, *(1 for _ in kernel))
    )
    | dict(bias="outputs", d_y="batch outputs *steps"),
    dict(batch=Axis(3, 19, 1, 0), places=Axis((9,), (41,)), kernel=Axis((5,), (3,)), inputs=4, outputs=6, rank=2)
    | dict(stride=1, padding=0, dilation=1)
    | dict(groups=1, bias=False, dropout=None, input_gradient=True, scaling=SCALING),
    baseline=_baseline,
    derived={
        "mask": multiplier,
        "geometry": _geometry,
        "steps": _steps,
        "group": lambda inputs, groups: inputs // groups,
    },
)

CASES = (
    *OP.standard_cases(bias=True, dropout=Dropout(0.4, 17)),
    OP.case("one dimension", outputs=7),
    OP.case("two dimensions", 2, (7, 8), (3, 1)),
    OP.case("three dimensions", 2, (4, 5, 3), (2, 1, 3), rank=3),
    OP.case("stride, padding, dilation", 2, (9, 10), (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    OP.case("places after the last stride", 2, (10,), (3,), stride=(4,)),
    OP.case("groups", 2, (9,), (5,), groups=2, rank=4, bias=True),
    OP.case("groups, stride, padding", 2, (7, 6), (3, 2), stride=(2, 1), padding=(1, 1), groups=2, rank=6),
    OP.case("dropout", 2, (7, 8), (3, 1), dropout=Dropout(0.4, 17)),
    OP.case("groups, dropout, stride", 2, (9,), (3,), groups=2, rank=2, stride=(2,), dropout=Dropout(0.3, 5)),
    OP.case("no input gradient", 2, (9,), (5,), input_gradient=False, dropout=Dropout(0.3, 6)),
    OP.case("square kernel", 2, (7, 7), (3, 3), inputs=5, outputs=5, rank=5, padding=(1, 1)),
    OP.case("kernel of one place", 2, (9,), (1,)),
    OP.case("one row of one place", 1, (1,), (3,), padding=(1,)),
)


def _last_two_swapped(tensor: Tensor) -> Tensor:
    """Swap height and width if they are equal, so that the shape does not reveal it."""
    return tensor.mT if tensor.ndim > 3 and tensor.shape[-1] == tensor.shape[-2] else tensor


def _kernel_flipped(tensor: Tensor) -> Tensor:
    return tensor.flip(*range(2, tensor.ndim))


def _other_group(d_lora_B: Tensor, groups: int) -> Tensor:
    """Return the groups' gradients in reverse order."""
    blocks = d_lora_B.reshape(groups, d_lora_B.shape[0] // groups, *d_lora_B.shape[1:])
    return blocks.flip(0).reshape(d_lora_B.shape)


MUTANTS = (
    OP.perturb("scaling forgotten", "d_x d_lora_A d_lora_B", scaling=1.0),
    OP.perturb("low-rank term missing", "d_x", lora_A=lambda s: 0 * s.lora_A),
    OP.perturb("kernel flipped", "d_x", weight=lambda s: _kernel_flipped(s.weight)),
    wrong("kernel flipped", "d_lora_A", lambda d: _kernel_flipped(d)),
    wrong("height and width swapped", "d_lora_A", lambda d: _last_two_swapped(d)),
    OP.perturb("mask ignored", "d_x d_lora_A", dropout=None),
    OP.perturb("mask of another seed", "d_lora_A", dropout=next_seed),
    wrong("mean for sum", "d_lora_A d_lora_B", lambda s, d: d / max(s.h[:, 0].numel(), 1)),
    OP.perturb("batch reversed", "d_lora_A", g=lambda g: g.flip(0)),
    OP.perturb("places reversed", "d_lora_B", h=lambda s: _kernel_flipped(s.h)),
    wrong("groups swapped", "d_lora_B", lambda s, d: _other_group(d, s.geometry.groups)),
)
