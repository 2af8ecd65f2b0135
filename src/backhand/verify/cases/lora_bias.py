"""The bias of lora_B: cases and mutants."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.dora import along
from backhand.ops.lora_bias import LoRABiasSaved
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import SCALING, SHAPE, Op

OP = Op(
    "lora_bias",
    {"z": "*shape", "lora_bias": "channels", "d_y": "*shape"},
    {"shape": SHAPE, "axis": -1, "scaling": SCALING},
    baseline=lambda z, lora_bias, scaling, axis: z + scaling * along(lora_bias, z, axis),
    derived={"channels": lambda shape, axis: shape[axis]},
)

CASES = (
    *OP.standard_cases(),
    OP.case("channels of a picture", (2, 5, 3, 4), axis=1),
    OP.case("channels of a square", (4, 4), axis=0),
)


def _without_first_row(g: Tensor, s: LoRABiasSaved) -> Tensor:
    return s.scaling * g.movedim(s.axis, -1).reshape(-1, g.shape[s.axis])[1:].sum(0)


MUTANTS = (
    wrong("scaled", "d_z", lambda d, s: s.scaling * d),
    wrong("scaling forgotten", "d_lora_bias", lambda d, s: d / s.scaling),
    wrong("scaling twice", "d_lora_bias", lambda d, s: d * s.scaling),
    wrong("mean for sum", "d_lora_bias", lambda g, s, d: d / max(g.numel() // max(g.shape[s.axis], 1), 1)),
    wrong("first row missing", "d_lora_bias", _without_first_row),
    wrong("channels reversed", "d_lora_bias", lambda d: d.flip(0)),
)
