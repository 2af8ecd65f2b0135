"""Linear modules that share an input, with whatever an adapter trains in them, forward and backward.

Groups of plain LoRA are one stacked product (`ops.lora_linear_group`), a lone projection is one with its residual in it
(`ops.lora_linear`). A group with extras takes the same ways and adds what they are:
    lora_bias       y_i += s_i β_i behind the product, ∂L/∂β_i from ∂L/∂y_i        (`ops.lora_bias`)
    whole weights   the product reads the trained weight already; ∂L/∂W_i = G_iᵀ x, ∂L/∂b_i = Σ G_i   (`ops.linear`)
and with DoRA each member is a product of its own (`ops.dora_linear`), since its rows of W see their own magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.nn.block_adapter import GroupAdapter, GroupExtras, accumulate_group, accumulate_single
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.dora_linear import DoRALinearSaved, dora_linear_backward, dora_linear_forward
from backhand.ops.linear import LinearSaved, linear_backward
from backhand.ops.lora_bias import LoRABiasSaved, lora_bias_backward, lora_bias_forward
from backhand.ops.lora_linear import LoRASaved, frozen_linear, lora_linear_backward, lora_linear_forward
from backhand.ops.lora_linear_group import (
    LoRAGroupSaved,
    lora_linear_group_backward,
    lora_linear_group_forward,
)


def group_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[y_1 | … | y_n] for the members, and the h of those that are adapted, side by side.

    Args:
        x: (rows, in).
        weight: (Σ out_i, in), the members' weights stacked.
        bias: (Σ out_i,) or None.
        sizes: out_i of each member.
        adapter: of the group.
        residual: (rows, out) added to the result of a lone projection, or None.

    Returns:
        y (rows, Σ out_i) and h (rows, Σ rank); no columns without an adapter.
    """
    extras = adapter.extras
    if extras is not None and any(extras.magnitudes):
        y, h = _members_forward(x, weight, bias, sizes, adapter, extras)
        return (y if residual is None else y.add_(residual)), h
    if len(sizes) == 1:
        y, h = _lone_forward(x, weight, bias, adapter, residual)
    else:
        y, saved = lora_linear_group_forward(x, weight, bias, sizes, adapter.factors, adapter.dropout)
        h = saved.h
    if extras is not None:
        for y_i, factors, lora_bias in zip(y.split(list(sizes), 1), adapter.factors, extras.lora_biases, strict=True):
            if lora_bias is not None and factors is not None:
                lora_bias_forward(y_i, lora_bias, factors.scaling, out=y_i)
    return y, h


def _lone_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: GroupAdapter, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    (factors,) = adapter.factors
    if factors is None:
        return frozen_linear(x, weight, bias, residual), x.new_empty(x.shape[0], 0)
    y, saved = lora_linear_forward(x, weight, bias, *factors, adapter.dropout, residual)
    return y, saved.h


def _members_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    extras: GroupExtras,
) -> tuple[Tensor, Tensor]:
    """With DoRA: member by member."""
    outputs, low_rank = [], []
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    members = zip(weight.split(list(sizes)), biases, adapter.factors, extras.magnitudes, strict=True)
    for weight_i, bias_i, factors, magnitude in members:
        if factors is None or magnitude is None:
            outputs.append(frozen_linear(x, weight_i, bias_i, None))
            continue
        lora_A, lora_B, scaling = factors
        y_i, saved = dora_linear_forward(x, weight_i, bias_i, lora_A, lora_B, *magnitude, scaling, adapter.dropout)
        outputs.append(y_i)
        low_rank.append(saved.h)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return y, low_rank[0] if len(low_rank) == 1 else torch.cat(low_rank, 1)


def group_backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    h: Tensor,
    lora: LoRAParameters,
    *,
    input_gradient: bool,
) -> Tensor | None:
    """∂L/∂x, (rows, in), or None when not asked for; everything trained gets its gradient added to the flat buffer.

    Args:
        d_y: (rows, Σ out_i).
        x, weight, sizes, adapter: as in the forward.
        h: what the forward returned.
        lora: whose gradient buffer receives.
        input_gradient: whether anything below needs ∂L/∂x.
    """
    extras = adapter.extras
    if extras is not None:
        _accumulate_extras(d_y, x, weight, sizes, adapter, extras, lora)
        if any(extras.magnitudes):
            return _members_backward(d_y, x, weight, sizes, adapter, extras, h, lora, input_gradient)
    if len(sizes) == 1:
        (factors,) = adapter.factors
        if factors is None:
            return d_y @ weight if input_gradient else None
        lone = LoRASaved(x, weight, factors.lora_A, factors.lora_B, h, factors.scaling, adapter.dropout)
        grads = lora_linear_backward(d_y, lone, input_gradient=input_gradient)
        accumulate_single(lora, adapter, grads)
        return grads.d_x
    stacked = LoRAGroupSaved(x, weight, tuple(sizes), adapter.factors, h, adapter.dropout)
    group_grads = lora_linear_group_backward(d_y, stacked, input_gradient=input_gradient)
    accumulate_group(lora, adapter, group_grads)
    return group_grads.d_x


def _accumulate_extras(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    extras: GroupExtras,
    lora: LoRAParameters,
) -> None:
    """Gradients of biases of lora_B, and of weights and biases that are trained in full."""
    members = zip(adapter.names, d_y.split(list(sizes), 1), weight.split(list(sizes)), adapter.factors, strict=True)
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


def _members_backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    extras: GroupExtras,
    h: Tensor,
    lora: LoRAParameters,
    input_gradient: bool,
) -> Tensor | None:
    """With DoRA: member by member, their input gradients added up."""
    d_x: Tensor | None = None
    column = 0
    members = zip(
        adapter.names,
        d_y.split(list(sizes), 1),
        weight.split(list(sizes)),
        adapter.factors,
        extras.magnitudes,
        strict=True,
    )
    for name, d_y_i, weight_i, factors, magnitude in members:
        if factors is None or magnitude is None:
            d_x_i = d_y_i @ weight_i if input_gradient else None
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
