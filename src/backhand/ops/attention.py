"""Grouped-query attention over packed documents, causal or in both directions.

For one document of n tokens and one query head (which shares its key/value head with its group):
    S = c Q Kᵀ + M,   P = softmax_rows(S) = exp(S - ℓ),   O = P V      [arXiv:1706.03762, eq. 1; 2305.13245 for groups]
with c the attention scaling, ℓ = logsumexp_rows(S), and M = 0 where the key is visible (not after the query, and within
the window) and -∞ elsewhere. In encoders a query also sees the keys after it, within the same distance if there is a
window. Only M differs, so every formula below holds in both directions. Documents are separate problems: no query sees
a key of another document.

Documents that begin with the same tokens have the same hidden states there if attention is causal. Such a common
beginning is stored once, as a segment that others continue. The queries of a segment are its own tokens. Its K and V
are those of all segments before it in its documents, followed by its own. By the chain rule ∂L/∂K and ∂L/∂V of a
segment are the sums over all segments that saw it, including itself.

Backward. Let G = ∂L/∂O. From dO = dP V + P dV and dP = P ⊙ (dS - rowsum(P ⊙ dS)):
    ∂L/∂V = Pᵀ G                                     (n, head_dim), summed over the group
    ∂L/∂P = G Vᵀ
    δ     = rowsum(P ⊙ ∂L/∂P) = rowsum(G ⊙ O)        (n,)      [arXiv:2205.14135, appendix B.4]
    ∂L/∂S = P ⊙ (∂L/∂P - δ)
    ∂L/∂Q = c (∂L/∂S) K,   ∂L/∂K = c (∂L/∂S)ᵀ Q      (n, head_dim); the latter summed over the group

Some families cap the scores softly [arXiv:2408.00118, §2]: S = κ tanh(c Q Kᵀ / κ) + M. Then (1 - tanh²) ⊙ ∂L/∂S
replaces ∂L/∂S in ∂L/∂Q and ∂L/∂K, as derived in `attention_blocks`.

Others have a sink σ per head [arXiv:2309.17453, §3.3; as a learned number in gpt-oss]: an additional term e^σ in the
sum of the softmax, which belongs to a key without a value. Then
    P = exp(S - ℓ'),   ℓ' = log(e^σ + Σ_visible e^S),   dP = P ⊙ (dS - rowsum(P ⊙ dS))     with σ fixed
as before, since σ adds nothing to dℓ' = rowsum(P ⊙ dS). Every formula above therefore holds with this P, whose rows sum
to 1 - e^(σ - ℓ'), and with δ = rowsum(P ⊙ ∂L/∂P) = rowsum(G ⊙ O). Even a query that sees only its own key has a
gradient through it.

The kernel (native/attention.cpp) takes all documents at once, and uses the processor's pairwise products of bfloat16
where it has them. For short documents it saves neither O nor ℓ, since δ is a sum over P and ∂L/∂P. A caller that needs
O in the backward can have it recomputed from P V, which is one product in six (`can_recompute_output`). O and ℓ of long
documents are saved, since attention is most of their step. The backward then takes a few keys at a time, which stay in
the cache: P = exp(S - ℓ) and δ = rowsum(G ⊙ O) need no sums over all keys.

Torch's form also caps scores. It attends documents of similar length together (`document_groups`), by blocks of queries
(`attention_blocks`).

Saved: Q, K, V, O if it was kept, and ℓ of long documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import attention as kernels
from backhand.kernels.pieces import piece_size
from backhand.ops.attention_blocks import (
    AttentionBlocksGrads,
    AttentionBlocksSaved,
    Scores,
    attention_blocks_backward,
    attention_blocks_forward,
    visible_keys,
)
from backhand.ops.document_groups import (
    Group,
    SegmentRun,
    continued_end,
    gather_documents,
    gather_keys,
    groups,
    scatter_documents,
    scatter_key_grads,
    segments,
)

MOST_KEYS_RECOMPUTED = 1024
"""The number of visible keys up to which O and ℓ are recomputed. Beyond it, P V takes more than 3 % of a usual step."""


class AttentionSaved(NamedTuple):
    """q, output (tokens, heads, head_dim), output None if it was not kept; k, v (tokens, key/value heads, head_dim).

    logsumexp is ℓ, (heads, tokens), in the kernel's units, or None if it is recomputed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor | None
    runs: tuple[SegmentRun, ...]
    scores: Scores
    logsumexp: Tensor | None = None


class AttentionGrads(NamedTuple):
    """d_q, d_k, d_v in the shapes of q, k, v."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor


def can_recompute_output(
    q: Tensor, runs: tuple[SegmentRun, ...], window: int | None = None, cap: float | None = None
) -> bool:
    """Return True if `attention_backward` recomputes O of such queries at little cost, so that O need not be saved.

    The kernel does. In bfloat16, O is half as large and P V takes as long as in float32, so that O is saved.
    """
    return cap is None and q.dtype != torch.bfloat16 and kernels.applies(q) and not _sees_many_keys(runs, window)


def _sees_many_keys(runs: tuple[SegmentRun, ...], window: int | None) -> bool:
    """Return True if a query of the longest document sees more keys than `MOST_KEYS_RECOMPUTED`."""
    longest = max((run.length + sum(end - begin for begin, end in run.before) for run in runs), default=0)
    return (longest if window is None else min(longest, window)) > piece_size(MOST_KEYS_RECOMPUTED)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[SegmentRun, ...], scores: Scores, *, out: Tensor | None = None
) -> tuple[Tensor, AttentionSaved]:
    """Attend within each document.

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, key/value heads, head_dim); heads is a multiple of key/value heads.
        v: of k's shape.
        runs: the segments of all documents, covering all tokens; each follows the segments that it continues. In both
            directions no segment continues another.
        scores: c, the window, κ, σ and the direction.
        out: of q's shape and dtype, to receive the output, or None.

    Returns:
        output (tokens, heads, head_dim) in q's dtype, and the saved tensors.
    """
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    settings = scores.scaling, scores.window, scores.sinks, scores.causal
    logsumexp = None
    if scores.cap is None and kernels.applies(q) and _sees_many_keys(runs, scores.window):
        wide = torch.promote_types(q.dtype, torch.float32)
        logsumexp = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    compiled = scores.cap is None and kernels.attention(q, k, v, output, logsumexp, runs, *settings)
    if not compiled:
        for group in groups(runs, q):
            in_place = gather_documents(output, group) if group.places is None else None
            operands = gather_documents(q, group), gather_keys(k, group), gather_keys(v, group)
            attended, _ = attention_blocks_forward(*operands, scores, _hidden_padding(group, scores), out=in_place)
            if in_place is None:
                scatter_documents(attended, group, output)
    return output, AttentionSaved(q, k, v, output, runs, scores, logsumexp if compiled else None)


def attention_backward(
    d_y: Tensor, saved: AttentionSaved, *, out: Tensor | None = None, output_buffer: Tensor | None = None
) -> AttentionGrads:
    """Map d_y of shape (tokens, heads, head_dim) to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂O.
        out: (tokens, heads + 2 · key/value heads, head_dim) to receive [d_q | d_k | d_v]; or None.
        output_buffer: (tokens, heads, head_dim) to receive O, or None.
    """
    q, k, v, output, runs, scores, logsumexp = saved
    heads, kv_heads = q.shape[1], k.shape[1]
    if out is None:
        out = torch.empty(q.shape[0], heads + 2 * kv_heads, q.shape[2], dtype=q.dtype, device=q.device)
    grads = AttentionGrads(*out.split_with_sizes([heads, kv_heads, kv_heads], dim=1))
    settings = scores.scaling, scores.window, scores.sinks, scores.causal
    if output_buffer is not None and output is not None and logsumexp is not None:
        output_buffer.copy_(output)
        output_buffer = None
    if scores.cap is None and kernels.attention_gradients(
        d_y, q, k, v, grads, output, output_buffer, logsumexp, runs, *settings
    ):
        return grads
    if output_buffer is not None:
        if output is None:
            output, _ = attention_forward(q, k, v, runs, scores)
        output_buffer.copy_(output)
    # The gradients that segments add to those before them, rounded once at the end.
    wide, continued = torch.promote_types(q.dtype, torch.float32), continued_end(runs)
    shares_k, shares_v = (torch.zeros(continued, *k.shape[1:], dtype=wide, device=q.device) for _ in range(2))
    for group in groups(runs, q):
        in_place = None
        if group.places is None and group.keys is None:
            in_place = AttentionBlocksGrads(*(gather_documents(gradient, group) for gradient in grads))
        of_group = AttentionBlocksSaved(
            gather_documents(q, group),
            gather_keys(k, group),
            gather_keys(v, group),
            scores,
            _hidden_padding(group, scores),
        )
        results = attention_blocks_backward(gather_documents(d_y, group, zero_padding=True), of_group, out=in_place)
        if in_place is None:
            scatter_documents(results.d_q, group, grads.d_q)
            scatter_key_grads(results.d_k, group, grads.d_k, shares_k)
            scatter_key_grads(results.d_v, group, grads.d_v, shares_v)
    grads.d_k[:continued] += shares_k
    grads.d_v[:continued] += shares_v
    return grads


def _hidden_padding(group: Group, scores: Scores) -> Tensor | None:
    """Return the lengths of a group's documents, (documents,), or None if causality hides the padding."""
    return None if scores.causal else group.lengths


def attention_reference(q: Tensor, k: Tensor, v: Tensor, runs: tuple[SegmentRun, ...], scores: Scores) -> Tensor:
    """Compute the same output, segment by segment and head by head, with an explicit softmax over visible keys only."""
    scaling, _, cap, sinks, _ = scores
    documents = []
    group = q.shape[1] // k.shape[1]
    for (start, stop), before in segments(runs):
        seen = [*before, *range(start, stop)]
        visible = visible_keys(len(seen), scores, q.device)[len(before) :]
        heads = []
        for head in range(q.shape[1]):
            s = scaling * q[start:stop, head] @ k[seen, head // group].T
            if cap is not None:
                s = cap * (1 - 2 / (torch.exp(2 * s / cap) + 1))
            s = s.masked_fill(~visible, float("-inf"))
            weights = torch.softmax(s, dim=-1)
            if sinks is not None:
                weights = weights / (1 + torch.exp(sinks[head] - torch.logsumexp(s, dim=-1, keepdim=True)))
            heads.append(weights @ v[seen, head // group])
        documents.append(torch.stack(heads, dim=1))
    return torch.cat(documents) if documents else q * 0
