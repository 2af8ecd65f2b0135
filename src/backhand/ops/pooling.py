"""Pooling: one vector per document from the hidden states of its tokens.

    mean   y_d = (1 / |d|) Σ_{i ∈ d} x_i          cls   y_d = x of the first token of d
    last   y_d = x of the last token of d

These are the modes of `Pooling` in sentence-transformers. The documents are packed: x contains their states one after
another, and there is no padding.

Backward. With G = ∂L/∂y, (documents, hidden), and i a token of document d
    mean   ∂L/∂x_i = G_d / |d|                    cls, last   ∂L/∂x_i = G_d for that token, else 0

Saved: the lengths. x is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pooling = Literal["mean", "cls", "last"]


class PoolingSaved(NamedTuple):
    """Saved for the backward: number of tokens per document, the mode, the dtype of x."""

    lengths: tuple[int, ...]
    mode: Pooling
    dtype: torch.dtype


class PoolingGrads(NamedTuple):
    """d_x (tokens, hidden)."""

    d_x: Tensor


def pooling_forward(x: Tensor, lengths: Sequence[int], mode: Pooling) -> tuple[Tensor, PoolingSaved]:
    """Compute the vector of every document.

    Args:
        x: (tokens, hidden).
        lengths: number of tokens of each document, at least 1; they sum to the number of tokens.
        mode: the pooling.

    Returns:
        (documents, hidden) in float32 or wider, and the saved values.
    """
    wide, counts = torch.promote_types(x.dtype, torch.float32), _counts(lengths, x.device)
    if mode == "mean":
        y = torch.zeros(len(lengths), x.shape[1], dtype=wide, device=x.device)
        y.index_add_(0, _owners(counts), x.to(wide))
        y /= counts[:, None]
    else:
        y = x[_chosen(counts, mode)].to(wide)
    return y, PoolingSaved(tuple(lengths), mode, x.dtype)


def pooling_backward(d_y: Tensor, saved: PoolingSaved) -> PoolingGrads:
    """Map d_y (documents, hidden) to the gradient derived in the module docstring."""
    lengths, mode, dtype = saved
    counts = _counts(lengths, d_y.device)
    if mode == "mean":
        return PoolingGrads((d_y / counts[:, None]).to(dtype)[_owners(counts)])
    d_x = torch.zeros(sum(lengths), d_y.shape[1], dtype=dtype, device=d_y.device)
    return PoolingGrads(d_x.index_copy_(0, _chosen(counts, mode), d_y.to(dtype)))


def pooling_reference(x: Tensor, lengths: Sequence[int], mode: Pooling) -> Tensor:
    """Compute the same vectors document by document."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = wide.split(list(lengths)) if lengths else ()
    vectors = [part.mean(0) if mode == "mean" else part[0 if mode == "cls" else -1] for part in parts]
    return torch.stack(vectors) if vectors else wide


def _counts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64, device=device)


def _owners(counts: Tensor) -> Tensor:
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def _chosen(counts: Tensor, mode: Pooling) -> Tensor:
    """Return the index of the token that represents each document."""
    ends = counts.cumsum(0)
    return ends - 1 if mode == "last" else ends - counts
