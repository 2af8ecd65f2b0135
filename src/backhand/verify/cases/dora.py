"""DoRA's magnitude: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backhand.ops.dora import DoRASaved, along, dora_backward, dora_forward, dora_reference, gain
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants


def _case(name: str, shape: tuple[int, ...], *, axis: int = -1, bias: bool = False) -> Case:
    draw = Draw(f"dora: {name}")
    outputs = shape[axis]
    tensors = {
        "z": draw.normal(*shape),
        # Lengths are above zero; a magnitude that training has carried below zero is a magnitude all the same.
        "magnitude": draw.normal(outputs) + 0.3,
        "norm": draw.normal(outputs).abs() + 0.5,
        "d_y": draw.normal(*shape),
    }
    if bias:
        tensors["bias"] = draw.normal(outputs)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = dora_forward(t["z"], t["magnitude"], t["norm"], t.get("bias"), axis)
        grads = backward(t["d_y"], saved)
        return ByHand(y, {"z": grads.d_z, "magnitude": grads.d_magnitude})

    def reference(t: Tensors) -> Tensor:
        return dora_reference(t["z"], t["magnitude"], t["norm"], t.get("bias"), axis)

    def usual(t: Tensors) -> Tensor:
        y = t["z"] * along(t["magnitude"] / t["norm"], t["z"], axis)
        return y + along(t["bias"], y, axis) if "bias" in t else y

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("rows", (5, 7)),
    _case("documents and rows", (2, 5, 7)),
    _case("bias", (5, 7), bias=True),
    _case("channels of a picture", (2, 5, 3, 4), axis=1, bias=True),
    _case("channels of a square", (4, 4), axis=0),
    _case("one channel", (6, 1)),
    _case("one row", (1, 7), bias=True),
    _case("no rows", (0, 7), bias=True),
    _case("training size", (67, 96), bias=True),
)


def _saved(saved: DoRASaved, **changes: Any) -> DoRASaved:
    return saved._replace(**changes)


def _redo(g: Tensor, saved: DoRASaved, **changes: Any) -> Any:
    return dora_backward(g, _saved(saved, **changes))


def _other_axis(saved: DoRASaved) -> int:
    """An axis of the same size as the channels', where there is one."""
    size = saved.z.shape[saved.axis]
    alike = [axis for axis in range(saved.z.dim()) if saved.z.shape[axis] == size]
    return next((axis for axis in alike if axis != saved.axis % saved.z.dim()), saved.axis)


MUTANTS = (
    *standard_mutants("d_z", "d_magnitude"),
    Mutant("norm forgotten", "d_z", lambda g, s, _right: g * along(s.magnitude, s.z, s.axis)),
    Mutant("magnitude forgotten", "d_z", lambda g, s, _right: g / along(s.norm, s.z, s.axis)),
    Mutant("not rescaled", "d_z", lambda g, _s, _right: g),
    Mutant("along another axis", "d_z", lambda g, s, _right: _redo(g, s, axis=_other_axis(s)).d_z),
    Mutant(
        # What comes of differentiating the norm as if magnitude and norm were one.
        "the norm's own gradient subtracted",
        "d_z",
        lambda g, s, right: (
            right.d_z - s.z * along(right.d_magnitude * gain(s.magnitude, s.norm, g.dtype), s.z, s.axis)
        ),
    ),
    Mutant("norm forgotten", "d_magnitude", lambda _g, s, right: right.d_magnitude * s.norm),
    Mutant("of y for of z", "d_magnitude", lambda _g, s, right: right.d_magnitude * s.magnitude / s.norm),
    Mutant("z left out", "d_magnitude", lambda g, s, _right: _redo(g, s, z=torch.ones_like(s.z)).d_magnitude),
    Mutant("along another axis", "d_magnitude", lambda g, s, _right: _redo(g, s, axis=_other_axis(s)).d_magnitude),
    Mutant(
        "mean for sum",
        "d_magnitude",
        lambda _g, s, right: right.d_magnitude / max(s.z.numel() // max(s.z.shape[s.axis], 1), 1),
    ),
)

PROOFS = (OpProof("dora", dora_backward, CASES, MUTANTS),)
