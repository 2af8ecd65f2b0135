"""Binary cross-entropy of scores: the loss of yes or no questions, one score each.

    ℓ = -(w t log σ(s) + (1 - t) log σ(-s)),   σ(s) = 1 / (1 + exp(-s))

s is a score in nats, the logarithm of the odds of yes. t is the target: 1 for yes, 0 for no, or a probability between
them. w is the weight of yes. These are BCEWithLogitsLoss of PyTorch and BinaryCrossEntropyLoss of sentence-transformers
with their `pos_weight`. If s is the difference of two log-probabilities, log p(yes) - log p(no), then ℓ with w = 1 is
the cross-entropy of a softmax over these two tokens, as in Qwen3-Reranker [arXiv:2506.05176, §3].

Since log σ(s) = -log(1 + exp(-s)), large scores of either sign need no exponential of a positive number.

Backward. d log σ(s) / ds = σ(-s) and d log σ(-s) / ds = -σ(s), so with G = ∂L/∂ℓ, of the shape of s,
    ∂L/∂s = G ((1 - t) σ(s) - w t σ(-s))
For w = 1 this is G (σ(s) - t).

Saved: s, t and w. σ(s) is computed again, since it costs less than its memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


class BinaryCrossEntropySaved(NamedTuple):
    """Saved for the backward: s and t, both of one shape, in float32 or wider; w; and the dtype of the scores."""

    scores: Tensor
    targets: Tensor
    positive_weight: float
    dtype: torch.dtype


class BinaryCrossEntropyGrads(NamedTuple):
    """d_scores, of the shape of the scores."""

    d_scores: Tensor


def binary_cross_entropy_forward(
    scores: Tensor, targets: Tensor, positive_weight: float = 1.0
) -> tuple[Tensor, BinaryCrossEntropySaved]:
    """Compute ℓ of every score.

    Args:
        scores: s, of any shape.
        targets: t from 0 to 1, of the same shape.
        positive_weight: w, above 0.

    Returns:
        losses in nats, of the same shape, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    s, t = scores.to(wide), targets.to(wide)
    losses = -(positive_weight * t * logsigmoid(s) + (1 - t) * logsigmoid(-s))
    return losses, BinaryCrossEntropySaved(s, t, positive_weight, scores.dtype)


def binary_cross_entropy_backward(d_y: Tensor, saved: BinaryCrossEntropySaved) -> BinaryCrossEntropyGrads:
    """Map d_y, of the shape of the scores, to the gradient derived in the module docstring."""
    s, t, positive_weight, dtype = saved
    d_losses = (1 - t) * s.sigmoid() - positive_weight * t * (-s).sigmoid()
    return BinaryCrossEntropyGrads((d_y * d_losses).to(dtype))


def binary_cross_entropy_reference(scores: Tensor, targets: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Compute the same losses with PyTorch's function."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    weight = torch.tensor(positive_weight, dtype=wide, device=scores.device)
    return binary_cross_entropy_with_logits(scores.to(wide), targets.to(wide), reduction="none", pos_weight=weight)
