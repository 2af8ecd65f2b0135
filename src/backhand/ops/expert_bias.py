"""Sum of the chosen experts' last biases, each weighted by its choice.

A mixture whose experts end in a linear layer with a bias [arXiv:1701.06538, eq. 1] is
    y_t = Σ_c w_tc (W_e p_tc + b_e) = Σ_c W_e (w_tc p_tc) + Σ_c w_tc b_e      e = e(t, c), the expert of choice c
The first sum is `expert_rows`' and `expert_linear`'s, with the weights in front of the matrix; the second is this op:
    y_t = Σ_c w_tc b_{e(t, c)}                       (tokens, n)

Backward, with the biases frozen and G = ∂L/∂y:
    ∂L/∂w_tc = ⟨b_{e(t, c)}, G_t⟩                    (tokens, k)
The choice of experts is constant. Forward and backward are one product each with the (experts, n) matrix of all biases.
The forward scatters w to (tokens, experts) first; one row per choice, (tokens · k, n), is never formed.

Saved: the biases and the choices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertBiasSaved(NamedTuple):
    """biases (experts, n), chosen (tokens, k) int64."""

    biases: Tensor
    chosen: Tensor


class ExpertBiasGrads(NamedTuple):
    """d_weights (tokens, k)."""

    d_weights: Tensor


def expert_bias_forward(weights: Tensor, chosen: Tensor, biases: Tensor) -> tuple[Tensor, ExpertBiasSaved]:
    """Compute the weighted sum of the chosen biases.

    Args:
        weights: w, (tokens, k).
        chosen: (tokens, k) int64, the expert of each choice; a token's experts differ.
        biases: b, (experts, n), frozen.

    Returns:
        y (tokens, n) in the weights' dtype, and the saved tensors.
    """
    placed = weights.new_zeros(len(weights), len(biases)).scatter_(1, chosen, weights)
    return placed @ biases, ExpertBiasSaved(biases, chosen)


def expert_bias_backward(d_y: Tensor, saved: ExpertBiasSaved) -> ExpertBiasGrads:
    """Map d_y of shape (tokens, n) to the gradient derived in the module docstring."""
    return ExpertBiasGrads((d_y @ saved.biases.T).gather(1, saved.chosen))


def expert_bias_reference(weights: Tensor, chosen: Tensor, biases: Tensor) -> Tensor:
    """Compute the same y per choice, with each bias picked by a one-hot row."""
    one_hot = torch.nn.functional.one_hot(chosen, len(biases)).to(weights.dtype)
    return torch.einsum("tk,tke,en->tn", weights, one_hot, biases)
