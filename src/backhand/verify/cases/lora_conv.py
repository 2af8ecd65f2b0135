"""LoRA convolution: cases and mutants."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backhand.ops.dropout import dropout_multiplier
from backhand.ops.lora_conv import (
    ConvGeometry,
    LoRAConvSaved,
    convolution,
    lora_conv_backward,
    lora_conv_forward,
    lora_conv_reference,
)
from backhand.ops.lora_linear import Dropout
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

SCALING = 1.7


def _case(
    name: str,
    batch: int,
    places: tuple[int, ...],
    kernel: tuple[int, ...],
    *,
    channels: tuple[int, int] = (4, 6),
    rank: int = 2,
    stride: tuple[int, ...] | None = None,
    padding: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
    bias: bool = False,
    dropout: Dropout | None = None,
    input_gradient: bool = True,
) -> Case:
    draw = Draw(f"lora_conv: {name}")
    ones = (1,) * len(kernel)
    geometry = ConvGeometry(stride or ones, padding or (0,) * len(kernel), dilation or ones, groups)
    inputs, outputs = channels
    tensors = {
        "x": draw.normal(batch, inputs, *places),
        "weight": draw.normal(outputs, inputs // groups, *kernel),
        "lora_A": draw.normal(rank, inputs, *kernel),
        "lora_B": draw.normal(outputs, rank // groups, *ones),
    }
    if bias:
        tensors["bias"] = draw.normal(outputs)
    steps = convolution(tensors["x"], tensors["weight"], None, geometry).shape[2:]
    tensors["d_y"] = draw.normal(batch, outputs, *steps)

    def mask(t: Tensors) -> Tensor | None:
        if dropout is None:
            return None
        x = t["x"]
        return dropout_multiplier(x.shape, dropout.probability, dropout.seed, dtype=x.dtype, device=x.device)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = lora_conv_forward(
            t["x"], t["weight"], t.get("bias"), t["lora_A"], t["lora_B"], SCALING, geometry, dropout
        )
        grads = backward(t["d_y"], saved, input_gradient=input_gradient)
        gradients = {"lora_A": grads.d_lora_A, "lora_B": grads.d_lora_B}
        return ByHand(y, gradients | {"x": grads.d_x} if input_gradient else gradients)

    def reference(t: Tensors) -> Tensor:
        return lora_conv_reference(
            t["x"], t["weight"], t.get("bias"), t["lora_A"], t["lora_B"], SCALING, geometry, mask(t)
        )

    def usual(t: Tensors) -> Tensor:
        m = mask(t)
        h = convolution(t["x"] if m is None else t["x"] * m, t["lora_A"], None, geometry._replace(groups=1))
        at_one_place = ConvGeometry(ones, (0,) * len(kernel), ones, groups)
        return convolution(t["x"], t["weight"], t.get("bias"), geometry) + SCALING * convolution(
            h, t["lora_B"], None, at_one_place
        )

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("one dimension", 3, (9,), (5,), rank=2, channels=(4, 7)),
    _case("two dimensions", 2, (7, 8), (3, 1)),
    _case("three dimensions", 2, (4, 5, 3), (2, 1, 3), rank=3),
    _case("stride, padding, dilation", 2, (9, 10), (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    _case("places behind the last stride", 2, (10,), (3,), stride=(4,)),
    _case("bias", 3, (9,), (5,), bias=True),
    _case("groups", 2, (9,), (5,), groups=2, rank=4, bias=True),
    _case("groups, stride, padding", 2, (7, 6), (3, 2), stride=(2, 1), padding=(1, 1), groups=2, rank=6),
    _case("dropout", 2, (7, 8), (3, 1), dropout=Dropout(0.4, 17)),
    _case("groups, dropout, stride", 2, (9,), (3,), groups=2, rank=2, stride=(2,), dropout=Dropout(0.3, 5)),
    _case("no input gradient", 2, (9,), (5,), input_gradient=False, dropout=Dropout(0.3, 6)),
    _case("square kernel", 2, (7, 7), (3, 3), channels=(5, 5), rank=5, padding=(1, 1)),
    _case("kernel of one place", 2, (9,), (1,)),
    _case("one row of one place", 1, (1,), (3,), padding=(1,)),
    _case("empty batch", 0, (9,), (5,), bias=True, dropout=Dropout(0.4, 17)),
)


def _redo(g: Tensor, s: LoRAConvSaved, **changes: Any) -> Any:
    return lora_conv_backward(g, s._replace(**changes))


def _last_two_swapped(tensor: Tensor) -> Tensor:
    """Height and width taken for each other where the shape does not give it away."""
    return tensor.mT if tensor.ndim > 3 and tensor.shape[-1] == tensor.shape[-2] else tensor


def _kernel_flipped(tensor: Tensor) -> Tensor:
    return tensor.flip(*range(2, tensor.ndim))


def _next_seed(s: LoRAConvSaved) -> Dropout | None:
    return s.dropout and s.dropout._replace(seed=s.dropout.seed + 1)


def _places(s: LoRAConvSaved) -> int:
    return max(s.h[:, 0].numel(), 1)


def _other_group(d_lora_B: Tensor, groups: int) -> Tensor:
    """The groups' gradients in reverse order."""
    blocks = d_lora_B.reshape(groups, d_lora_B.shape[0] // groups, *d_lora_B.shape[1:])
    return blocks.flip(0).reshape(d_lora_B.shape)


MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B"),
    Mutant("scaling forgotten", "d_x", lambda g, s, _right: _redo(g, s, scaling=1.0).d_x),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, scaling=1.0).d_lora_A),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, scaling=1.0).d_lora_B),
    Mutant("low-rank term missing", "d_x", lambda g, s, _right: _redo(g, s, lora_A=0 * s.lora_A).d_x),
    Mutant("kernel flipped", "d_x", lambda g, s, _right: _redo(g, s, weight=_kernel_flipped(s.weight)).d_x),
    Mutant("kernel flipped", "d_lora_A", lambda _g, _s, right: _kernel_flipped(right.d_lora_A)),
    Mutant("height and width swapped", "d_lora_A", lambda _g, _s, right: _last_two_swapped(right.d_lora_A)),
    Mutant("mask ignored", "d_x", lambda g, s, _right: _redo(g, s, dropout=None).d_x),
    Mutant("mask ignored", "d_lora_A", lambda g, s, _right: _redo(g, s, dropout=None).d_lora_A),
    Mutant("mask of another seed", "d_lora_A", lambda g, s, _right: _redo(g, s, dropout=_next_seed(s)).d_lora_A),
    Mutant("mean for sum", "d_lora_A", lambda _g, s, right: right.d_lora_A / _places(s)),
    Mutant("mean for sum", "d_lora_B", lambda _g, s, right: right.d_lora_B / _places(s)),
    Mutant("batch reversed", "d_lora_A", lambda g, s, _right: _redo(g.flip(0), s).d_lora_A),
    Mutant("places reversed", "d_lora_B", lambda g, s, _right: _redo(g, s, h=_kernel_flipped(s.h)).d_lora_B),
    Mutant("groups swapped", "d_lora_B", lambda _g, s, right: _other_group(right.d_lora_B, s.geometry.groups)),
)

PROOFS = (OpProof("lora_conv", lora_conv_backward, CASES, MUTANTS),)
