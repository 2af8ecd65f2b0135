"""DoRA's magnitude: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.dora import DoRASaved, along, weight_scale
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import SHAPE, Op


def _baseline(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    y = z * along(magnitude / norm, z, axis)
    return y if bias is None else y + along(bias, y, axis)


OP = Op(
    "dora",
    {
        "z": "*shape",
        # Norms are positive. A magnitude may become negative in training.
        "magnitude": lambda draw, channels: draw.normal(channels) + 0.3,
        "norm": lambda draw, channels: draw.normal(channels).abs() + 0.5,
        "d_y": "*shape",
        "bias": "channels",
    },
    {"shape": SHAPE, "axis": -1, "bias": False},
    baseline=_baseline,
    derived={"channels": lambda shape, axis: shape[axis]},
)

CASES = (
    *OP.standard_cases(bias=True),
    OP.case("no bias"),
    OP.case("channels of a picture", (2, 5, 3, 4), axis=1, bias=True),
    OP.case("channels of a square", (4, 4), axis=0),
    OP.case("one channel", (6, 1)),
)


def _other_axis(saved: DoRASaved) -> int:
    """Return another axis of the same size as the channels, if there is one."""
    size = saved.z.shape[saved.axis]
    alike = [axis for axis in range(saved.z.dim()) if saved.z.shape[axis] == size]
    return next((axis for axis in alike if axis != saved.axis % saved.z.dim()), saved.axis)


MUTANTS = (
    wrong("norm forgotten", "d_z", lambda g, s: g * along(s.magnitude, s.z, s.axis)),
    wrong("magnitude forgotten", "d_z", lambda g, s: g / along(s.norm, s.z, s.axis)),
    wrong("not rescaled", "d_z", lambda g: g),
    OP.perturb("along another axis", "d_z d_magnitude", axis=lambda s: _other_axis(s)),
    wrong(
        "the norm's own gradient subtracted",
        "d_z",
        lambda g, s, d, right: (
            d - s.z * along(right.d_magnitude * weight_scale(s.magnitude, s.norm, g.dtype), s.z, s.axis)
        ),
    ),
    wrong("norm forgotten", "d_magnitude", lambda s, d: d * s.norm),
    wrong("of y for of z", "d_magnitude", lambda s, d: d * s.magnitude / s.norm),
    OP.perturb("z left out", "d_magnitude", z=lambda s: torch.ones_like(s.z)),
    wrong("mean for sum", "d_magnitude", lambda s, d: d / max(s.z.numel() // max(s.z.shape[s.axis], 1), 1)),
)
