"""Decisions: the cross-entropy of a softmax over the options of a question.

    p_k = exp(s_k) / Σ_j exp(s_j),   ℓ = -Σ_k t_k log p_k = τ log Σ_j exp(s_j) - Σ_k t_k s_k,   τ = Σ_k t_k

s_k is the log-probability of option k's label, and the sums run over the options of one question. The targets t are
one-hot, or probabilities (soft targets) [arXiv:1503.02531, §2]. The normalizer of the vocabulary's softmax is the same
for all options of a question and cancels. Questions may have different numbers of options: the options of all questions
are one vector, and `owner` contains the question of each.

The same loss ranks documents: the options are the documents of a query, and s their scores. With one-hot targets it is
the softmax loss of rankings [arXiv:2210.10634, §4.3], and with the softmax of graded labels as targets it is ListNet
[doi:10.1145/1273496.1273513, §5].

Backward. ∂/∂s_k log Σ_j exp(s_j) = p_k, so with G = ∂L/∂ℓ, (questions,), and q the question of option k
    ∂L/∂s_k = G_q (τ_q p_k - t_k)      (options,)
These sum to 0 over the options of a question.

Saved: p, t, τ and the owners.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DecideSaved(NamedTuple):
    """Saved for the backward.

    `p` and `targets`, (options,) in float32 or wider; `totals` τ, (questions,); `owner`, (options,) int64; the scores'
    dtype.
    """

    p: Tensor
    targets: Tensor
    totals: Tensor
    owner: Tensor
    dtype: torch.dtype


class DecideGrads(NamedTuple):
    """d_scores, (options,)."""

    d_scores: Tensor


def option_log_softmax(scores: Tensor, owner: Tensor, questions: int) -> Tensor:
    """Return log p of every option, (options,).

    Args:
        scores: s, (options,).
        owner: (options,) int64, the question of each option.
        questions: number of questions.
    """
    highest = scores.new_full((questions,), -torch.inf).scatter_reduce_(0, owner, scores, "amax")
    shifted = scores - highest[owner]
    return shifted - scores.new_zeros(questions).index_add_(0, owner, shifted.exp()).log()[owner]


def decide_forward(scores: Tensor, targets: Tensor, owner: Tensor, questions: int) -> tuple[Tensor, DecideSaved]:
    """Compute ℓ of every question.

    Args:
        scores: s, (options,).
        targets: t, (options,), not negative.
        owner: (options,) int64, the question of each option. Every question has at least one.
        questions: number of questions.

    Returns:
        (questions,) losses in nats, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    targets = targets.to(wide)
    log_p = option_log_softmax(scores.to(wide), owner, questions)
    losses = log_p.new_zeros(questions).index_add_(0, owner, -targets * log_p)
    totals = log_p.new_zeros(questions).index_add_(0, owner, targets)
    return losses, DecideSaved(log_p.exp(), targets, totals, owner, scores.dtype)


def decide_backward(d_y: Tensor, saved: DecideSaved) -> DecideGrads:
    """Map d_y, (questions,), to the gradient derived in the module docstring."""
    p, targets, totals, owner, dtype = saved
    return DecideGrads((d_y[owner] * (totals[owner] * p - targets)).to(dtype))


def decide_reference(scores: Tensor, targets: Tensor, owner: Tensor, questions: int) -> Tensor:
    """Compute the same losses question by question with torch's cross-entropy."""
    losses = [
        torch.nn.functional.cross_entropy(scores[owner == one], targets[owner == one]) for one in range(questions)
    ]
    return torch.stack(losses) if losses else scores.sum(0, keepdim=True)[:0]
