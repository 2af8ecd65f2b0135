"""Triplet loss with cosine distances: an anchor should be nearer to its positive than to its negatives, by a margin.

    ℓ_i = (1 / K_i) Σ_k max(0, m + ⟨a_i, q_k⟩ - ⟨a_i, p_i⟩)      a, p (n, d) and q (negatives, d) unit rows

k runs over the K_i negatives of anchor i. With one negative per anchor it is TripletLoss of sentence-transformers with
the distance 1 - cosine.                                                                   [arXiv:1503.03832, eq. 3]

Backward. With G = ∂L/∂ℓ (n,), i the anchor of negative k, and w_k = G_i / K_i where the maximum is positive, else 0
    ∂L/∂q_k = w_k a_i                              (negatives, d)
    ∂L/∂p_i = -(Σ_k w_k) a_i                       (n, d)
    ∂L/∂a_i = Σ_k w_k q_k - (Σ_k w_k) p_i          (n, d)

Saved: a, p, q, the anchor of each negative, and 1 / K_i or 0 of each negative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TripletSaved(NamedTuple):
    """Saved for the backward: a, p, q in float32 or wider, the owners, and the shares (negatives,) of the losses."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    owners: Tensor
    shares: Tensor
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]


class TripletGrads(NamedTuple):
    """d_anchors and d_positives (n, d), d_negatives (negatives, d)."""

    d_anchors: Tensor
    d_positives: Tensor
    d_negatives: Tensor


def triplet_forward(
    anchors: Tensor, positives: Tensor, negatives: Tensor, owners: Tensor, margin: float
) -> tuple[Tensor, TripletSaved]:
    """Compute ℓ of every anchor.

    Args:
        anchors: a, (n, d).
        positives: p, (n, d).
        negatives: q, (negatives, d).
        owners: (negatives,) int64, the anchor of each negative.
        margin: m.

    Returns:
        (n,) losses, float32 or wider, 0 for an anchor without negatives, and the saved tensors.
    """
    dtypes = anchors.dtype, positives.dtype, negatives.dtype
    wide = torch.promote_types(anchors.dtype, torch.float32)
    a, p, q = anchors.to(wide), positives.to(wide), negatives.to(wide)
    excess = margin + (a[owners] * q).sum(1) - (a * p).sum(1)[owners]
    counts = a.new_zeros(len(a)).index_add_(0, owners, torch.ones_like(excess))
    shares = torch.where(excess > 0, 1 / counts[owners], 0.0)
    losses = a.new_zeros(len(a)).index_add_(0, owners, shares * excess)
    return losses, TripletSaved(a, p, q, owners, shares, dtypes)


def triplet_backward(d_y: Tensor, saved: TripletSaved) -> TripletGrads:
    """Map d_y (n,) to the gradients derived in the module docstring."""
    a, p, q, owners, shares, dtypes = saved
    w = (d_y.to(a.dtype)[owners] * shares)[:, None]
    total = a.new_zeros(len(a), 1).index_add_(0, owners, w)
    d_anchors = torch.zeros_like(a).index_add_(0, owners, w * q) - total * p
    grads = d_anchors, -total * a, w * a[owners]
    return TripletGrads(*(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)))


def triplet_reference(anchors: Tensor, positives: Tensor, negatives: Tensor, owners: Tensor, margin: float) -> Tensor:
    """Compute the same losses anchor by anchor."""
    wide = torch.promote_types(anchors.dtype, torch.float32)
    losses = []
    for number, (a, p) in enumerate(zip(anchors.to(wide), positives.to(wide), strict=True)):
        of_anchor = negatives[owners == number].to(wide)
        excess = torch.relu((1 - a @ p) - (1 - of_anchor @ a) + margin)
        losses.append(excess.mean() if len(of_anchor) else excess.sum())
    return torch.stack(losses) if losses else anchors.sum(1).to(wide)
