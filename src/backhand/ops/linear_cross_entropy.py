"""The fused head: output projection and cross-entropy in chunks of rows, without forming all logits.

    Z = γ (X Wᵀ + s (X Aᵀ) Bᵀ),   ℓ_i = logsumexp(Z_i) - Z_{i, t_i},   L = Σ_i ℓ_i

over supervised rows only: the caller selects them, since a row without a target has no loss and no gradient. γ is the
logits' multiplier of some families (Granite), else 1. The low-rank part exists if the head itself is adapted. Under
dropout it sees m ⊙ X instead of X, and its share of ∂L/∂X is multiplied by m again, as in `lora_linear`. Some families
cap logits softly [arXiv:2408.00118, §2]: ℓ then uses Z' = κ T, T = tanh(Z / κ), instead of Z, and dZ' = (1 - T²) ⊙ dZ.

Backward. dℓ_i = ⟨softmax(Z'_i) - onehot(t_i), dZ'_i⟩, so with row i of D = w_i γ (softmax(Z'_i) - onehot(t_i)) ⊙
(1 - T_i²) for a loss with ∂L/∂ℓ_i = w_i (without a cap Z' = Z, and there is no factor 1 - T²),
    ∂L/∂X = D W + (∂L/∂h) A       (rows, hidden),    ∂L/∂h = s D B      (rows, rank)
    ∂L/∂A = (∂L/∂h)ᵀ X            (rank, hidden)
    ∂L/∂B = s Dᵀ h                (vocab, rank),     h = X Aᵀ

The mean of all ℓ has the same w for every row, which is known in advance. D then depends on the chunk's own logits
only, and its gradient is computed right after the chunk's forward: nothing is saved and no product is repeated. Any
other function of the log-probabilities -ℓ (pairs, rewards) determines one w_i per row from the ℓ of the forward. The
backward then computes each chunk's logits again, since they are never held as a whole.

Memory: the logits of one chunk, (chunk, vocab), in the compute dtype, and the softmax of a few of its rows in float32;
both are reused. Chunks below 256 rows read W too often (64 rows take 1.4 to 1.8 times as long), while the softmax is
fastest on as few rows as fit into the caches. Every chunk reads W twice, and unpacks it if it is quantized. Wide
models, whose W is more than three times as large as 512 rows of logits, therefore take chunks of 512 rows
(`chunk_rows`). So do all models in bfloat16 with AMX, which multiplies faster than W is read and packed.

The kernel (native/softmax_losses.cpp) takes one row at a time, and needs the float32 softmax of that row only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import softmax_losses as kernels
from backhand.kernels.dense_product import amx_available
from backhand.ops.cross_entropy import losses_in_place
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.ops.head_factors import AdaptedHead, HeadFactors
from backhand.ops.logits_rule import PLAIN, LogitsRule, ruled_reference
from backhand.ops.weight_tiles import FrozenMatrix

CHUNK_ROWS, LONG_CHUNK_ROWS = 256, 512
LONG_CHUNK_WIDTH = 3 * LONG_CHUNK_ROWS


class LinearCrossEntropyGrads(NamedTuple):
    """Gradients of Σ w ℓ: d_x (rows, hidden); d_lora_A and d_lora_B, float32 at least, or None."""

    d_x: Tensor
    d_lora_A: Tensor | None
    d_lora_B: Tensor | None


def chunk_logits(x: Tensor, weight: FrozenMatrix, rule: LogitsRule, out: Tensor) -> Tensor:
    """Write γ Z of one chunk, (rows, vocab), by the frozen head, to `out`."""
    frozen_linear(x, weight, out=out)
    return out if rule.scaling == 1.0 else out.mul_(rule.scaling)


def softmax_losses(
    logits: Tensor, targets: Tensor, losses: Tensor, cap: float | None = None, *, gradient: bool
) -> None:
    """Write ℓ of one chunk, (rows,), to `losses`; with `gradient`, replace the logits by ∂ℓ/∂Z."""
    if cap is not None or not kernels.softmax_losses(logits, targets, losses, gradient=gradient):
        losses_in_place(logits, targets, losses, cap, gradient=gradient)


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute ℓ, (rows,) float32 or wider, of given logits (rows, vocab), with the bits of the fused head."""
    losses = torch.empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    softmax_losses(logits, targets, losses, gradient=False)
    return losses


def chunk_rows(hidden: int, dtype: torch.dtype) -> int:
    """Return the rows per chunk for this width and compute dtype, the same for a dense and a quantized head."""
    by_amx = dtype == torch.bfloat16 and amx_available(dtype)
    return LONG_CHUNK_ROWS if hidden >= LONG_CHUNK_WIDTH or by_amx else CHUNK_ROWS


def chunks(x: Tensor) -> list[slice]:
    """Return the ranges of rows of x, (rows, hidden), that go through the head at once."""
    step = chunk_rows(x.shape[1], x.dtype)
    return [slice(start, min(start + step, x.shape[0])) for start in range(0, x.shape[0], step)]


def chunk_shape(rows: int, weight: FrozenMatrix, dtype: torch.dtype) -> tuple[int, int]:
    """Return the shape (chunk, vocab) of one chunk's logits."""
    vocab, hidden = weight.shape
    return min(rows, chunk_rows(hidden, dtype)), vocab


def _buffers(x: Tensor, weight: FrozenMatrix, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Allocate one chunk's logits, unless `logits` is given, and the losses of all rows in float32 or wider."""
    if logits is None:
        logits = torch.empty(chunk_shape(x.shape[0], weight, x.dtype), dtype=x.dtype, device=x.device)
    return logits, torch.empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


ChunkLoss = Callable[[Tensor, slice, Tensor], None]
"""Writes ℓ of a chunk to the third argument, given its logits and its rows. In `head_backward` it also replaces the
logits by ∂ℓ/∂Z."""


def head_forward(
    x: Tensor,
    weight: FrozenMatrix,
    loss: ChunkLoss,
    head: HeadFactors | None,
    rule: LogitsRule,
    *,
    logits: Tensor | None,
) -> Tensor:
    """Compute the losses of every row, (rows,), from the logits of one chunk after another."""
    logits, losses = _buffers(x, weight, logits)
    adapted = None if head is None else AdaptedHead(head, x)
    for part in chunks(x):
        chunk = chunk_logits(x[part], weight, rule, logits[: part.stop - part.start])
        if adapted is not None:
            adapted.add_logits(chunk, part, rule.scaling)
        loss(chunk, part, losses[part])
    return losses


def head_backward(
    x: Tensor,
    weight: FrozenMatrix,
    loss: ChunkLoss,
    head: HeadFactors | None,
    multiplier: float | Tensor,
    rule: LogitsRule,
    *,
    out: Tensor | None,
    logits: Tensor | None,
) -> tuple[Tensor, LinearCrossEntropyGrads]:
    """Compute the losses of every row and the gradients of Σ w ℓ, from the logits of one chunk after another."""
    if isinstance(multiplier, Tensor):
        multiplier = multiplier.to(torch.promote_types(x.dtype, torch.float32))[:, None]
    logits, losses = _buffers(x, weight, logits)
    d_x = torch.empty_like(x) if out is None else out
    adapted = None if head is None else AdaptedHead(head, x)
    multiplier = multiplier * rule.scaling
    for part in chunks(x):
        w = multiplier if isinstance(multiplier, float) else multiplier[part]
        chunk = chunk_logits(x[part], weight, rule, logits[: part.stop - part.start])
        h = None if adapted is None else adapted.add_logits(chunk, part, rule.scaling)
        loss(chunk, part, losses[part])
        # The logits now hold D / (w γ). The factor w γ is applied to the products, which have far fewer columns.
        frozen_input_gradient(chunk, weight, out=d_x[part]).mul_(w)
        if adapted is not None and h is not None:
            adapted.add_gradients(d_x[part], chunk, h, part, w)
    if adapted is None:
        return losses, LinearCrossEntropyGrads(d_x, None, None)
    return losses, LinearCrossEntropyGrads(d_x, adapted.d_lora_A, adapted.d_lora_B)


def linear_cross_entropy_forward(
    x: Tensor,
    weight: FrozenMatrix,
    targets: Tensor,
    head: HeadFactors | None = None,
    rule: LogitsRule = PLAIN,
    *,
    logits: Tensor | None = None,
) -> Tensor:
    """Compute ℓ of every row, without gradients.

    Args:
        x: (rows, hidden), the supervised rows.
        weight: (vocab, hidden).
        targets: (rows,) int64 in [0, vocab).
        head: the head's adapter, or None.
        rule: the logits' multiplier and cap.
        logits: a buffer of `chunk_shape` and x's dtype, or None.

    Returns:
        (rows,) losses in nats, float32 or wider.
    """

    def loss(chunk: Tensor, part: slice, losses: Tensor) -> None:
        softmax_losses(chunk, targets[part], losses, rule.cap, gradient=False)

    return head_forward(x, weight, loss, head, rule, logits=logits)


def linear_cross_entropy_backward(
    x: Tensor,
    weight: FrozenMatrix,
    targets: Tensor,
    head: HeadFactors | None = None,
    multiplier: float | Tensor = 1.0,
    rule: LogitsRule = PLAIN,
    *,
    out: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, LinearCrossEntropyGrads]:
    """Compute ℓ of every row and the gradients of Σ w ℓ, forward and backward in one pass over the chunks.

    Args:
        x: (rows, hidden), the supervised rows.
        weight: (vocab, hidden).
        targets: (rows,) int64 in [0, vocab).
        head: the head's adapter, or None.
        multiplier: w of every row, e.g. 1 / supervised tokens of the whole step; or one w per row, (rows,).
        rule: the logits' multiplier and cap.
        out: of x's shape and dtype, to receive d_x, or None; may be x itself if the head has no adapter.
        logits: a buffer of `chunk_shape` and x's dtype, or None.

    Returns:
        (rows,) losses in nats (not multiplied), and the gradients of the module docstring.
    """

    def loss(chunk: Tensor, part: slice, losses: Tensor) -> None:
        softmax_losses(chunk, targets[part], losses, rule.cap, gradient=True)

    return head_backward(x, weight, loss, head, multiplier, rule, out=out, logits=logits)


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, head: HeadFactors | None = None, rule: LogitsRule = PLAIN
) -> Tensor:
    """Compute ℓ of every row with full logits and torch's cross-entropy."""
    full = weight if head is None else weight + head.scaling * (head.lora_B @ head.lora_A)
    return torch.nn.functional.cross_entropy(ruled_reference(x @ full.T, rule), targets, reduction="none")
