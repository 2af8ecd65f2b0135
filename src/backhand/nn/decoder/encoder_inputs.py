"""The input of an encoder's first block, from the token embedding.

    x₀ = norm(e + T[types] + P[positions])

e is the token embedding, T the embedding of token types (which tell the two texts of a pair apart), and P the learned
embedding of positions. BERT has both, and ModernBERT neither. All tables and the norm are frozen, so that the backward
is the norm's, and ∂L/∂e is its result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.ops.layer_norm import LayerNormSaved, layer_norm_backward, layer_norm_forward


class InputWeights(NamedTuple):
    """Weights between the embedding and the first block. Tables and bias are None if the family does not have them."""

    norm: Tensor  # (hidden,)
    norm_bias: Tensor | None  # (hidden,)
    positions: Tensor | None  # P, (positions, hidden)
    token_types: Tensor | None  # T, (types, hidden)


def encoder_inputs_forward(
    e: Tensor, batch: PackedBatch, weights: InputWeights, eps: float
) -> tuple[Tensor, LayerNormSaved]:
    """Return x₀ (tokens, hidden) for e of the same shape, and the tensors saved by the norm.

    Raises:
        ValueError: a document is longer than P.
    """
    if weights.token_types is not None:
        types = batch.token_types
        e = e + (weights.token_types[0] if types is None else weights.token_types[types])
    if weights.positions is not None:
        if (longest := max(batch.lengths, default=0)) > len(weights.positions):
            raise ValueError(f"a document of {longest} tokens is longer than the {len(weights.positions)} positions")
        e = e + torch.index_select(weights.positions, 0, batch.positions)
    return layer_norm_forward(e, weights.norm, weights.norm_bias, eps)


def encoder_inputs_backward(d_x: Tensor, saved: LayerNormSaved) -> Tensor:
    """Map ∂L/∂x₀ to ∂L/∂e, both (tokens, hidden)."""
    return layer_norm_backward(d_x, saved, weight_gradient=False).d_x
