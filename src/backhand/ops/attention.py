"""Causal grouped-query attention over packed documents.

For one document of n tokens and one query head (which shares its key/value head with its group):
    S = c Q Kᵀ + M,   P = softmax_rows(S) = exp(S - ℓ),   O = P V      [arXiv:1706.03762, eq. 1; 2305.13245 for groups]
with c the attention scaling, M = 0 where the key is visible (not after the query, and within the window) and -∞
elsewhere, and ℓ = logsumexp_rows(S). Documents are separate problems: no matrix, mask or loop spans two of them.

Backward. Let G = ∂L/∂O. From dO = dP V + P dV and dP = P ⊙ (dS - rowsum(P ⊙ dS)):
    ∂L/∂V = Pᵀ G                                     (n, head_dim), summed over the group
    ∂L/∂P = G Vᵀ
    δ     = rowsum(P ⊙ ∂L/∂P) = rowsum(G ⊙ O)        (n,)      [arXiv:2205.14135, appendix B.4]
    ∂L/∂S = P ⊙ (∂L/∂P - δ)
    ∂L/∂Q = c (∂L/∂S) K,   ∂L/∂K = c (∂L/∂S)ᵀ Q      (n, head_dim); the latter summed over the group

Two ways to carry this out, run by run (neighbouring documents of equal length):
- by blocks of queries (`attention_blocks`), which normalises P afresh and keeps no ℓ;
- by torch's flash kernels on the CPU, which keep ℓ and recompute P as exp(S - ℓ): for the shortest runs, whose many
  small steps cost more by blocks. bfloat16 is attended by the float32 kernels, which are faster there than the bfloat16
  ones (backward of 50-token documents 3.7 times). Float32 products routed to oneDNN (`set_float32_matmul_precision`)
  make these kernels up to three times slower, so then blocks take the short runs too.

Saved: Q, K, V, O, and ℓ (one float32 a token and head) of the runs that the kernels attended.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.attention_blocks import (
    AttentionBlocksGrads,
    AttentionBlocksSaved,
    attention_blocks_backward,
    attention_blocks_forward,
)

# (start token, number of documents, tokens of each): neighbouring documents of equal length.
Run = tuple[int, int, int]

# Runs of fewer tokens go to torch's kernels.
FEW_TOKENS = 128
_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionSaved(NamedTuple):
    """q, output (tokens, heads, head_dim); k, v (tokens, key/value heads, head_dim); log_sum_exp (≤ tokens · heads,).

    log_sum_exp is float32 or wider, for the runs that the kernels attended, in their order (documents, heads, tokens).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    log_sum_exp: Tensor
    runs: tuple[Run, ...]
    scaling: float
    window: int | None


class AttentionGrads(NamedTuple):
    """d_q, d_k, d_v in the shapes of q, k, v."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scaling: float, window: int | None = None
) -> tuple[Tensor, AttentionSaved]:
    """Attend within each document.

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, key/value heads, head_dim); heads is a multiple of key/value heads.
        v: of k's shape.
        runs: neighbouring documents of equal length, covering all tokens.
        scaling: c, the multiplier of query-key products.
        window: a query sees itself and window - 1 tokens before it; None for all before it.

    Returns:
        output (tokens, heads, head_dim) in q's dtype, and what backward needs.
    """
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kept = sum(count * length for _, count, length in runs if not _blockwise(q, count * length))
    log_sum_exp = torch.empty(kept * q.shape[1], dtype=wide, device=q.device)
    filled = 0
    for run in runs:
        q_run, k_run, v_run, out = (_documents(x, run) for x in (q, k, v, output))
        if _blockwise(q, run[1] * run[2]):
            attention_blocks_forward(q_run, k_run, v_run, scaling, window, out=out)
            continue
        mask = _window_mask(run[2], window, wide, q.device)
        o_run, lse_run = _forward_kernel(
            *_for_kernel(q_run, k_run, v_run), 0.0, mask is None, attn_mask=mask, scale=scaling
        )
        out.copy_(o_run.transpose(1, 2))
        log_sum_exp[filled : filled + lse_run.numel()].view(lse_run.shape).copy_(lse_run)
        filled += lse_run.numel()
    return output, AttentionSaved(q, k, v, output, log_sum_exp, runs, scaling, window)


def attention_backward(d_y: Tensor, saved: AttentionSaved, *, out: Tensor | None = None) -> AttentionGrads:
    """Map d_y, (tokens, heads, head_dim), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂O.
        saved: from the forward pass.
        out: (tokens, heads + 2 · key/value heads, head_dim) to receive [d_q | d_k | d_v] side by side, or None.
    """
    q, k, v, output, log_sum_exp, runs, scaling, window = saved
    heads, kv_heads = q.shape[1], k.shape[1]
    if out is None:
        out = torch.empty(q.shape[0], heads + 2 * kv_heads, q.shape[2], dtype=q.dtype, device=q.device)
    grads = AttentionGrads(*out.split([heads, kv_heads, kv_heads], dim=1))
    filled = 0
    for run in runs:
        _, count, length = run
        q_run, k_run, v_run, o_run, g_run = (_documents(x, run) for x in (q, k, v, output, d_y))
        d_q, d_k, d_v = (_documents(gradient, run) for gradient in grads)
        if _blockwise(q, count * length):
            in_blocks = AttentionBlocksSaved(q_run, k_run, v_run, scaling, window)
            attention_blocks_backward(g_run, in_blocks, out=AttentionBlocksGrads(d_q, d_k, d_v))
            continue
        lse_run = log_sum_exp[filled : filled + count * heads * length].view(count, heads, length)
        filled += lse_run.numel()
        mask = _window_mask(length, window, lse_run.dtype, q.device)
        operands = _for_kernel(g_run, q_run, k_run, v_run, o_run)
        results = _backward_kernel(*operands, lse_run, 0.0, mask is None, attn_mask=mask, scale=scaling)
        for gradient, result in zip((d_q, d_k, d_v), results, strict=True):
            gradient.copy_(result.transpose(1, 2))
    return grads


def _blockwise(q: Tensor, tokens: int) -> bool:
    """Whether a run of so many tokens is attended by blocks of queries (see the module docstring)."""
    if q.device.type != "cpu":
        return True
    if q.dtype == torch.float64:
        return False
    kernels_are_slow = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return tokens >= FEW_TOKENS or kernels_are_slow


def _documents(x: Tensor, run: Run) -> Tensor:
    """The run's part of x, (documents, length, heads, head_dim), a view."""
    start, count, length = run
    documents: Tensor = x[start : start + count * length].unflatten(0, (count, length))
    return documents


def _for_kernel(*documents: Tensor) -> list[Tensor]:
    """As torch's kernels take them: float32 or wider, (documents, heads, length, head_dim)."""
    wide = torch.float64 if documents[0].dtype == torch.float64 else torch.float32
    # Cast before the axes are swapped: the copy then runs along memory.
    return [x.to(wide).transpose(1, 2) for x in documents]


def _window_mask(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """M of one document, (length, length), where the window cuts something off; None where causality is all."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    mask = torch.zeros(length, length, dtype=dtype, device=device)
    return mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scaling: float, window: int | None = None
) -> Tensor:
    """The same output, document by document and head by head, with an explicit softmax over visible keys only."""
    documents = []
    group = q.shape[1] // k.shape[1]
    for start, count, length in runs:
        for first in range(start, start + count * length, length):
            span = slice(first, first + length)
            heads = []
            for head in range(q.shape[1]):
                scores = scaling * q[span, head] @ k[span, head // group].T
                visible = torch.ones_like(scores, dtype=torch.bool).tril()
                if window is not None:
                    visible = visible & ~torch.ones_like(visible).tril(-window)
                weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
                heads.append(weights @ v[span, head // group])
            documents.append(torch.stack(heads, dim=1))
    return torch.cat(documents) if documents else q * 0
