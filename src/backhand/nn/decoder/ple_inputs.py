"""Gemma 4's per-layer embeddings (PLE), computed before the first block for all layers at once.

From the embedded tokens h of shape (T, hidden) and their ids, for L layers with p features each:

    e = (norm(h W_mᵀ / √hidden) + √p E[ids]) / √2      (T, L, p), the norm over the p features of each layer

with W_m (L p, hidden), the model's per-layer projection, and E (vocab, L p), a second embedding table. W_m is a linear
module and may have an adapter. E and the norm stay frozen. The blocks use e in `nn.decoder.ple_block`.

Backward, needed if W_m has an adapter or the embedding is trained. ∂L/∂e / √2 through the norm, times 1/√hidden, is
∂L/∂(h W_mᵀ) of shape (T, L p). It gives the gradient of W_m's adapter and a term of ∂L/∂h in addition to the stream's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import before_blocks_adapter, trains_embedding
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.projections import group_backward, group_forward
from backhand.nn.decoder.weights import PerLayerWeights
from backhand.nn.families.family import DecoderConfig
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_backward, rms_norm_forward

_HALF_ROOT = 2.0**-0.5


class PLEInputsSaved(NamedTuple):
    """Tensors saved for the gradients of W_m's adapter and of a trained embedding. T is the number of tokens."""

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
    """Return e of shape (T, L, p) and the tensors saved for backward. h is (T, hidden), token_ids (T,)."""
    sizes, adapter = not_none(config.per_layer), before_blocks_adapter(lora, dropout_seed, weights.projection)
    y, h_projection = group_forward(h, weights.projection, None, adapter)
    y = y.mul_(config.hidden_size**-0.5).unflatten(1, (sizes.layers, sizes.width))
    e, norm = rms_norm_forward(y, weights.norm, config.norm_eps)
    # transformers rounds the root to the dtype of the table.
    root = torch.tensor(sizes.width**0.5, dtype=torch.float32).to(h.dtype).to(h.device)
    e += (frozen_rows(weights.embedding, token_ids) * root).view_as(e)
    return e.mul_(_HALF_ROOT), PLEInputsSaved(h, norm, h_projection)


def ple_inputs_backward(
    d_e: Tensor,
    saved: PLEInputsSaved,
    weights: PerLayerWeights,
    config: DecoderConfig,
    lora: LoRAParameters,
    dropout_seed: int | None,
    *,
    input_gradient: bool,
) -> Tensor | None:
    """Return ∂L/∂h of shape (T, hidden), or None without `input_gradient`, and add the gradients of W_m's adapter.

    Args:
        d_e: ∂L/∂e, (T, L, p).
    """
    adapter = before_blocks_adapter(lora, dropout_seed, weights.projection)
    d_y = rms_norm_backward(d_e * _HALF_ROOT, saved.norm, weight_gradient=False).d_x.mul_(config.hidden_size**-0.5)
    return group_backward(
        d_y.flatten(1), saved.h, weights.projection, adapter, saved.h_projection, input_gradient=input_gradient
    )


def embedding_output_gradient(
    d_x: Tensor,
    cross_layer: CrossLayer,
    saved: PLEInputsSaved,
    weights: PerLayerWeights,
    config: DecoderConfig,
    lora: LoRAParameters,
    dropout_seed: int | None,
) -> Tensor:
    """Return ∂L/∂h of shape (T, hidden): d_x from the stream, plus the PLE term if the embedding is trained."""
    needs_d_h, d_e = trains_embedding(lora, config), not_none(cross_layer.d_ple)
    d_h = ple_inputs_backward(d_e, saved, weights, config, lora, dropout_seed, input_gradient=needs_d_h)
    return d_x if d_h is None else d_x + d_h
