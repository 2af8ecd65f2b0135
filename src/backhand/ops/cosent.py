"""CoSENT: pairs with a higher target should have a higher cosine.

    c_i = s ⟨a_i, b_i⟩,   L = log(1 + Σ_{i,j: t_i < t_j} exp(c_i - c_j))      a, b unit rows (n, d), targets t (n,)

[doi:10.1109/TASLP.2024.3402087]; CoSENTLoss of sentence-transformers with s = 20. Only the order of the targets counts.

Let U_i = log Σ_{j: t_j > t_i} exp(-c_j) and V_i = log Σ_{j: t_j < t_i} exp(c_j), which are cumulative sums in the order
of the targets. Then L = log(1 + Σ_i exp(c_i + U_i)): n log n operations instead of n² terms.

Backward. A term exp(c_i - c_j) has the share exp(c_i - c_j - L) in dL, with the sign + in c_i and - in c_j. Summing the
terms of i in both roles gives, with G = ∂(anything)/∂L, 0-d,
    ∂L/∂c_i = w_i = exp(c_i + U_i - L) - exp(V_i - c_i - L)
    ∂L/∂a_i = G s w_i b_i   (n, d)        ∂L/∂b_i = G s w_i a_i   (n, d)

Everything between the cosines and w is computed in float64, since the sums are long. Saved: a, b and both terms of w.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.embedding import sums_dtype


class CosentSaved(NamedTuple):
    """Saved for the backward: a and b (n, d), the two terms of w (n,) in the dtype of the cosines, and s."""

    first: Tensor
    second: Tensor
    below: Tensor  # exp(c_i + U_i - L)
    above: Tensor  # exp(V_i - c_i - L)
    scale: float


class CosentGrads(NamedTuple):
    """d_first and d_second, (n, d)."""

    d_first: Tensor
    d_second: Tensor


def cosent_forward(first: Tensor, second: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, CosentSaved]:
    """Compute L, 0-d, from a and b, (n, d), the targets (n,) and s."""
    wide = torch.promote_types(first.dtype, torch.float32)
    cosines = (first.to(wide) * second.to(wide)).sum(1)
    ordered, order = targets.sort(stable=True)
    c = scale * cosines[order].to(sums_dtype(cosines))
    none = c.new_full((1,), -torch.inf)
    later, earlier = torch.cat(((-c).flip(0).logcumsumexp(0).flip(0), none)), torch.cat((none, c.logcumsumexp(0)))
    u = later[torch.searchsorted(ordered, ordered, right=True)]
    v = earlier[torch.searchsorted(ordered, ordered)]
    loss = torch.cat((c.new_zeros(1), c + u)).logsumexp(0)
    below, above = (
        torch.empty_like(cosines).index_copy_(0, order, w.exp().to(wide)) for w in (c + u - loss, v - c - loss)
    )
    return loss.to(wide), CosentSaved(first, second, below, above, scale)


def cosent_backward(d_y: Tensor, saved: CosentSaved) -> CosentGrads:
    """Map d_y, 0-d, to the gradients derived in the module docstring."""
    first, second, below, above, scale = saved
    d_cosines = (d_y.to(below.dtype) * scale * (below - above))[:, None]
    return CosentGrads((d_cosines * second).to(first.dtype), (d_cosines * first).to(second.dtype))


def cosent_reference(first: Tensor, second: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Compute the same loss from the matrix of all differences."""
    wide = torch.promote_types(first.dtype, torch.float32)
    c = scale * torch.einsum("nd,nd->n", first.to(wide), second.to(wide))
    counted = targets[:, None] < targets[None, :]
    return torch.cat((c.new_zeros(1), (c[:, None] - c[None, :])[counted])).logsumexp(0)
