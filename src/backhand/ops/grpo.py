"""Clipped policy losses of GRPO and related methods, as a function of the tokens' log-probabilities.

An answer i with |i| tokens has an advantage A_i (`group_advantages`) and a weight w_i (`answer_weights`). Let p_t be
the log π of a token, o_t its value when it was sampled, q_t its value under the reference, and clip(r) = min(max(r, 1 -
ε), 1 + ε_h):

    grpo, dr_grpo, dapo    y_i = w_i Σ_t (-min(r_t A_i, clip(r_t) A_i) + β r_t k_t),   r_t = e^(p_t - o_t)
                           k_t = e^(q_t - p_t) - (q_t - p_t) - 1                   [arXiv:2402.03300, eq. 3 and 4]
    rloo                   y_i = w_i (-min(ρ_i A_i, clip(ρ_i) A_i)),   ρ_i = e^(Σ_t (p_t - o_t))   [arXiv:2402.14740]

and the loss of a step with N answers of T tokens in total is Σ_i y_i, where

    grpo      w_i = 1 / (N |i|),   A_i = (R_i - mean) / (std + 1e-4) over the group      [arXiv:2402.03300, §4.1]
    dr_grpo   w_i = 1 / (N M),     A_i = R_i - mean,   M the longest answer allowed      [arXiv:2503.20783, §3.1]
    dapo      w_i = 1 / T,         A_i as grpo's                                         [arXiv:2503.14476, eq. 8]
    rloo      w_i = 1 / N,         A_i = R_i - mean of the others' = (R_i - mean) G / (G - 1)
              with β Σ_t (o_t - q_t) subtracted from R_i before                          [arXiv:2402.14740, eq. 8]

R_i is the reward of answer i, G the size of its group; std is the unbiased one. The factor r_t before k_t makes
its gradient that of the divergence KL(π | reference) itself [arXiv:2512.02556, §3.1]. All forms agree with TRL's.

Backward. Where the minimum is the clipped side, it is constant; a = [r A ≤ clip(r) A]. With k' = 1 - e^(q - p) and
r' = r, the derivative of r k is r k + r k' = -r (q - p), so
    ∂L/∂p_t = G_i w_i (-a_t r_t A_i + β r_t (p_t - q_t))      (tokens,),    G = ∂L/∂y (answers,)
    ∂L/∂p_t = -G_i w_i a_i ρ_i A_i                            of rloo, the same for all tokens of an answer.

With one update per batch r = ρ = 1, and the first term is -w_i A_i, which is known before the forward pass.

Saved: a r A of every token (for rloo, of every answer), β r (p - q), and the answers that own the tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Loss = Literal["grpo", "dr_grpo", "dapo", "rloo"]
Scaling = Literal["group", "batch", "none"]
_STD_FLOOR = 1e-4


class GRPORule(NamedTuple):
    """The form of the loss, ε, ε_h and β; names as in TRL's GRPOConfig."""

    loss: Loss = "dapo"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0


class GRPOSaved(NamedTuple):
    """Saved for the backward: a r A (tokens,) or for rloo (answers,); β r (p - q) or None; w, owners, dtype."""

    pulled: Tensor
    d_divergence: Tensor | None
    weights: Tensor
    owners: Tensor
    by_answer: bool
    dtype: torch.dtype


class GRPOGrads(NamedTuple):
    """d_log_p (tokens,)."""

    d_log_p: Tensor


def grpo_forward(
    log_p: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    owners: Tensor,
    rule: GRPORule,
) -> tuple[Tensor, GRPOSaved]:
    """Compute the loss y of every answer.

    Args:
        log_p: p, (tokens,).
        old: o, (tokens,).
        reference: q, (tokens,); None where β is 0, and for rloo.
        advantages: A, (answers,).
        weights: w, (answers,).
        owners: the index of every token's answer, (tokens,) int64.
        rule: the form and its constants.

    Returns:
        (answers,) losses, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(log_p.dtype, torch.float32)
    p, advantages, weights = log_p.to(wide), advantages.to(wide), weights.to(wide)
    moved, by_answer = p - old.to(wide), rule.loss == "rloo"
    ratio = (_sums(moved, owners, len(advantages)) if by_answer else moved).exp()
    advantage = advantages if by_answer else advantages[owners]
    free, clipped = (
        ratio * advantage,
        ratio.clamp(1 - rule.epsilon, 1 + rule.epsilon_high) * advantage,
    )
    losses = -torch.minimum(free, clipped)
    d_divergence = None
    if reference is not None and rule.beta and not by_answer:
        apart = reference.to(wide) - p
        losses = losses + rule.beta * ratio * (apart.expm1() - apart)
        d_divergence = -rule.beta * ratio * apart
    pulled = torch.where(free <= clipped, free, 0.0)
    y = weights * (losses if by_answer else _sums(losses, owners, len(advantages)))
    return y, GRPOSaved(pulled, d_divergence, weights, owners, by_answer, log_p.dtype)


def grpo_backward(d_y: Tensor, saved: GRPOSaved) -> GRPOGrads:
    """Map d_y of shape (answers,) to the gradient derived in the module docstring."""
    slope = -(saved.pulled[saved.owners] if saved.by_answer else saved.pulled)
    if saved.d_divergence is not None:
        slope = slope + saved.d_divergence
    return GRPOGrads(((d_y * saved.weights)[saved.owners] * slope).to(saved.dtype))


def grpo_reference(
    log_p: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    owners: Tensor,
    rule: GRPORule,
) -> Tensor:
    """Compute the same losses per answer, by the papers' formulas."""
    losses_of_answers = []
    for number, (advantage, weight) in enumerate(zip(advantages, weights, strict=True)):
        own = owners == number
        ratio = (log_p[own] - old[own]).exp()
        if rule.loss == "rloo":
            ratio = ratio.prod()
        bounded = torch.clamp(ratio, 1 - rule.epsilon, 1 + rule.epsilon_high)
        loss = -torch.min(ratio * advantage, bounded * advantage)
        if reference is not None and rule.loss != "rloo":
            q_over_p = reference[own].exp() / log_p[own].exp()
            loss = loss + rule.beta * ratio * (q_over_p - q_over_p.log() - 1)
        losses_of_answers.append(weight * loss.sum())
    return torch.stack(losses_of_answers) if losses_of_answers else log_p.sum()[None][:0]


def _sums(values: Tensor, owners: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, owners, values)


def group_advantages(rewards: Tensor, loss: Loss, scaling: Scaling) -> Tensor:
    """Compute A of every answer, (groups, size) float64, from the rewards, (groups, size).

    Args:
        rewards: one row per group of answers to one prompt.
        loss: the form; for rloo the baseline is the mean of the other answers.
        scaling: divide by the standard deviation of the `group`, of the whole `batch`, or by nothing.
    """
    scaled, scale = scale_down(rewards.double())
    apart = scaled - scaled.mean(1, keepdim=True)
    if loss == "rloo":
        size = rewards.shape[1]
        apart = apart * (size / (size - 1))
    if scaling == "none":
        return apart * scale
    if scaling == "group":
        return apart / (scaled.std(1, keepdim=True) + _STD_FLOOR / scale)
    whole, batch_scale = scale_down(rewards.double().flatten())
    deviation = whole.std() + _STD_FLOOR / batch_scale
    return apart * (scale / batch_scale) / deviation


def scale_down(values: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by a power of two, so that its sums and squares are finite.

    Every number of a row is below 2 in magnitude afterwards; rows that already are stay as they are. Dividing by a
    power of two is exact, so means and deviations of ordinary rows keep every bit when they are multiplied again.

    Args:
        values: (..., size) float64, at least one; NaN is ignored.

    Returns:
        The divided rows and their divisors, (..., 1).
    """
    largest = values.abs().nan_to_num(0.0, posinf=torch.inf).amax(-1, keepdim=True).clamp(min=1.0)
    mantissa, _ = torch.frexp(largest)
    scale = largest / (2 * mantissa)
    return values / scale, scale


def answer_weights(lengths: Tensor, loss: Loss, longest: int) -> Tensor:
    """Compute w of every answer of a step, (answers,) float64, from their numbers of tokens and the longest allowed."""
    lengths = lengths.double()
    count = max(1, len(lengths))
    if loss == "grpo":
        return 1 / (count * lengths)
    shared = {"dr_grpo": count * longest, "dapo": float(lengths.sum()), "rloo": count}[loss]
    return torch.full_like(lengths, 1 / shared)
