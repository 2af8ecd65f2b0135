"""LoRA linears that share their input, such as q/k/v or gate/up, in few large products; a single one is a group of one.

    y_i = r_i + x W_iᵀ + b_i + s_i (x̃ A_iᵀ) B_iᵀ,   i = 1 … n      [arXiv:2106.09685, eq. 3, for each layer]

Stacked: W = [W_1; …; W_n] (Σ out_i, in), A = [A_1; …; A_n] (Σ rank_i, in), so that y = [y_1 | … | y_n] and
h = x̃ Aᵀ = [h_1 | … | h_n] take one product each. Only the B_i need separate products:
    y = r + x Wᵀ + b,   then   y_i += s_i h_i B_iᵀ.
r is the residual, added within the product; its gradient is G itself. x̃ = m ⊙ x under dropout, else x.

Backward. With G = [G_1 | … | G_n] = ∂L/∂y, each layer follows `lora_linear`, and the gradients of shared tensors are
summed. There are three functions, since their inputs become available at different times:
    h_gradient             ∂L/∂h_i = s_i G_i B_i                  from G and h, as the columns of ∂L/∂h (..., Σ rank_i)
                           ∂L/∂B_i = s_i G_iᵀ h_i                 (out_i, rank_i), in the same pass over G
    group_input_gradient   ∂L/∂x   = G W + m ⊙ ((∂L/∂h) A)        from G and ∂L/∂h; the products sum over the layers
    group_A_gradients      ∂L/∂A   = (∂L/∂h)ᵀ x̃                   from ∂L/∂h, once x or the norm that produced it is
                                                                  there; its row blocks are the ∂L/∂A_i
If all inputs are available at once, `group_gradients` combines the last two and generates m once. Gradients of factors
are added to the buffers in `LoRAFactors`, which are views of the adapter's flat gradient buffer.

A layer without an adapter takes part in W and G only. All layers share one dropout multiplier m, since they share x. It
has the same distribution as a separate one for each layer.
Saved: x (or recomputed), h. Never formed: Gᵀ x, B A, separate copies of x per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import LowRankUpdate
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear, fuse_down_projection
from backhand.ops.layer_norm import NormSaved, norm_apply
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.low_rank import LoRAFactors, add_lora_A_gradients, down_projection, h_gradient
from backhand.ops.rms_norm import RMSNormSaved
from backhand.ops.weight_tiles import FrozenMatrix


class LoRAGroup(NamedTuple):
    """The adapters of the layers of one input, in the order of their columns, and the dropout of their input."""

    factors: tuple[LoRAFactors, ...] = ()
    dropout: Dropout | None = None


class LoRAGroupSaved(NamedTuple):
    """Saved for the backward: x (..., in), the stacked weight, the group, h (..., Σ rank)."""

    x: Tensor | NormSaved  # a caller may replace a norm's output by its saved tensors
    weight: FrozenMatrix
    group: LoRAGroup
    h: Tensor


class LoRAGroupGrads(NamedTuple):
    """d_x (..., in) or None; the buffers d_lora_A (rank_i, in) and d_lora_B (out_i, rank_i) of each adapter."""

    d_x: Tensor | None
    d_lora_A: tuple[Tensor, ...]
    d_lora_B: tuple[Tensor, ...]


def lora_group_forward(
    x: Tensor, weight: FrozenMatrix, bias: Tensor | None, group: LoRAGroup, residual: Tensor | None = None
) -> tuple[Tensor, LoRAGroupSaved]:
    """Compute [y_1 | … | y_n] of the n layers.

    Args:
        x: (..., in).
        weight: (Σ out_i, in), the layers' frozen weights stacked.
        bias: (Σ out_i,) or None.
        group: their adapters.
        residual: (..., Σ out_i) or None.

    Returns:
        y (..., Σ out_i), and the saved tensors; without any adapter h has no columns.
    """
    x_rows, adapters, lead = x.flatten(0, -2), group.factors, x.shape[:-1]
    ranks = [len(adapter.lora_A) for adapter in adapters]
    m = None if group.dropout is None or not adapters else multiplier(x_rows, group.dropout)
    fused = m is None and fuse_down_projection(x_rows, weight.shape[0], sum(ranks))
    if fused or not adapters:
        h = torch.empty(x_rows.shape[0], sum(ranks), dtype=x.dtype, device=x.device)
    else:  # before the large product, which would evict x from the caches
        h = down_projection(x_rows if m is None else x_rows * m, stacked_A(adapters))
    updates = [
        LowRankUpdate(adapter.column, part, adapter.lora_B, adapter.scaling, adapter.lora_A if fused else None)
        for adapter, part in zip(adapters, h.split_with_sizes(ranks, dim=1), strict=True)
    ]
    y = frozen_linear(x_rows, weight, bias, None if residual is None else residual.flatten(0, -2), updates=updates)
    return y.view(*lead, y.shape[1]), LoRAGroupSaved(x, weight, group, h.view(*lead, h.shape[1]))


def lora_group_backward(d_y: Tensor, saved: LoRAGroupSaved, *, input_gradient: bool = True) -> LoRAGroupGrads:
    """Map d_y (..., Σ out_i) to the gradients derived above; those of factors are added to the adapters' buffers.

    Args:
        d_y: ∂L/∂y of all layers.
        input_gradient: False skips ∂L/∂x.
    """
    x, weight, group, h = saved
    g = d_y.flatten(0, -2)
    d_h = h_gradient(g, h.flatten(0, -2), group.factors)
    d_x = None
    if input_gradient:
        d_x = group_gradients(g, x, d_h, weight, group).view(*d_y.shape[:-1], weight.shape[1])
    else:
        group_A_gradients(x, d_h, group)
    d_factors = [(one.d_lora_A, one.d_lora_B) for one in group.factors]
    return LoRAGroupGrads(d_x, tuple(a for a, _ in d_factors), tuple(b for _, b in d_factors))


def group_gradients(g: Tensor, x: Tensor | NormSaved, d_h: Tensor, weight: FrozenMatrix, group: LoRAGroup) -> Tensor:
    """Add ∂L/∂A_i like `group_A_gradients`, and return ∂L/∂x like `group_input_gradient`; m is generated once."""
    rows = (x if isinstance(x, Tensor) else x.x).flatten(0, -2)
    m = None if group.dropout is None or not group.factors else multiplier(rows, group.dropout)
    group_A_gradients(x, d_h, group, m)
    return group_input_gradient(g, d_h, weight, group, m)


def group_input_gradient(
    g: Tensor, d_h: Tensor, weight: FrozenMatrix, group: LoRAGroup, m: Tensor | None = None
) -> Tensor:
    """Compute ∂L/∂x (rows, in) from G (rows, Σ out_i) and ∂L/∂h (rows, Σ rank). m is generated if it is not given."""
    if not group.factors:
        return frozen_input_gradient(g, weight)
    lora_A = stacked_A(group.factors)
    if group.dropout is None:
        return frozen_input_gradient(g, weight, updates=[LowRankUpdate(0, d_h, lora_A, transposed=True)])
    d_x, low_rank = frozen_input_gradient(g, weight), d_h @ lora_A
    m = multiplier(d_x, group.dropout) if m is None else m
    return d_x.add_(low_rank) if m is None else d_x.addcmul_(m, low_rank)


def group_A_gradients(x: Tensor | NormSaved, d_h: Tensor, group: LoRAGroup, m: Tensor | None = None) -> None:
    """Add ∂L/∂A_i to each `d_lora_A`, from x (..., in) or the saved tensors of its norm, and ∂L/∂h (rows, Σ rank)."""
    grad_buffers = [adapter.d_lora_A for adapter in group.factors]
    if isinstance(x, RMSNormSaved) and group.dropout is None:
        add_lora_A_gradients(
            x._replace(x=x.x.flatten(0, -2), inverse_rms=x.inverse_rms.flatten(0, -2)), d_h, grad_buffers
        )
    elif grad_buffers:
        x_rows = (x if isinstance(x, Tensor) else norm_apply(x)).flatten(0, -2)
        if m is None and group.dropout is not None:
            m = multiplier(x_rows, group.dropout)
        add_lora_A_gradients(x_rows if m is None else x_rows * m, d_h, grad_buffers)


def stacked_A(adapters: Sequence[LoRAFactors]) -> Tensor:
    """Stack [A_1; …; A_n] of shape (Σ rank, in) of at least one adapter."""
    return adapters[0].lora_A if len(adapters) == 1 else torch.cat([adapter.lora_A for adapter in adapters])


def lora_group_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: LoRAGroup,
    residual: Tensor | None = None,
    m: Tensor | None = None,
) -> Tensor:
    """Compute the same y layer by layer, with the products B A formed.

    Args:
        m: the dropout multiplier, which has the shape of x; None without dropout.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    seen = x if m is None else x * m
    for column, lora_A, lora_B, scaling, *_ in group.factors:
        delta = torch.nn.functional.linear(seen, scaling * (lora_B @ lora_A))
        y = y + torch.nn.functional.pad(delta, (column, weight.shape[0] - column - len(lora_B)))
    return y if residual is None else y + residual
