"""The bias of lora_B: cases and mutants."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.dora import along
from backhand.ops.lora_bias import LoRABiasSaved, lora_bias_backward, lora_bias_forward, lora_bias_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

SCALING = 1.7


def _case(name: str, shape: tuple[int, ...], *, axis: int = -1) -> Case:
    draw = Draw(f"lora_bias: {name}")
    tensors = {"z": draw.normal(*shape), "lora_bias": draw.normal(shape[axis]), "d_y": draw.normal(*shape)}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = lora_bias_forward(t["z"], t["lora_bias"], SCALING, axis)
        grads = backward(t["d_y"], saved)
        return ByHand(y, {"z": grads.d_z, "lora_bias": grads.d_lora_bias})

    def reference(t: Tensors) -> Tensor:
        return lora_bias_reference(t["z"], t["lora_bias"], SCALING, axis)

    def usual(t: Tensors) -> Tensor:
        return t["z"] + SCALING * along(t["lora_bias"], t["z"], axis)

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("rows", (5, 7)),
    _case("documents and rows", (2, 5, 7)),
    _case("channels of a picture", (2, 5, 3, 4), axis=1),
    _case("channels of a square", (4, 4), axis=0),
    _case("one row", (1, 7)),
    _case("no rows", (0, 7)),
    _case("training size", (67, 96)),
)


def _without_first_row(g: Tensor, saved: LoRABiasSaved) -> Tensor:
    channels_last = g.movedim(saved.axis, -1).reshape(-1, g.shape[saved.axis])
    return saved.scaling * channels_last[1:].sum(0)


def _rows(g: Tensor, saved: LoRABiasSaved) -> int:
    return max(g.numel() // max(g.shape[saved.axis], 1), 1)


MUTANTS = (
    *standard_mutants("d_z", "d_lora_bias"),
    Mutant("scaled", "d_z", lambda _g, s, right: s.scaling * right.d_z),
    Mutant("scaling forgotten", "d_lora_bias", lambda _g, s, right: right.d_lora_bias / s.scaling),
    Mutant("scaling twice", "d_lora_bias", lambda _g, s, right: right.d_lora_bias * s.scaling),
    Mutant("mean for sum", "d_lora_bias", lambda g, s, right: right.d_lora_bias / _rows(g, s)),
    Mutant("first row missing", "d_lora_bias", lambda g, s, _right: _without_first_row(g, s)),
    Mutant("channels reversed", "d_lora_bias", lambda _g, _s, right: right.d_lora_bias.flip(0)),
)

PROOFS = (OpProof("lora_bias", lora_bias_backward, CASES, MUTANTS),)
