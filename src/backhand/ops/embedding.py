"""Embedding: one row of a table per token, with an optional constant factor.

    y_t = c · W[i_t]      t = 1 … tokens, W (vocab, hidden), i_t the token's id, c = √hidden in Gemma, 1 elsewhere

Backward. Written with one-hot rows e_{i_t}, y = c E W, so dy = c E dW and, with G = ∂L/∂y,
    ∂L/∂W = c Eᵀ G,   that is   ∂L/∂W[v] = c Σ_{t: i_t = v} G_t      (vocab, hidden)
a sum over all positions of the token (rows of unseen tokens are zero). E is never formed: each G_t is added to its row.
Ids have no gradient.

The sum runs in float32 at least, since a frequent token sums hundreds of terms, too many for bfloat16's eight bits.
Saved: the ids, the table's shape and c; nothing of the table itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size

ROWS_AT_ONCE = 1024  # rows that are converted to float64 at a time


class EmbeddingSaved(NamedTuple):
    """Saved for the backward: ids (...), rows of the table, c."""

    ids: Tensor
    vocab: int
    scaling: float


class EmbeddingGrads(NamedTuple):
    """d_weight of shape (vocab, hidden)."""

    d_weight: Tensor


def embedding_forward(ids: Tensor, weight: Tensor, scaling: float = 1.0) -> tuple[Tensor, EmbeddingSaved]:
    """Compute y = scaling · weight[ids].

    Args:
        ids: (...) integers in [0, vocab).
        weight: (vocab, hidden).
        scaling: c.

    Returns:
        y (..., hidden) in weight's dtype, and the saved tensors.
    """
    y = weight.index_select(0, ids.reshape(-1)).view(*ids.shape, weight.shape[1])
    if scaling != 1.0:
        y.mul_(scaling)
    return y, EmbeddingSaved(ids, weight.shape[0], scaling)


def embedding_backward(d_y: Tensor, saved: EmbeddingSaved) -> EmbeddingGrads:
    """Map d_y of shape (..., hidden) to the gradient derived in the module docstring, in d_y's dtype."""
    d_weight = sums_by_id(saved.ids.reshape(-1), d_y.reshape(-1, d_y.shape[-1]), saved.vocab).mul_(saved.scaling)
    return EmbeddingGrads(d_weight.to(d_y.dtype))


def sums_by_id(ids: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sum the rows of each of `count` ids, (count, n), in float32 at least.

    The sums run in float64 if the device has it, since some ids occur at every tenth position.

    Args:
        ids: (positions,) int64 in [0, count).
        rows: (positions, n).
    """
    present, places = torch.unique(ids, return_inverse=True)
    sums = torch.zeros(len(present), rows.shape[1], dtype=sums_dtype(rows), device=rows.device)
    step = piece_size(ROWS_AT_ONCE)
    for part, places_of_part in zip(rows.split(step), places.split(step), strict=True):
        sums.index_add_(0, places_of_part, part.to(sums.dtype))
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.zeros(count, rows.shape[1], dtype=wide, device=rows.device).index_copy_(0, present, sums.to(wide))


def sums_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype for few long sums: float64 if the device has it, else float32 or wider."""
    return torch.promote_types(like.dtype, torch.float32) if like.device.type == "mps" else torch.float64


def embedding_reference(ids: Tensor, weight: Tensor, scaling: float = 1.0) -> Tensor:
    """Compute the same y as a product with one-hot rows."""
    one_hot = torch.nn.functional.one_hot(ids, weight.shape[0]).to(weight.dtype)
    return scaling * (one_hot @ weight)
