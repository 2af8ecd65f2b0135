"""What a group of linear modules may train beside plain factors, forward and backward.

lora_bias       y_i += s_i β_i behind the product, ∂L/∂β_i from ∂L/∂y_i        (`ops.lora_bias`)
whole weights   the product reads the trained weight already; ∂L/∂W_i = G_iᵀ x, ∂L/∂b_i = Σ G_i   (`ops.linear`)
DoRA            each member is a product of its own (`ops.dora_linear`): its rows of W see their own magnitude
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.dora import dora_norm
from backhand.ops.dora_linear import DoRALinearSaved, dora_linear_backward, dora_linear_forward
from backhand.ops.frozen_matrix import FrozenMatrix, frozen_input_gradient, frozen_linear, frozen_split
from backhand.ops.linear import LinearSaved, linear_backward
from backhand.ops.lora_bias import LoRABiasSaved, lora_bias_backward, lora_bias_forward
from backhand.ops.lora_linear import Factors

if TYPE_CHECKING:
    from backhand.nn.decoder.adapted_group import GroupAdapter


class GroupExtras(NamedTuple):
    """What a group trains beside factors, for each member; None or False where it does not.

    Attributes:
        magnitudes: DoRA's; c holds as long as the factors do.
        lora_biases: (out,) bias of lora_B in the compute dtype.
        weights, biases: whether the member's own weight or bias is trained in full.
    """

    magnitudes: tuple[Magnitude | None, ...]
    lora_biases: tuple[Tensor | None, ...]
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]


class Magnitude(NamedTuple):
    """DoRA's m and c of one member, (out,) each; see `ops.dora`."""

    magnitude: Tensor
    norm: Tensor


def of_members(
    lora: LoRAParameters,
    names: tuple[str, ...],
    members: tuple[Factors | None, ...],
    weights: Sequence[FrozenMatrix] | None,
) -> GroupExtras | None:
    """The extras of a group, or None where it trains plain factors alone.

    Args:
        lora: the adapter.
        names: paths of the members.
        members: their factors.
        weights: (out, in) of each; needed by DoRA alone, whose norms are taken here.
    """
    slots = [lora.slots.get(name) for name in names]
    magnitudes: list[Magnitude | None] = []
    for place, (slot, factors) in enumerate(zip(slots, members, strict=True)):
        if slot is None or factors is None or not slot.use_dora:
            magnitudes.append(None)
        elif weights is None:
            raise ValueError("DoRA needs the weights of the block")
        else:
            norm = dora_norm(weights[place], *factors)
            magnitudes.append(Magnitude(lora.tensor(f"{slot.name}.lora_magnitude").to(norm.dtype), norm))
    extras = GroupExtras(
        tuple(magnitudes),
        tuple(lora.compute(f"{slot.name}.lora_bias") if slot and slot.lora_bias else None for slot in slots),
        tuple(f"{name}.weight" in lora.trained for name in names),
        tuple(f"{name}.bias" in lora.trained for name in names),
    )
    there = any(part is not None for part in (*extras.magnitudes, *extras.lora_biases))
    return extras if there or any((*extras.weights, *extras.biases)) else None


def add_lora_biases(y: Tensor, sizes: Sequence[int], adapter: GroupAdapter, extras: GroupExtras) -> None:
    """Add the bias of each member's lora_B to y, (rows, Σ out_i), in place."""
    for y_i, factors, lora_bias in zip(y.split(list(sizes), 1), adapter.factors, extras.lora_biases, strict=True):
        if lora_bias is not None and factors is not None:
            lora_bias_forward(y_i, lora_bias, factors.scaling, out=y_i)


def dora_forward(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    extras: GroupExtras,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y, (rows, Σ out_i), and h of a group with DoRA, member by member; see `adapted_group.group_forward`."""
    outputs, low_rank = [], []
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    members = zip(frozen_split(weight, sizes), biases, adapter.factors, extras.magnitudes, strict=True)
    for weight_i, bias_i, factors, magnitude in members:
        if factors is None or magnitude is None:
            outputs.append(frozen_linear(x, weight_i, bias_i))
            continue
        lora_A, lora_B, scaling = factors
        y_i, saved = dora_linear_forward(x, weight_i, bias_i, lora_A, lora_B, *magnitude, scaling, adapter.dropout)
        outputs.append(y_i)
        low_rank.append(saved.h)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    if residual is not None:
        y.add_(residual)
    return y, low_rank[0] if len(low_rank) == 1 else torch.cat(low_rank, 1)


def accumulate_extras(
    d_y: Tensor,
    x: Tensor,
    weight: FrozenMatrix,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    extras: GroupExtras,
    lora: LoRAParameters,
) -> None:
    """Gradients of biases of lora_B, and of weights and biases that are trained in full."""
    members = zip(adapter.names, d_y.split(list(sizes), 1), frozen_split(weight, sizes), adapter.factors, strict=True)
    for place, (name, d_y_i, weight_i, factors) in enumerate(members):
        if extras.lora_biases[place] is not None and factors is not None:
            grads = lora_bias_backward(d_y_i, LoRABiasSaved(factors.scaling, -1))
            lora.gradient(f"{name}.lora_bias").add_(grads.d_lora_bias)
        if extras.weights[place] or extras.biases[place]:
            whole = linear_backward(d_y_i, LinearSaved(x, weight_i, extras.biases[place]), input_gradient=False)
            if extras.weights[place]:
                lora.gradient(f"{name}.weight").add_(whole.d_weight)
            if whole.d_bias is not None:
                lora.gradient(f"{name}.bias").add_(whole.d_bias)


def dora_backward(
    d_y: Tensor,
    x: Tensor,
    weight: FrozenMatrix,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    extras: GroupExtras,
    h: Tensor,
    lora: LoRAParameters,
    input_gradient: bool,
) -> Tensor | None:
    """∂L/∂x of a group with DoRA, member by member, or None when not asked for."""
    d_x: Tensor | None = None
    column = 0
    members = zip(
        adapter.names,
        d_y.split(list(sizes), 1),
        frozen_split(weight, sizes),
        adapter.factors,
        extras.magnitudes,
        strict=True,
    )
    for name, d_y_i, weight_i, factors, magnitude in members:
        if factors is None or magnitude is None:
            d_x_i = frozen_input_gradient(d_y_i, weight_i) if input_gradient else None
        else:
            lora_A, lora_B, scaling = factors
            h_i = h[:, column : column + len(lora_A)]
            column += len(lora_A)
            saved = DoRALinearSaved(x, weight_i, lora_A, lora_B, *magnitude, h_i, scaling, adapter.dropout)
            grads = dora_linear_backward(d_y_i, saved, input_gradient=input_gradient)
            lora.d_lora_A(name).add_(grads.d_lora_A)
            lora.d_lora_B(name).add_(grads.d_lora_B)
            lora.gradient(f"{name}.lora_magnitude").add_(grads.d_magnitude)
            d_x_i = grads.d_x
        if d_x_i is not None:
            d_x = d_x_i if d_x is None else d_x.add_(d_x_i)
    return d_x
