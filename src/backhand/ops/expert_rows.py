"""Copy tokens to their experts and back: rows are sorted by expert, so that each expert takes one product.

A token with k choices becomes k rows. Sorted by expert, the rows of one expert are contiguous; `Routing` maps rows to
tokens. With t(r) the token of row r, c(r) which of its choices that is, and r(t, c) the row of a token's choice c:
    dispatch:  x̂_r = x_{t(r)}                       (rows, hidden)
    weigh:     p̂_r = w_{t(r) c(r)} p_r              (rows, n)
    combine:   y_t = Σ_c z_{r(t, c)}                (tokens, hidden)

A mixture is y_t = Σ_c w_tc E_c(x_t) [arXiv:1701.06538, eq. 1]. Where an expert ends in a linear layer without a bias,
w_tc W p = W (w_tc p): the weights may be applied before that layer. Rows are narrower there, and the backward needs
only p and ∂L/∂p̂. The experts' outputs need be neither saved nor recomputed.

Backward. Each map is a sum over rows, so with G the gradient of its output
    dispatch:  ∂L/∂x_t = Σ_c G_{r(t, c)}
    weigh:     ∂L/∂p_r = w_{t(r) c(r)} G_r,   ∂L/∂w_tc = ⟨p_r, G_r⟩       for r = r(t, c)
    combine:   ∂L/∂z_r = G_{t(r)}
All of them only gather rows by index: the map from choices to rows is one to one, so that no sum is scattered.
`dispatch` and `combine` are each other's backward.

Saved: the routing; for `weigh` also p and w.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The map between rows and the choices of tokens."""

    tokens: Tensor  # (tokens · k,) the token of each row, sorted by expert
    places: Tensor  # (tokens, k) the row of each choice
    counts: tuple[int, ...]  # rows of each expert


class DispatchSaved(NamedTuple):
    """The routing."""

    routing: Routing


class DispatchGrads(NamedTuple):
    """d_x (tokens, hidden)."""

    d_x: Tensor


class WeighSaved(NamedTuple):
    """p (rows, n), weights (tokens, k), the routing."""

    p: Tensor
    weights: Tensor
    routing: Routing


class WeighGrads(NamedTuple):
    """d_p (rows, n) and d_weights (tokens, k)."""

    d_p: Tensor
    d_weights: Tensor


class CombineSaved(NamedTuple):
    """The routing."""

    routing: Routing


class CombineGrads(NamedTuple):
    """d_z (rows, hidden)."""

    d_z: Tensor


def route(chosen: Tensor, experts: int) -> Routing:
    """Sort the rows of all choices, (tokens, k) int64, by expert, and by token within an expert."""
    order = chosen.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    return Routing(order // max(chosen.shape[1], 1), places.view(chosen.shape), tuple(counts.tolist()))


def dispatch_forward(x: Tensor, routing: Routing) -> tuple[Tensor, DispatchSaved]:
    """Gather x̂ of shape (rows, hidden) from x of shape (tokens, hidden)."""
    return x.index_select(0, routing.tokens), DispatchSaved(routing)


def dispatch_backward(d_y: Tensor, saved: DispatchSaved) -> DispatchGrads:
    """Map d_y of shape (rows, hidden) to d_x of shape (tokens, hidden)."""
    return DispatchGrads(_choices(d_y, saved.routing).sum(1))


def _choices(x: Tensor, routing: Routing) -> Tensor:
    """Gather (rows, hidden) by token and choice, (tokens, k, hidden)."""
    places = routing.places
    return x.index_select(0, places.flatten()).view(*places.shape, x.shape[1])


def dispatch_reference(x: Tensor, routing: Routing) -> Tensor:
    """Compute the same x̂ as a product with one-hot rows."""
    return torch.nn.functional.one_hot(routing.tokens, max(len(x), 1))[:, : len(x)].to(x.dtype) @ x


def weigh_forward(p: Tensor, weights: Tensor, routing: Routing, out: Tensor | None = None) -> tuple[Tensor, WeighSaved]:
    """Compute p̂, every row times the weight of its choice.

    Args:
        p: (rows, n), in the routing's order.
        weights: w, (tokens, k).
        out: (rows, n) to receive p̂, or None for a new tensor; it may be p itself if no backward follows.

    Returns:
        p̂ (rows, n) in p's dtype, and the saved tensors.
    """
    return torch.mul(p, _by_row(weights, routing), out=out), WeighSaved(p, weights, routing)


def weigh_backward(d_y: Tensor, saved: WeighSaved) -> WeighGrads:
    """Map d_y of shape (rows, n) to the gradients derived in the module docstring."""
    p, weights, routing = saved
    of_row = torch.linalg.vecdot(p, d_y)
    d_weights = of_row.index_select(0, routing.places.flatten()).view(weights.shape)
    return WeighGrads(d_y * _by_row(weights, routing), d_weights)


def _by_row(weights: Tensor, routing: Routing) -> Tensor:
    """Return the weight of each row's choice, (rows, 1)."""
    of_row = torch.empty_like(weights).view(-1)
    of_row.index_copy_(0, routing.places.flatten(), weights.flatten())
    return of_row.unsqueeze(1)


def weigh_reference(p: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Compute the same p̂ as a product with a diagonal matrix, whose entries one-hot rows pick."""
    one_hot = torch.nn.functional.one_hot(routing.places, max(len(p), 1))[..., : len(p)].to(p.dtype)
    return torch.diag(torch.einsum("tkr,tk->r", one_hot, weights)) @ p


def combine_forward(z: Tensor, routing: Routing) -> tuple[Tensor, CombineSaved]:
    """Compute y_t = Σ_c z_{r(t, c)}, (tokens, hidden), from z of shape (rows, hidden)."""
    return _choices(z, routing).sum(1), CombineSaved(routing)


def combine_backward(d_y: Tensor, saved: CombineSaved) -> CombineGrads:
    """Map d_y of shape (tokens, hidden) to d_z of shape (rows, hidden)."""
    return CombineGrads(d_y.index_select(0, saved.routing.tokens))


def combine_reference(z: Tensor, routing: Routing) -> Tensor:
    """Compute the same y as a product with one-hot rows, (tokens, rows)."""
    one_hot = torch.nn.functional.one_hot(routing.places, max(len(z), 1))[..., : len(z)].to(z.dtype)
    return one_hot.sum(1) @ z
