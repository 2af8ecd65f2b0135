"""Causal grouped-query attention over packed documents.

For one document of n tokens and one query head (which shares its key/value head with its group):
    S = c Q Kᵀ + M,   P = softmax_rows(S) = exp(S - ℓ),   O = P V      [arXiv:1706.03762, eq. 1; 2305.13245 for groups]
with c the attention scaling, M = 0 where the key is visible (not after the query, and within the window) and -∞
elsewhere, and ℓ = logsumexp_rows(S). Documents are separate problems: no query sees a key of another document.

Documents that begin with the same tokens have the same hidden states there, since attention is causal. Such a common
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

The kernel (native/attention.cpp) takes all documents at once, saves no ℓ, and uses the processor's pairwise products of
bfloat16 where it has them. Its backward does not need O, since δ is a sum over P and ∂L/∂P. A caller that needs O there
can have it recomputed from P V, which is one product in six, and need not save it (`can_recompute_output`). Torch's
form (`attention_groups`) attends documents of similar length together.

Saved: Q, K, V, O if it was kept, and ℓ (one float32 per token and head) of what torch's kernels attended.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, KernelSignature, find_kernel, segment_table
from backhand.ops.attention_blocks import Scores
from backhand.ops.attention_groups import grouped_backward, grouped_forward
from backhand.ops.document_groups import Run, segments

_HEADS = (POINTER, INT64, INT64)
_PROBLEM = (POINTER, *(INT64,) * 5, DOUBLE, POINTER)
_FORWARD = KernelSignature("backhand_attention_forward", INT, *_HEADS * 4, *_PROBLEM, result=INT)
_BACKWARD = KernelSignature("backhand_attention_backward", INT, *_HEADS * 8, *_PROBLEM, result=INT)
_NOWHERE = (0, 0, 0)


class AttentionSaved(NamedTuple):
    """q, output (tokens, heads, head_dim); k, v (tokens, key/value heads, head_dim); log_sum_exp (≤ tokens · heads,).

    log_sum_exp is float32 or wider, for what torch's kernels attended, in their order (documents, heads, tokens). If O
    was not kept, output is None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor | None
    log_sum_exp: Tensor
    runs: tuple[Run, ...]
    scores: Scores


class AttentionGrads(NamedTuple):
    """d_q, d_k, d_v in the shapes of q, k, v."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor


def can_recompute_output(q: Tensor, cap: float | None = None) -> bool:
    """Return True if `attention_backward` recomputes O of such queries at little cost, so that O need not be saved.

    That is so in the kernel. In bfloat16, where O is half as large and P V takes as long as in float32, it is
    kept.
    """
    return cap is None and q.dtype != torch.bfloat16 and find_kernel(_BACKWARD, q) is not None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scores: Scores, *, out: Tensor | None = None
) -> tuple[Tensor, AttentionSaved]:
    """Attend within each document.

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, key/value heads, head_dim); heads is a multiple of key/value heads.
        v: of k's shape.
        runs: the segments of all documents, covering all tokens; each follows the segments that it continues.
        scores: c, the window, κ and σ.
        out: of q's shape and dtype, to receive the output, or None.

    Returns:
        output (tokens, heads, head_dim) in q's dtype, and the saved tensors.
    """
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    kernel = find_kernel(_FORWARD, q, k, v) if scores.cap is None else None
    if kernel is None:
        log_sum_exp = grouped_forward((q, k, v), runs, scores, output)
        return output, AttentionSaved(q, k, v, output, log_sum_exp, runs, scores)
    saved = AttentionSaved(q, k, v, output, torch.empty(0, dtype=torch.float32), runs, scores)
    problem, _held = _problem(saved)
    _check(kernel(*_heads(q, k, v, output), *problem))
    return output, saved


def attention_backward(
    d_y: Tensor, saved: AttentionSaved, *, out: Tensor | None = None, output_buffer: Tensor | None = None
) -> AttentionGrads:
    """Map d_y, (tokens, heads, head_dim), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂O.
        out: (tokens, heads + 2 · key/value heads, head_dim) to receive [d_q | d_k | d_v] side by side, or None.
        output_buffer: (tokens, heads, head_dim) to receive O, or None.
    """
    q, k, v, output, log_sum_exp, runs, scores = saved
    heads, kv_heads = q.shape[1], k.shape[1]
    if out is None:
        out = torch.empty(q.shape[0], heads + 2 * kv_heads, q.shape[2], dtype=q.dtype, device=q.device)
    grads = AttentionGrads(*out.split_with_sizes([heads, kv_heads, kv_heads], dim=1))
    kernel = find_kernel(_BACKWARD, q, k, v, d_y, out, output_buffer) if scores.cap is None else None
    if kernel is not None:
        output_place = _NOWHERE if output_buffer is None else _heads(output_buffer)
        problem, _held = _problem(saved)
        _check(kernel(*_heads(q, k, v, d_y, *grads), *output_place, *problem))
        return grads
    if output_buffer is not None:
        if output is None:
            output, _ = attention_forward(q, k, v, runs, scores)
        output_buffer.copy_(output)
    grouped_backward(d_y, (q, k, v), (output, log_sum_exp), runs, scores, grads)
    return grads


def _heads(*tensors: Tensor) -> list[int]:
    """Return the address, token stride and head stride of each tensor (tokens, heads, head_dim)."""
    return [number for x in tensors for number in (x.data_ptr(), x.stride(0), x.stride(1))]


def _problem(saved: AttentionSaved) -> tuple[tuple[float | None, ...], Tensor | None]:
    """Return the kernels' arguments after the tensors, and the sinks, which must live until the call returns.

    Without a window, the window reaches further than any document.
    """
    q, k, table, (scaling, window, _, sinks) = saved.q, saved.k, segment_table(saved.runs), saved.scores
    reach = q.shape[0] + 1 if window is None else window
    sinks = None if sinks is None else sinks.to(torch.float64).contiguous()
    sizes = (table.shape[1], q.shape[1], k.shape[1], q.shape[2], reach, scaling)
    return (table.data_ptr(), *sizes, None if sinks is None else sinks.data_ptr()), sinks


def _check(outcome: int) -> None:
    if outcome:
        raise MemoryError("no memory for one document's attention")


def attention_reference(q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], scores: Scores) -> Tensor:
    """Compute the same output, segment by segment and head by head, with an explicit softmax over visible keys only."""
    scaling, window, cap, sinks = scores
    documents = []
    group = q.shape[1] // k.shape[1]
    for (start, stop), before in segments(runs):
        seen = [*before, *range(start, stop)]
        visible = torch.ones(len(seen), len(seen), dtype=torch.bool, device=q.device).tril()
        if window is not None:
            visible = visible & ~visible.tril(-window)
        visible = visible[len(before) :]
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
