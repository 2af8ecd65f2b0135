"""LoRA embedding: a frozen table plus a trainable low-rank one.

    y_t = W[i_t] + s B A[:, i_t]      t = 1 … tokens, s = alpha / rank      [arXiv:2106.09685, eq. 3, for x one-hot]

with W (vocab, hidden) in the layout of an embedding, A (rank, vocab), B (hidden, rank): the table becomes W + s (B A)ᵀ.

Backward. Row t of h is A[:, i_t]ᵀ, that is h = E Aᵀ with one-hot rows e_{i_t} of E. With W fixed,
dy = s dh Bᵀ + s h dBᵀ and dh = E dAᵀ. Let G = ∂L/∂y. Since ⟨P, Q Rᵀ⟩ = ⟨P R, Q⟩ = ⟨Pᵀ Q, R⟩, the other factor
of each differential is its gradient:
    ∂L/∂h = s G B             (tokens, rank)
    ∂L/∂A = (∂L/∂h)ᵀ E        (rank, vocab): ∂L/∂A[:, v] = Σ_{t: i_t = v} (∂L/∂h)_t
    ∂L/∂B = s Gᵀ h            (hidden, rank)
Ids have no gradient. E is never formed: each row of ∂L/∂h is added to the column of its token, and columns of tokens
that do not occur stay zero. As in torch.nn.Embedding, a padding token is read but its column has no gradient.

The sums of A's gradient run in float32 at least, since a frequent token sums hundreds of terms, too many for bfloat16's
eight bits. Saved: the ids, h and B; neither the table nor A is needed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.embedding import sums_by_id
from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.weight_tiles import FrozenMatrix


class LoRAEmbeddingSaved(NamedTuple):
    """Saved for the backward: ids (tokens,), lora_B, h (tokens, rank), columns of lora_A, s, the padding token."""

    ids: Tensor
    lora_B: Tensor
    h: Tensor
    vocab: int
    scaling: float
    padding_id: int | None


class LoRAEmbeddingGrads(NamedTuple):
    """d_lora_A (rank, vocab) in float32 at least, d_lora_B (hidden, rank)."""

    d_lora_A: Tensor
    d_lora_B: Tensor


def lora_embedding_forward(
    ids: Tensor, weight: FrozenMatrix, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_id: int | None = None
) -> tuple[Tensor, LoRAEmbeddingSaved]:
    """Compute y = W[ids] + s A[:, ids]ᵀ Bᵀ.

    Args:
        ids: (...) integers in [0, vocab).
        weight: (vocab, hidden), frozen.
        lora_A: (rank, vocab).
        lora_B: (hidden, rank).
        scaling: s.
        padding_id: the token whose column of lora_A gets no gradient, or None.

    Returns:
        y (..., hidden) in weight's dtype, and the saved tensors.
    """
    flat = ids.reshape(-1)
    h = lora_A.index_select(1, flat).T
    y = frozen_rows(weight, flat).addmm_(h, lora_B.T, alpha=scaling)
    saved = LoRAEmbeddingSaved(flat, lora_B, h, lora_A.shape[1], scaling, padding_id)
    return y.view(*ids.shape, weight.shape[1]), saved


def lora_embedding_backward(d_y: Tensor, saved: LoRAEmbeddingSaved) -> LoRAEmbeddingGrads:
    """Map d_y of shape (..., hidden) to the gradients derived in the module docstring."""
    g = d_y.reshape(-1, d_y.shape[-1])
    d_lora_B = (g.T @ saved.h).mul_(saved.scaling)
    wide = torch.promote_types(d_y.dtype, torch.float32)
    d_h = (g @ saved.lora_B).to(wide).mul_(saved.scaling)
    if saved.padding_id is not None:
        d_h.masked_fill_((saved.ids == saved.padding_id)[:, None], 0.0)
    return LoRAEmbeddingGrads(sums_by_id(saved.ids, d_h, saved.vocab).T, d_lora_B)


def lora_embedding_reference(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_id: int | None = None
) -> Tensor:
    """Compute the same y by products of one-hot rows and the adapted table; a padding column of A is constant."""
    if padding_id is not None:
        is_padding = torch.arange(weight.shape[0], device=weight.device) == padding_id
        lora_A = torch.where(is_padding, lora_A.detach(), lora_A)
    table = weight + scaling * (lora_B @ lora_A).T
    one_hot = torch.nn.functional.one_hot(ids, weight.shape[0]).to(weight.dtype)
    return one_hot @ table
