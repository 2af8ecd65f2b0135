"""The router of a mixture of experts, which chooses each token's experts and their weights.

    p = softmax(z),   the k largest of p are chosen,   w_c = p_c, or w_c = p_c / Σ_chosen p    [arXiv:2101.03961, eq. 1]

for each token with router logits z (experts). In the second form every factor but e^{z_c} cancels: w is the softmax
over the chosen logits alone.

Backward. The choice of experts is a step function of z and has no gradient. Between the steps, with v = ∂L/∂w
    chosen alone:  dw = w ⊙ (dz_c - Σ w dz_c),   ∂L/∂z_c = w ⊙ (v - Σ w v),   zero for what is not chosen
    of all:        dp = p ⊙ (dz - Σ p dz),       ∂L/∂z = p ⊙ (v̂ - Σ p v̂),     v̂ being v where chosen, else 0
so that in the second case every expert's logit has a gradient, although only the chosen ones are computed.

Saved: the choice and w, or p. Softmax in float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RouterSaved(NamedTuple):
    """chosen (tokens, k) int64; shares: w (tokens, k), or p (tokens, experts) where `of_all`; the number of experts."""

    chosen: Tensor
    shares: Tensor
    experts: int
    of_all: bool
    dtype: torch.dtype


class RouterGrads(NamedTuple):
    """d_logits (tokens, experts)."""

    d_logits: Tensor


def router_forward(logits: Tensor, k: int, *, of_all: bool = False) -> tuple[Tensor, RouterSaved]:
    """Choose each token's experts and compute their weights.

    Args:
        logits: z, (tokens, experts).
        k: the number of experts per token.
        of_all: True if a weight is the expert's share among all experts, False if among the chosen ones.

    Returns:
        w (tokens, k) in the logits' dtype, largest first, and the saved tensors, of which `chosen` names the experts.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, chosen = wide.topk(k, dim=-1)
    shares = torch.softmax(wide if of_all else largest, dim=-1)
    weights = shares.gather(1, chosen) if of_all else shares
    return weights.to(logits.dtype), RouterSaved(chosen, shares, logits.shape[1], of_all, logits.dtype)


def router_backward(d_y: Tensor, saved: RouterSaved) -> RouterGrads:
    """Map d_y = ∂L/∂w of shape (tokens, k) to the gradient derived in the module docstring, in the logits' dtype."""
    chosen, shares, experts, of_all, dtype = saved
    upstream = d_y.to(shares.dtype)
    if of_all:
        upstream = torch.zeros_like(shares).scatter_(1, chosen, upstream)
    d_shares = shares * (upstream - (shares * upstream).sum(-1, keepdim=True))
    if not of_all:
        d_shares = d_shares.new_zeros(len(chosen), experts).scatter_(1, chosen, d_shares)
    return RouterGrads(d_shares.to(dtype))


def router_reference(logits: Tensor, k: int, *, of_all: bool = False) -> Tensor:
    """Compute the same w from the definition: softmax over all experts, the largest, divided by their sum."""
    shares = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = shares.argsort(dim=-1, descending=True)[:, :k]
    weights = shares.gather(1, chosen)
    return (weights if of_all else weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
