"""Trained rows of an embedding or an output head, PEFT's `trainable_token_indices`.

    W'_v = R_j where v is the j-th trained token, W_v elsewhere;   W, W' (vocab, hidden), R (n, hidden)
    embedding:  y_t = W'[i_t]              linear head:  y = x W'ᵀ

R starts as the rows it replaces. W' is never formed, since the other rows have no gradient and a table is large.

Backward, with G = ∂L/∂y and p(v) the index of token v among the trained tokens:
    embedding   ∂L/∂R_j = Σ_{t: p(i_t) = j} G_t           (n, hidden), zero where the token does not occur
    head        ∂L/∂R   = (G restricted to the trained columns)ᵀ x      (n, hidden)
                ∂L/∂x   = G W'  =  G₀ W + G_p R           (..., hidden), G₀ = G with the trained columns at zero
The sum of the embedding runs in float32 at least. torch reads a padding token but does not train it: a caller whose
embedding has one calls `without_padding` between forward and backward.

Saved: for the embedding, each token's row in R; for the head, x and references to the parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.embedding import sums_by_id


class TokenEmbeddingSaved(NamedTuple):
    """Saved for the backward: each token's row in R, (tokens,), -1 if it is not trained; the number of rows of R."""

    places: Tensor
    trained: int


class TokenEmbeddingGrads(NamedTuple):
    """d_token_rows of shape (n, hidden) in float32 at least."""

    d_token_rows: Tensor


class TokenLinearSaved(NamedTuple):
    """Saved for the backward: x (..., hidden), weight (vocab, hidden), token_rows (n, hidden), token_ids (n,)."""

    x: Tensor
    weight: Tensor
    token_rows: Tensor
    token_ids: Tensor


class TokenLinearGrads(NamedTuple):
    """d_x (..., hidden), or None if skipped; d_token_rows (n, hidden)."""

    d_x: Tensor | None
    d_token_rows: Tensor


def token_places(ids: Tensor, token_ids: Tensor) -> Tensor:
    """Return the index of each id in token_ids, (tokens,) int64, or -1 if it is not among them."""
    ordered, order = token_ids.sort()
    found = torch.searchsorted(ordered, ids.reshape(-1)).clamp_(max=max(len(ordered) - 1, 0))
    return torch.where(ordered[found] == ids.reshape(-1), order[found], -1)


def without_padding(saved: TokenEmbeddingSaved, ids: Tensor, padding_id: int | None) -> TokenEmbeddingSaved:
    """Return the saved tensors without the padding token, so that its row has no gradient."""
    if padding_id is None:
        return saved
    return saved._replace(places=saved.places.masked_fill(ids.reshape(-1) == padding_id, -1))


def token_embedding_forward(
    ids: Tensor, weight: Tensor, token_rows: Tensor, token_ids: Tensor
) -> tuple[Tensor, TokenEmbeddingSaved]:
    """Compute y = W'[ids].

    Args:
        ids: (...) integers in [0, vocab).
        weight: (vocab, hidden), frozen.
        token_rows: R, (n, hidden), n at least 1.
        token_ids: (n,) int64, all different.

    Returns:
        y (..., hidden) in weight's dtype, and the saved tensors.
    """
    flat = ids.reshape(-1)
    places = token_places(flat, token_ids)
    y = weight.index_select(0, flat)
    hit = places >= 0
    y[hit] = token_rows.to(y.dtype)[places[hit]]
    return y.view(*ids.shape, weight.shape[1]), TokenEmbeddingSaved(places, token_rows.shape[0])


def token_embedding_backward(d_y: Tensor, saved: TokenEmbeddingSaved) -> TokenEmbeddingGrads:
    """Map d_y of shape (..., hidden) to the gradient derived in the module docstring."""
    hit = saved.places >= 0
    return TokenEmbeddingGrads(sums_by_id(saved.places[hit], d_y.reshape(-1, d_y.shape[-1])[hit], saved.trained))


def token_embedding_reference(ids: Tensor, weight: Tensor, token_rows: Tensor, token_ids: Tensor) -> Tensor:
    """Compute the same y from the whole table W', by products with one-hot rows."""
    one_hot = functional.one_hot(ids, weight.shape[0]).to(weight.dtype)
    return one_hot @ weight.index_copy(0, token_ids, token_rows.to(weight.dtype))


def token_linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, token_rows: Tensor, token_ids: Tensor
) -> tuple[Tensor, TokenLinearSaved]:
    """Compute y = x W'ᵀ + b.

    Args:
        x: (..., hidden).
        weight: (vocab, hidden), frozen.
        bias: (vocab,) or None, frozen.
        token_rows: R, (n, hidden).
        token_ids: (n,) int64, all different.

    Returns:
        y (..., vocab) in x's dtype, and the saved tensors.
    """
    y = functional.linear(x, weight)
    y[..., token_ids] = functional.linear(x, token_rows)
    if bias is not None:
        y.add_(bias)
    return y, TokenLinearSaved(x, weight, token_rows, token_ids)


def token_linear_backward(d_y: Tensor, saved: TokenLinearSaved, *, input_gradient: bool = True) -> TokenLinearGrads:
    """Map d_y of shape (..., vocab) to the gradients derived in the module docstring.

    Args:
        input_gradient: False skips ∂L/∂x.
    """
    x, weight, token_rows, token_ids = saved
    trained = d_y[..., token_ids]
    d_token_rows = trained.reshape(-1, trained.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    if not input_gradient:
        return TokenLinearGrads(None, d_token_rows)
    # G W' is G W plus the difference in the trained columns, so that no second d_y of full width is allocated.
    d_x = d_y @ weight + trained @ (token_rows - weight[token_ids])
    return TokenLinearGrads(d_x, d_token_rows)


def token_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, token_rows: Tensor, token_ids: Tensor
) -> Tensor:
    """Compute the same y from the whole table W'."""
    return functional.linear(x, weight.index_copy(0, token_ids, token_rows), bias)
