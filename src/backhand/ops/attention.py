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

Saved: Q, K, V, O and ℓ (one float32 a token and head). P is recomputed as exp(S - ℓ), which is why ℓ is kept.
On the CPU the sums above are carried out by torch's flash kernels, one call for neighbouring documents of equal
length; elsewhere, and as the worked form of the formulas, by `_document_forward` and `_document_backward`.

Measured on a processor with AVX512-BF16: below about 300 tokens the float32 kernels are faster than the bfloat16 ones
(backward of 50-token documents 3.7 times) and more exact, so short bfloat16 documents are attended in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# (start token, number of documents, tokens of each): neighbouring documents of equal length.
Run = tuple[int, int, int]

WIDE_BELOW_TOKENS = 300
_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionSaved(NamedTuple):
    """q, output (tokens, heads, head_dim); k, v (tokens, key/value heads, head_dim); log_sum_exp (tokens · heads,).

    log_sum_exp is float32 or wider, run by run, in the kernels' order (documents, heads, tokens).
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
        k, v: (tokens, key/value heads, head_dim); heads is a multiple of key/value heads.
        runs: neighbouring documents of equal length, covering all tokens.
        scaling: c, the multiplier of query-key products.
        window: a query sees itself and window - 1 tokens before it; None for all before it.

    Returns:
        output (tokens, heads, head_dim) in q's dtype, and what backward needs.
    """
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    log_sum_exp = torch.empty(q.shape[0] * q.shape[1], dtype=wide, device=q.device)
    for run in runs:
        start, count, length = run
        q_run, k_run, v_run = (_documents(x, run) for x in (q, k, v))
        o_run, lse_run = _run_forward(q_run, k_run, v_run, scaling, _window_mask(length, window, q_run))
        _documents(output, run, cast=False).copy_(o_run)
        span = slice(start * q.shape[1], (start + count * length) * q.shape[1])
        log_sum_exp[span].view(lse_run.shape).copy_(lse_run)
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
    for run in runs:
        start, count, length = run
        q_run, k_run, v_run, o_run, g_run = (_documents(x, run) for x in (q, k, v, output, d_y))
        lse_run = log_sum_exp[start * heads : (start + count * length) * heads].view(count, heads, length)
        mask = _window_mask(length, window, q_run)
        results = _run_backward(g_run, q_run, k_run, v_run, o_run, lse_run, scaling, mask)
        for gradient, result in zip(grads, results, strict=True):
            _documents(gradient, run, cast=False).copy_(result)
    return grads


def _documents(x: Tensor, run: Run, cast: bool = True) -> Tensor:
    """The run's part of x as (documents, heads, length, head_dim), a view; short bfloat16 documents are widened."""
    start, count, length = run
    part: Tensor = x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
    narrow_and_short = x.dtype == torch.bfloat16 and x.device.type == "cpu" and length <= WIDE_BELOW_TOKENS
    return part.float() if cast and narrow_and_short else part


def _window_mask(length: int, window: int | None, like: Tensor) -> Tensor | None:
    """M of one document, (length, length), where the window cuts something off; None where causality is all."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=like.device)
    distance = positions[:, None] - positions[None, :]
    mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
    return mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))


def _run_forward(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """O and ℓ of one run; all tensors (documents, heads, length, head_dim)."""
    if q.device.type != "cpu":
        return _document_forward(q, k, v, scaling, mask)
    output, lse = _forward_kernel(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling)
    return output, lse


def _run_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂Q, ∂L/∂K, ∂L/∂V of one run."""
    if q.device.type != "cpu":
        return _document_backward(g, q, k, v, output, scaling, mask)
    d_q, d_k, d_v = _backward_kernel(g, q, k, v, output, lse, 0.0, mask is None, attn_mask=mask, scale=scaling)
    return d_q, d_k, d_v


def _scores(q: Tensor, k: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """S by group: (documents, key/value heads, group, length, length), float32 or wider."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores: Tensor = (grouped @ k.unsqueeze(2).mT).to(wide) * scaling
    if mask is None:
        length = q.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        return scores.masked_fill_(hidden, float("-inf"))
    return scores + mask.to(wide)


def _document_forward(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """O = P V and ℓ, formula by formula."""
    scores = _scores(q, k, scaling, mask)
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.softmax(scores, dim=-1)
    output = probabilities.to(v.dtype) @ v.unsqueeze(2)
    return output.flatten(1, 2), lse.flatten(1, 2)


def _document_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the module docstring, formula by formula; the group's sum is the sum over its axis.

    P is normalised afresh: with all of S at hand that costs nothing, and exp(S - ℓ) would carry the rounding of ℓ.
    """
    groups = (k.shape[1], -1)
    probabilities = torch.softmax(_scores(q, k, scaling, mask), dim=-1)
    g_grouped, q_grouped = g.unflatten(1, groups), q.unflatten(1, groups)
    d_v = (probabilities.to(g.dtype).mT @ g_grouped).sum(2)
    d_probabilities = (g_grouped @ v.unsqueeze(2).mT).to(probabilities.dtype)
    delta = (g_grouped.to(probabilities.dtype) * output.unflatten(1, groups)).sum(-1, keepdim=True)
    d_scores = (probabilities * (d_probabilities - delta) * scaling).to(q.dtype)
    d_q = (d_scores @ k.unsqueeze(2)).flatten(1, 2)
    d_k = (d_scores.mT @ q_grouped).sum(2)
    return d_q, d_k, d_v


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
