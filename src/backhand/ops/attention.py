"""Causal grouped-query attention over packed documents.

For one document of n tokens and one query head (which shares its key/value head with its group):
    S = c Q Kᵀ + M,   P = softmax_rows(S) = exp(S - ℓ),   O = P V      [arXiv:1706.03762, eq. 1; 2305.13245 for groups]
with c the attention scaling, M = 0 where the key is visible (not after the query, and within the window) and -∞
elsewhere, and ℓ = logsumexp_rows(S). Documents are separate problems: no matrix, mask or loop spans two of them.

Documents that begin with the same tokens have the same hidden states there, since attention is causal. Such a shared
prefix stands once at the front, attends to itself as a document of its own, and every other document is attended with
the prefix's K and V before its own: queries at its own positions only. By the chain rule the prefix's ∂L/∂K and ∂L/∂V
are the sums over all documents that saw it.

Backward. Let G = ∂L/∂O. From dO = dP V + P dV and dP = P ⊙ (dS - rowsum(P ⊙ dS)):
    ∂L/∂V = Pᵀ G                                     (n, head_dim), summed over the group
    ∂L/∂P = G Vᵀ
    δ     = rowsum(P ⊙ ∂L/∂P) = rowsum(G ⊙ O)        (n,)      [arXiv:2205.14135, appendix B.4]
    ∂L/∂S = P ⊙ (∂L/∂P - δ)
    ∂L/∂Q = c (∂L/∂S) K,   ∂L/∂K = c (∂L/∂S)ᵀ Q      (n, head_dim); the latter summed over the group

Two ways to carry this out, group by group (neighbouring documents of one length, or short ones of about one length):
- by blocks of queries (`attention_blocks`), which normalises P afresh and keeps no ℓ. Documents of about one length
  become of one length by repeating a token behind their end: causality hides these from every real query, and since
  their own ∂L/∂O is set to zero they add nothing to any gradient;
- by torch's flash kernels on the CPU, which keep ℓ and recompute P as exp(S - ℓ): for groups of few tokens, whose many
  small steps cost more by blocks. bfloat16 is attended by the float32 kernels, which are faster there than the bfloat16
  ones (backward of 50-token documents 3.7 times). Float32 products routed to oneDNN (`set_float32_matmul_precision`)
  make these kernels up to three times slower, so then blocks take the short ones too.

Saved: Q, K, V, O, and ℓ (one float32 a token and head) of what the kernels attended.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.attention_blocks import (
    ALIGNMENT,
    AttentionBlocksGrads,
    AttentionBlocksSaved,
    attention_blocks_backward,
    attention_blocks_forward,
)

# (start token, number of documents, tokens of each): neighbouring documents of equal length.
Run = tuple[int, int, int]

# Groups of fewer tokens go to torch's kernels.
FEW_TOKENS = 128
# Documents up to this length may be joined in a group, if at most this share of its tokens is added behind their ends; in low
# precision their common length is rounded up likewise, since the softmax of rows of 55 takes twice that of rows of 64.
JOINED_UP_TO_TOKENS = 160
ADDED_SHARE = 0.35
FLOAT32_BYTES = 4
_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionSaved(NamedTuple):
    """q, output (tokens, heads, head_dim); k, v (tokens, key/value heads, head_dim); log_sum_exp (≤ tokens · heads,).

    log_sum_exp is float32 or wider, for what the kernels attended, in their order (documents, heads, tokens).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    log_sum_exp: Tensor
    runs: tuple[Run, ...]
    scaling: float
    window: int | None
    shared: int = 0


class AttentionGrads(NamedTuple):
    """d_q, d_k, d_v in the shapes of q, k, v."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scaling: float, window: int | None = None, shared: int = 0
) -> tuple[Tensor, AttentionSaved]:
    """Attend within each document.

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, key/value heads, head_dim); heads is a multiple of key/value heads.
        v: of k's shape.
        runs: neighbouring documents of equal length, covering all tokens behind the shared prefix.
        scaling: c, the multiplier of query-key products.
        window: a query sees itself and window - 1 tokens before it; None for all before it.
        shared: tokens at the front with which every document begins.

    Returns:
        output (tokens, heads, head_dim) in q's dtype, and what backward needs.
    """
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = _groups(runs, shared, q)
    kept = sum(group.tokens for group in groups if not _blockwise(q, group))
    log_sum_exp = torch.empty(kept * q.shape[1], dtype=wide, device=q.device)
    filled = 0
    for group in groups:
        q_group, k_group, v_group = _together(q, group), _keys(k, group), _keys(v, group)
        if _blockwise(q, group):
            in_place = _together(output, group) if group.places is None else None
            attended, _ = attention_blocks_forward(q_group, k_group, v_group, scaling, window, out=in_place)
            if in_place is None:
                _apart(attended, group, output)
            continue
        mask = _window_mask(group.length, window, wide, q.device)
        attended, lse = _forward_kernel(
            *_for_kernel(q_group, k_group, v_group), 0.0, mask is None, attn_mask=mask, scale=scaling
        )
        _apart(attended.transpose(1, 2), group, output)
        log_sum_exp[filled : filled + lse.numel()].view(lse.shape).copy_(lse)
        filled += lse.numel()
    return output, AttentionSaved(q, k, v, output, log_sum_exp, runs, scaling, window, shared)


def attention_backward(d_y: Tensor, saved: AttentionSaved, *, out: Tensor | None = None) -> AttentionGrads:
    """Map d_y, (tokens, heads, head_dim), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂O.
        saved: from the forward pass.
        out: (tokens, heads + 2 · key/value heads, head_dim) to receive [d_q | d_k | d_v] side by side, or None.
    """
    q, k, v, output, log_sum_exp, runs, scaling, window, shared = saved
    heads, kv_heads = q.shape[1], k.shape[1]
    if out is None:
        out = torch.empty(q.shape[0], heads + 2 * kv_heads, q.shape[2], dtype=q.dtype, device=q.device)
    grads = AttentionGrads(*out.split([heads, kv_heads, kv_heads], dim=1))
    filled = 0
    for group in _groups(runs, shared, q):
        q_group, k_group, v_group = _together(q, group), _keys(k, group), _keys(v, group)
        g_group = _together(d_y, group, zero_behind=True)
        if _blockwise(q, group):
            in_blocks = AttentionBlocksSaved(q_group, k_group, v_group, scaling, window)
            in_place = None
            if group.places is None and group.keys is None:
                in_place = AttentionBlocksGrads(*(_together(gradient, group) for gradient in grads))
            results = attention_blocks_backward(g_group, in_blocks, out=in_place)
            if in_place is None:
                _apart(results.d_q, group, grads.d_q)
                _keys_apart(results.d_k, group, grads.d_k)
                _keys_apart(results.d_v, group, grads.d_v)
            continue
        lse = log_sum_exp[filled : filled + group.tokens * heads].view(group.documents, heads, group.length)
        filled += lse.numel()
        mask = _window_mask(group.length, window, lse.dtype, q.device)
        operands = _for_kernel(g_group, q_group, k_group, v_group, _together(output, group))
        from_kernel = _backward_kernel(*operands, lse, 0.0, mask is None, attn_mask=mask, scale=scaling)
        for gradient, result in zip(grads, from_kernel, strict=True):
            _apart(result.transpose(1, 2), group, gradient)
    return grads


class Places(NamedTuple):
    """Which token lies where, as rows to copy: torch copies rows by index far faster than it writes to indices.

    of_token: (tokens,) the place of each token. token_at: (places,) the token at each place, behind a document's end
    some token of it. behind: (places without a token,) these places.
    """

    of_token: Tensor
    token_at: Tensor
    behind: Tensor


class Group(NamedTuple):
    """Neighbouring documents attended together as (documents, length); what they hold is `tokens` from `start` on.

    places: where its documents do not fill documents · length places; else None.
    keys: (documents · (before + length),) the token of each key, where `before` tokens of the shared prefix stand before
    each document; else None.
    """

    start: int
    tokens: int
    documents: int
    length: int
    before: int
    places: Places | None
    keys: Tensor | None


def _groups(runs: tuple[Run, ...], shared: int, like: Tensor) -> list[Group]:
    """The shared prefix, then the runs, with short ones of about one length together where blocks attend them.

    The prefix comes first: its gradients are set before those of the documents that saw it are added.
    """
    joined: list[list[Run]] = []
    for run in runs:
        if joined and _may_join(joined[-1], run):
            joined[-1].append(run)
        else:
            joined.append([run])
    aligned = like.element_size() < FLOAT32_BYTES
    groups = [_group(((0, 1, shared),), 0, False, like.device)] if shared else []
    for together in joined:
        if shared or _blocks_are_faster(like, _tokens(together)):
            groups.append(_group(tuple(together), shared, aligned, like.device))
        else:
            groups.extend(_group((run,), 0, False, like.device) for run in together)
    return groups


def _tokens(runs: Sequence[Run]) -> int:
    return sum(count * length for _, count, length in runs)


def _may_join(group: list[Run], run: Run) -> bool:
    together = [*group, run]
    longest, documents = max(run[2] for run in together), sum(run[1] for run in together)
    return longest <= JOINED_UP_TO_TOKENS and documents * longest <= (1 + ADDED_SHARE) * _tokens(together)


@functools.lru_cache(maxsize=64)
def _group(runs: tuple[Run, ...], before: int, aligned: bool, device: torch.device) -> Group:
    """One group, its documents' common length aligned where that adds little; every layer asks for the same ones."""
    start, documents, length = runs[0][0], sum(count for _, count, _ in runs), max(length for _, _, length in runs)
    tokens = _tokens(runs)
    rounded = -(-(before + length) // ALIGNMENT) * ALIGNMENT - before
    if aligned and length <= JOINED_UP_TO_TOKENS and documents * rounded <= (1 + ADDED_SHARE) * tokens:
        length = rounded
    token_at, places = torch.arange(tokens, device=device), None
    if tokens != documents * length:
        lengths = torch.tensor([length for _, count, length in runs for _ in range(count)], device=device)
        inside = (torch.arange(length, device=device) < lengths[:, None]).flatten()
        token_at = inside.cumsum(0) - 1
        places = Places(inside.nonzero().squeeze(1), token_at, (~inside).nonzero().squeeze(1))
    keys = None
    if before:
        prefix = torch.arange(before, device=device).expand(documents, before)
        keys = torch.cat([prefix, start + token_at.view(documents, length)], dim=1).flatten()
    return Group(start, tokens, documents, length, before, places, keys)


def _blockwise(q: Tensor, group: Group) -> bool:
    """Whether a group is attended by blocks of queries (see the module docstring)."""
    return group.keys is not None or _blocks_are_faster(q, group.tokens)


def _blocks_are_faster(q: Tensor, tokens: int) -> bool:
    """Whether blocks are the faster way for so many tokens."""
    kernels_are_slow = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return tokens >= FEW_TOKENS or kernels_are_slow or q.device.type != "cpu"


def _together(x: Tensor, group: Group, *, zero_behind: bool = False) -> Tensor:
    """The group's part of x, (documents, length, heads, head_dim): a view, or a copy where places stay empty.

    Behind a document's end stand numbers that no real query sees: any finite ones do for q, k and v, but a gradient
    has to be zero there.
    """
    part = x[group.start : group.start + group.tokens]
    if group.places is not None:
        part = part.index_select(0, group.places.token_at)
        if zero_behind:
            part.index_fill_(0, group.places.behind, 0)
    documents: Tensor = part.unflatten(0, (group.documents, group.length))
    return documents


def _keys(x: Tensor, group: Group) -> Tensor:
    """k or v of all that the group's queries may see, (documents, before + length, key/value heads, head_dim)."""
    if group.keys is None:
        return _together(x, group)
    documents: Tensor = x.index_select(0, group.keys).unflatten(0, (group.documents, group.before + group.length))
    return documents


def _apart(x: Tensor, group: Group, out: Tensor) -> None:
    """Write (documents, length, heads, head_dim) into the group's part of `out`, without what lies behind the ends."""
    part = out[group.start : group.start + group.tokens]
    if group.places is None:
        part.unflatten(0, (group.documents, group.length)).copy_(x)
    else:
        torch.index_select(x.flatten(0, 1), 0, group.places.of_token, out=part)


def _keys_apart(x: Tensor, group: Group, out: Tensor) -> None:
    """The same for a gradient of `_keys`; the prefix's share is summed over the documents and added."""
    if group.before:
        wide = torch.promote_types(x.dtype, torch.float32)
        out[: group.before] += x[:, : group.before].sum(0, dtype=wide)
    _apart(x[:, group.before :], group, out)


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
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scaling: float, window: int | None = None, shared: int = 0
) -> Tensor:
    """The same output, document by document and head by head, with an explicit softmax over visible keys only."""
    prefix = [] if shared == 0 else [range(shared)]
    own = [range(first, first + n) for start, count, n in runs for first in range(start, start + count * n, n)]
    documents = []
    group = q.shape[1] // k.shape[1]
    for tokens in (*prefix, *own):
        seen = list(tokens) if tokens.start < shared else [*range(shared), *tokens]
        visible = torch.ones(len(seen), len(seen), dtype=torch.bool, device=q.device).tril()
        if window is not None:
            visible = visible & ~visible.tril(-window)
        visible = visible[-len(tokens) :]
        heads = []
        for head in range(q.shape[1]):
            scores = scaling * q[tokens.start : tokens.stop, head] @ k[seen, head // group].T
            weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
            heads.append(weights @ v[seen, head // group])
        documents.append(torch.stack(heads, dim=1))
    return torch.cat(documents) if documents else q * 0
