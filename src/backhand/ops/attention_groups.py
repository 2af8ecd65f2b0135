"""Torch's form of attention: one group of documents after another (`document_groups`), each in one of two ways.

- By blocks of queries (`attention_blocks`), which compute P again in the backward and save no ℓ.
- By torch's flash kernels on the CPU, which save ℓ and recompute P as exp(S - ℓ). They take groups of few tokens that
  continue no segment and have no cap and no sinks; by blocks, their many small steps would cost more.

bfloat16 is attended by the float32 kernels, which are faster than the bfloat16 ones (backward of 50-token documents 3.7
times). If float32 products are routed to oneDNN (`set_float32_matmul_precision`), these kernels are up to three times
slower, so that blocks take the short groups too.

The formulas are those of `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.ops.attention_blocks import (
    AttentionBlocksGrads,
    AttentionBlocksSaved,
    Scores,
    attention_blocks_backward,
    attention_blocks_forward,
)
from backhand.ops.document_groups import (
    Run,
    continued_end,
    gather_documents,
    gather_keys,
    groups,
    scatter_documents,
    scatter_key_grads,
    uses_blocks,
)

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
QKV = tuple[Tensor, Tensor, Tensor]


def grouped_forward(qkv: QKV, runs: tuple[Run, ...], scores: Scores, output: Tensor) -> Tensor:
    """Fill `output`, (tokens, heads, head_dim), with O and return ℓ of what torch's kernels attended."""
    q, k, v = qkv
    wide, plain = torch.promote_types(q.dtype, torch.float32), scores.known_to_kernels
    attended_together = groups(runs, q, plain)
    saved_tokens = sum(group.tokens for group in attended_together if not uses_blocks(q, group, plain))
    log_sum_exp = torch.empty(saved_tokens * q.shape[1], dtype=wide, device=q.device)
    filled = 0
    for group in attended_together:
        q_group, k_group, v_group = gather_documents(q, group), gather_keys(k, group), gather_keys(v, group)
        if uses_blocks(q, group, plain):
            in_place = gather_documents(output, group) if group.places is None else None
            attended, _ = attention_blocks_forward(q_group, k_group, v_group, scores, out=in_place)
            if in_place is None:
                scatter_documents(attended, group, output)
            continue
        mask = _window_mask(group.length, scores.window, wide, q.device)
        attended, lse = _forward_kernel(
            *_for_kernel(q_group, k_group, v_group), 0.0, mask is None, attn_mask=mask, scale=scores.scaling
        )
        scatter_documents(attended.transpose(1, 2), group, output)
        log_sum_exp[filled : filled + lse.numel()].view(lse.shape).copy_(lse)
        filled += lse.numel()
    return log_sum_exp


def grouped_backward(
    d_y: Tensor,
    qkv: QKV,
    attended: tuple[Tensor | None, Tensor],
    runs: tuple[Run, ...],
    scores: Scores,
    grads: Sequence[Tensor],
) -> None:
    """Fill `grads` with ∂L/∂Q, ∂L/∂K and ∂L/∂V, in the shapes of q, k and v.

    Args:
        d_y: ∂L/∂O, (tokens, heads, head_dim).
        attended: O if it was kept, and ℓ from `grouped_forward`; ℓ is empty if our own kernel attended.
    """
    (q, k, v), (output, log_sum_exp), (d_q, d_k, d_v) = qkv, attended, grads
    # The gradients that segments add to those before them, rounded once at the end.
    wide, continued = torch.promote_types(q.dtype, torch.float32), continued_end(runs)
    shares_k, shares_v = (torch.zeros(continued, *k.shape[1:], dtype=wide, device=q.device) for _ in range(2))
    filled, plain = 0, scores.known_to_kernels
    for group in groups(runs, q, plain):
        q_group, k_group, v_group = gather_documents(q, group), gather_keys(k, group), gather_keys(v, group)
        g_group = gather_documents(d_y, group, zero_padding=True)
        if log_sum_exp.numel() == 0 or uses_blocks(q, group, plain):  # blocks need no ℓ
            in_place = None
            if group.places is None and group.keys is None:
                in_place = AttentionBlocksGrads(*(gather_documents(gradient, group) for gradient in grads))
            in_blocks = AttentionBlocksSaved(q_group, k_group, v_group, scores)
            results = attention_blocks_backward(g_group, in_blocks, out=in_place)
            if in_place is None:
                scatter_documents(results.d_q, group, d_q)
                scatter_key_grads(results.d_k, group, d_k, shares_k)
                scatter_key_grads(results.d_v, group, d_v, shares_v)
            continue
        lse = log_sum_exp[filled : filled + group.tokens * q.shape[1]].view(group.documents, q.shape[1], group.length)
        filled += lse.numel()
        mask = _window_mask(group.length, scores.window, lse.dtype, q.device)
        operands = _for_kernel(g_group, q_group, k_group, v_group, gather_documents(not_none(output), group))
        from_kernel = _backward_kernel(*operands, lse, 0.0, mask is None, attn_mask=mask, scale=scores.scaling)
        for gradient, result in zip(grads, from_kernel, strict=True):
            scatter_documents(result.transpose(1, 2), group, gradient)
    d_k[:continued] += shares_k
    d_v[:continued] += shares_v


def _for_kernel(*documents: Tensor) -> list[Tensor]:
    """Convert to the layout of torch's kernels: float32 or wider, (documents, heads, length, head_dim)."""
    wide = torch.promote_types(documents[0].dtype, torch.float32)
    # Cast before the axes are swapped: the copy then runs along memory.
    return [x.to(wide).transpose(1, 2) for x in documents]


def _window_mask(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return M of one document, (length, length), or None if the window hides nothing that causality shows."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    mask = torch.zeros(length, length, dtype=dtype, device=device)
    return mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
