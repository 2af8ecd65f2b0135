"""Cross-entropy from logits, a loss for every row.

    ℓ_i = logsumexp(Z_i) - Z_{i, t_i}      Z (rows, vocab), targets t (rows,)

Backward. dℓ_i = ⟨softmax(Z_i) - onehot(t_i), dZ_i⟩, so with G = ∂L/∂ℓ (rows,)
    ∂L/∂Z_i = G_i (softmax(Z_i) - onehot(t_i))      (rows, vocab)

Softmax and losses are computed in float32 at least, whatever the dtype of the logits. Saved: softmax(Z) and the
targets; the logits are not needed again. `linear_cross_entropy` computes the same without ever holding all logits, for
a head that is frozen or has a plain adapter; this op is for chunks of any other head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class CrossEntropySaved(NamedTuple):
    """What the forward keeps: softmax (rows, vocab) in float32 or wider, targets (rows,), the dtype of the logits."""

    probabilities: Tensor
    targets: Tensor
    dtype: torch.dtype


class CrossEntropyGrads(NamedTuple):
    """d_logits (rows, vocab), in the dtype of the logits."""

    d_logits: Tensor


def cross_entropy_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, CrossEntropySaved]:
    """ℓ of every row.

    Args:
        logits: (rows, vocab).
        targets: (rows,) int64 in [0, vocab).

    Returns:
        (rows,) losses in nats, float32 or wider, and what backward needs.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logarithms = functional.log_softmax(logits, dim=-1, dtype=wide)
    losses = -logarithms.gather(1, targets[:, None]).squeeze(1)
    return losses, CrossEntropySaved(logarithms.exp_(), targets, logits.dtype)


def cross_entropy_backward(d_y: Tensor, saved: CrossEntropySaved) -> CrossEntropyGrads:
    """Map d_y, (rows,), to the gradient derived in the module docstring."""
    probabilities, targets, dtype = saved
    minus_one = probabilities.new_full((1, 1), -1.0).expand(len(targets), 1)
    difference = probabilities.scatter_add(1, targets[:, None], minus_one)
    return CrossEntropyGrads(difference.mul_(d_y.to(difference.dtype)[:, None]).to(dtype))


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The same losses from the definition, by exponentials and a one-hot product."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(dim=-1, keepdim=True) if wide.numel() else wide[:, :1]
    one_hot = functional.one_hot(targets, logits.shape[1]).to(wide.dtype)
    return (wide - largest).exp().sum(-1).log() + largest.squeeze(1) - (one_hot * wide).sum(-1)
