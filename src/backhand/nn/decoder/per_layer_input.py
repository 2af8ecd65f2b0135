"""Gemma 4's per-layer inputs: what each layer is given of its own, and the end of a block that takes it.

Before the first block, from the embedded tokens h, (T, hidden), and their ids, for all L layers at once:

    e = (norm(h W_mᵀ / √hidden) + √p E[ids]) / √2      (T, L, p), the norm over p features of each layer

with W_m, (L p, hidden), the model's per-layer projection, and E, (vocab, L p), a second table. Behind layer l's MLP:

    x₃ = s (x₂ + norm(p_l W_pᵀ)),   p_l = φ(x₂ W_gᵀ) ⊙ e_l

with W_g, (p, hidden), W_p, (hidden, p), and s the layer's scalar; a layer without such inputs has s alone.
W_m, W_g and W_p are linear modules and may have adapters; E, s and the norm over p stay frozen.

Backward of the end, from G = ∂L/∂x₃: what enters it is s G, which goes both ways, around and through the norm, W_p, the
gate (`ops.glu`, with e_l in the place of `up`) and W_g:
    ∂L/∂p_l = (norm's backward of s G) W_p                                     (T, p)
    ∂L/∂e_l = φ(x₂ W_gᵀ) ⊙ ∂L/∂p_l                                             (T, p)
    ∂L/∂x₂ = s G + (φ'(x₂ W_gᵀ) ⊙ e_l ⊙ ∂L/∂p_l) W_g                           (T, hidden)
Backward of the beginning, where W_m has an adapter or the embedding is trained: ∂L/∂e / √2 through the norm, times
1/√hidden, is ∂L/∂(h W_mᵀ), (T, L p); from it W_m's adapter gets its gradient, and h another term beside the stream's.

Kept of the end: x₂, the gate, its adapter's h and that of W_p, and input and factor of the norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import (
    PER_LAYER_GATE,
    PER_LAYER_PROJECTION,
    BlockAdapter,
    before_blocks_adapter,
    trains_embedding,
)
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.family import PER_LAYER_NORM, DecoderConfig
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.projections import group_backward, group_forward, residual_backward, residual_forward
from backhand.nn.decoder.weights import BlockWeights, PerLayerWeights
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_backward, rms_norm_forward

_HALF_ROOT = 2.0**-0.5


class PLESaved(NamedTuple):
    """What the end of a block keeps of T tokens; None throughout where it only multiplies."""

    x2: Tensor | None  # (T, hidden)
    gate: Tensor | None  # (T, p)
    h_gate: Tensor | None  # (T, rank)
    h_projection: Tensor | None  # (T, rank)
    projected: RMSNormSaved | None


def ple_forward(
    x2: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext
) -> tuple[Tensor, PLESaved]:
    """x₃, (T, hidden), from x₂ of the loss_positions rows, and what its backward needs."""
    config, scalar = context.config, not_none(weights.layer_scalar)
    if config.per_layer is None:
        return x2 * scalar, PLESaved(None, None, None, None, None)
    gate_adapter, projection_adapter = not_none(adapter.per_layer)
    assert weights.per_layer_gate is not None and weights.per_layer_projection is not None
    gate, h_gate = group_forward(x2, weights.per_layer_gate, None, gate_adapter)
    p, _ = glu_forward(gate, _own_input(context), config.activation)
    x3, h_projection, projected = residual_forward(
        x2, p, weights.per_layer_projection, None, projection_adapter, weights.per_layer_norm, config
    )
    return x3.mul_(scalar), PLESaved(x2, gate, h_gate, h_projection, projected)


def ple_backward(
    d_x3: Tensor, kept: PLESaved, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, lowest_group: int
) -> Tensor | None:
    """∂L/∂x₂, (T, hidden), or None where nothing below needs it; the input's gradient goes where it is asked for."""
    config = context.config
    d_x3 = d_x3 * not_none(weights.layer_scalar)
    if kept.x2 is None or kept.gate is None or kept.h_gate is None or kept.h_projection is None:
        return d_x3
    gate_adapter, projection_adapter = not_none(adapter.per_layer)
    assert weights.per_layer_gate is not None and weights.per_layer_projection is not None
    d_projected = residual_backward(d_x3, kept.projected, adapter.norms.get(PER_LAYER_NORM), config)
    saved = GLUSaved(kept.gate, _own_input(context), config.activation)
    p, _ = glu_forward(saved.gate, saved.up, saved.activation)
    d_p = group_backward(
        *(d_projected, p, weights.per_layer_projection, projection_adapter, kept.h_projection),
        input_gradient=lowest_group < PER_LAYER_PROJECTION,
    )
    if d_p is None:
        return None
    grads = glu_backward(d_p, saved)
    if (into := not_none(context.cross_layer).d_ple) is not None:
        if context.loss_positions is None:
            into[:, context.number] = grads.d_up
        else:
            into[:, context.number].zero_().index_copy_(0, context.loss_positions, grads.d_up)
    d_x2 = group_backward(
        *(grads.d_gate.contiguous(), kept.x2, weights.per_layer_gate, gate_adapter, kept.h_gate),
        input_gradient=lowest_group < PER_LAYER_GATE,
    )
    return None if d_x2 is None else d_x2.add_(d_x3)


def _own_input(context: BlockContext) -> Tensor:
    """e_l of the loss_positions rows, (T, p)."""
    own = not_none(not_none(context.cross_layer).ple)[:, context.number]
    return own.contiguous() if context.loss_positions is None else own.index_select(0, context.loss_positions)


# Before the first block.


class PLEInputsSaved(NamedTuple):
    """What the per-layer inputs keep of T tokens for an adapter of W_m and for a trained embedding."""

    h: Tensor  # (T, hidden)
    norm: RMSNormSaved  # input (T, L, p)
    h_projection: Tensor  # (T, rank)


def ple_inputs_forward(
    h: Tensor,
    token_ids: Tensor,
    weights: PerLayerWeights,
    config: DecoderConfig,
    lora: LoRAParameters | None,
    dropout_seed: int | None = None,
) -> tuple[Tensor, PLEInputsSaved]:
    """e, (T, L, p), from the embedded tokens, (T, hidden), and their ids, (T,); and what backward needs."""
    sizes, adapter = not_none(config.per_layer), before_blocks_adapter(lora, dropout_seed, weights.projection)
    y, h_projection = group_forward(h, weights.projection, None, adapter)
    y = y.mul_(config.hidden_size**-0.5).unflatten(1, (sizes.layers, sizes.width))
    e, norm = rms_norm_forward(y, weights.norm, config.norm_eps)
    # As transformers does it: the root is rounded to the table's dtype.
    root = torch.tensor(sizes.width**0.5, dtype=torch.float32).to(h.dtype).to(h.device)
    e += (frozen_rows(weights.embedding, token_ids) * root).view_as(e)
    return e.mul_(_HALF_ROOT), PLEInputsSaved(h, norm, h_projection)


def ple_inputs_backward(
    d_e: Tensor,
    kept: PLEInputsSaved,
    weights: PerLayerWeights,
    config: DecoderConfig,
    lora: LoRAParameters,
    dropout_seed: int | None,
    *,
    input_gradient: bool,
) -> Tensor | None:
    """∂L/∂h, (T, hidden), where asked for, from ∂L/∂e, (T, L, p); W_m's adapter gets its gradient."""
    adapter = before_blocks_adapter(lora, dropout_seed, weights.projection)
    d_y = rms_norm_backward(d_e * _HALF_ROOT, kept.norm, weight_gradient=False).d_x.mul_(config.hidden_size**-0.5)
    return group_backward(
        d_y.flatten(1), kept.h, weights.projection, adapter, kept.h_projection, input_gradient=input_gradient
    )


def embedding_output_gradient(
    d_x: Tensor,
    cross_layer: CrossLayer,
    kept: PLEInputsSaved,
    weights: PerLayerWeights,
    config: DecoderConfig,
    lora: LoRAParameters,
    dropout_seed: int | None,
) -> Tensor:
    """∂L/∂h, (T, hidden): the stream's, d_x, and what the per-layer inputs add where the embedding is trained."""
    below, d_inputs = trains_embedding(lora), not_none(cross_layer.d_ple)
    more = ple_inputs_backward(d_inputs, kept, weights, config, lora, dropout_seed, input_gradient=below)
    return d_x if more is None else d_x + more
