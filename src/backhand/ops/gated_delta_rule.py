"""The gated delta rule, a linear attention whose state forgets and corrects itself, in chunks.

For each value head, with a state S (key width, value width) that is zero before a document's first token
[arXiv:2412.06464, eq. 10]:
    S_t = α_t S_{t-1} + k_t u_tᵀ,   u_t = β_t (v_t - α_t S_{t-1}ᵀ k_t),   o_t = S_tᵀ q_t,   α_t = e^{g_t}
so that u_t corrects what the decayed state says of v_t. A key head serves neighbouring value heads.

In chunks. Let a chunk of n tokens begin with the state S, let c_i = g_1 + … + g_i in it, and stack its tokens in the
rows of Q, K, V, U. Unrolled, the state behind token i is e^{c_i} S + Σ_{j≤i} e^{c_i - c_j} k_j u_jᵀ. So with
    D_ij = e^{c_i - c_j} for j ≤ i, else 0,   L = (D ⊙ K Kᵀ) below the diagonal,   P = D ⊙ Q Kᵀ
    R = V - e^c ⊙ (K S),   Y = R - L U,   U = β ⊙ Y,   hence   (I + L diag β) Y = R,   Y = T R
    O = e^c ⊙ (Q S) + P U,   S' = e^{c_n} S + Kᵀ Û,   Û = e^{c_n - c} ⊙ U
where T = (I + L diag β)⁻¹ is unit lower triangular: products of matrices do all but the inverse of an n × n triangle.

Backward of a chunk, from G = ∂L/∂O and S̄ = ∂L/∂S' (zero behind the last chunk). With dP etc. for ∂L/∂P etc.:
    W = Pᵀ G + e^{c_n - c} ⊙ (K S̄) is what U gets from O and S'. It gets -Lᵀ dY from Y too, so that
    dU = W - Lᵀ dY and dY = β ⊙ dU,   hence   (I + L diag β)ᵀ dY = β ⊙ W,   dY = Tᵀ (β ⊙ W)
    dV = dR = dY,   dP = G Uᵀ,   dL = -dY Uᵀ = N diag β,   N = -dY Yᵀ
    dβ = rowsum(dU ⊙ Y) = rowsum(W ⊙ Y) + colsum(L ⊙ N),   for (Lᵀ dY)_i · Y_i = Σ_j L_ji dY_j · Y_i
    dS = Qᵀ (e^c ⊙ G) - Kᵀ (e^c ⊙ dR) + e^{c_n} S̄,    which is S̄ of the chunk before
    dQ = (D ⊙ dP) K + (e^c ⊙ G) Sᵀ
    dK = (D ⊙ dP)ᵀ Q + (D ⊙ dL + (D ⊙ dL)ᵀ) K - (e^c ⊙ dR) Sᵀ + Û S̄ᵀ
each summed over the value heads of a key head. The decays stand in exponents, each a sum of some g: the gradient of
such a sum is the product of what it multiplies and that one's gradient, and dg_i collects the sums that g_i is in. With
E = P ⊙ dP + L ⊙ dL and F = rowsum(Q ⊙ (e^c ⊙ G) Sᵀ) - rowsum(K ⊙ (e^c ⊙ dR) Sᵀ), H = rowsum(Û ⊙ (K S̄))
    dg_i = Σ_{a ≥ i > b} E_ab + Σ_{a ≥ i} F_a + Σ_{b < i} H_b + e^{c_n} ⟨S, S̄⟩
where the first sum is Σ_{a ≥ i} (rowsum(E) - colsum(E))_a: a difference in which all but what it means cancels, and
exactly so only where sums are exact. They are taken in float64.

Documents never meet: each begins with a zero state. A segment that others continue (`document_groups`) hands its last
state to all of them, and its S̄ is the sum over them.

Saved: the inputs. Backward runs the chunks forward again and keeps, until it is through, the state before each chunk, a
state in `chunk` tokens and never one a token. All in float32 or wider.

Torch's form of this is `delta_chunks`. The kernels (native/gated_delta_rule.cpp) take a head of a document at a
time, whose matrices stay in the caches, solve the triangular systems without an inverse, and keep Y beside the states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.kernels.library import INT, INT64, POINTER, KernelSignature, find_kernel, segment_table
from backhand.ops.delta_chunks import backward_in_chunks, forward_in_chunks
from backhand.ops.delta_steps import CHUNK_TOKENS, GatedDeltaRuleGrads, GatedDeltaRuleSaved
from backhand.ops.document_groups import Run, segments

_INPUTS = (POINTER, POINTER, POINTER)
_OUTPUT = (POINTER, INT64, INT64)
_WHERE = (POINTER, INT64, POINTER, INT64)
_FORWARD = KernelSignature("backhand_gated_delta_rule_forward", INT, *_INPUTS, *_OUTPUT, POINTER, *_WHERE)
_BACKWARD = KernelSignature("backhand_gated_delta_rule_backward", INT, *_INPUTS, *_OUTPUT, POINTER, POINTER, *_WHERE)
_MEMORY = KernelSignature("backhand_gated_delta_rule_memory", INT, INT, POINTER, POINTER, INT64, result=INT64)


def gated_delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    runs: tuple[Run, ...],
    *,
    states: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, GatedDeltaRuleSaved]:
    """Read and correct each document's state token by token, computed in chunks.

    Args:
        q: (tokens, key heads, key width), normalised and scaled as the family does.
        k: of q's shape, of norm 1 or less where β may be 1.
        v: (tokens, value heads, value width); value heads is a multiple of key heads.
        decay: g ≤ 0, (tokens, value heads).
        beta: β, (tokens, value heads).
        runs: the segments of all documents, covering all tokens, each behind those it continues.
        states: (documents, value heads, key width, value width), float32 or wider: the states before the first token of
            each document, overwritten by those behind the last one; for generation, where none continues another. None
            begins with zeros and forgets the end.
        chunk: tokens of a chunk.

    Returns:
        o (tokens, value heads, value width) in v's dtype, and what backward needs.
    """
    if states is not None and any(run.before for run in runs):
        raise ValueError("a segment that continues another begins with no state of its own")
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    saved = GatedDeltaRuleSaved(q, k, v, decay, beta, runs, chunk)
    if not _compiled_forward(saved, states, out):
        forward_in_chunks(saved, states, out)
    return out, saved


def gated_delta_rule_backward(d_y: Tensor, saved: GatedDeltaRuleSaved) -> GatedDeltaRuleGrads:
    """Map d_y, (tokens, value heads, value width), to the gradients derived in the module docstring."""
    compiled = _compiled_backward(d_y, saved)
    if compiled is not None:
        return compiled
    grads = GatedDeltaRuleGrads(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved[:5]))
    backward_in_chunks(d_y, saved, grads)
    return grads


def _compiled_forward(saved: GatedDeltaRuleSaved, states: Tensor | None, out: Tensor) -> bool:
    """Whether the kernel applied; `out` is then filled, and `states` have gone on."""
    kernel, inputs = find_kernel(_FORWARD, saved.v, saved.beta, out), _for_loops(saved)
    if kernel is None or inputs is None:
        return False
    if states is not None and not (states.is_contiguous() and states.dtype == inputs[0].dtype):
        return False
    problem = _problem(saved, inputs[0].dtype, backward=False)
    begin = None if states is None else states.data_ptr()
    kernel(problem.sizes, *_places(inputs), out.data_ptr(), *out.stride()[:2], begin, *problem.where)
    return True


def _compiled_backward(d_y: Tensor, saved: GatedDeltaRuleSaved) -> GatedDeltaRuleGrads | None:
    """The gradients by the kernel, or None where it does not apply."""
    kernel, inputs = find_kernel(_BACKWARD, d_y, saved.v, saved.beta), _for_loops(saved)
    if kernel is None or inputs is None:
        return None
    found = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
    problem = _problem(saved, inputs[0].dtype, backward=True)
    kernel(problem.sizes, *_places(inputs), d_y.data_ptr(), *d_y.stride()[:2], *_places(found), *problem.where)
    return GatedDeltaRuleGrads(*(x.to(given.dtype) for x, given in zip(found, saved[:5], strict=True)))


def _for_loops(saved: GatedDeltaRuleSaved) -> list[Tensor] | None:
    """q, k, v, decay and beta as the kernels take them: q, k and decay in float32 or wider; None if they do not."""
    q, k, v, decay, beta = saved[:5]
    wide = torch.promote_types(v.dtype, torch.float32)
    if find_kernel(_FORWARD, q, k, decay) is None or q.dtype not in (v.dtype, wide) or v.shape[1] % max(k.shape[1], 1):
        return None
    return [q.to(wide), k.to(wide), v, decay.to(wide), beta]


def _places(tensors: list[Tensor]) -> tuple[Any, Any]:
    """Addresses, and distances of tokens and heads, of (tokens, heads, …) each."""
    distances = [distance for x in tensors for distance in x.stride()[:2]]
    return ((POINTER * len(tensors))(*(x.data_ptr() for x in tensors)), (INT64 * len(distances))(*distances))


class _Problem(NamedTuple):
    """Sizes, what the kernels take behind the tensors, and their workspace, to be held until they are done."""

    sizes: Any
    where: tuple[int, ...]
    memory: Tensor


def _problem(saved: GatedDeltaRuleSaved, wide: torch.dtype, *, backward: bool) -> _Problem:
    """The segments, and as much memory as the kernels need for them."""
    k, v, table = saved.k, saved.v, segment_table(saved.runs)
    longest = max((run.length for run in saved.runs), default=0)
    group, chunk = v.shape[1] // max(k.shape[1], 1), max(1, min(saved.chunk, longest))
    sizes = (INT64 * 5)(k.shape[1], group, k.shape[2], v.shape[2], chunk)
    memory_of = not_none(find_kernel(_MEMORY, v))
    workers = max(1, min(torch.get_num_threads(), k.shape[1] * int((table[2] < 0).sum())))
    memory = torch.empty(workers * memory_of(backward, sizes, table.data_ptr(), table.shape[1]), dtype=wide)
    where = (table.data_ptr(), table.shape[1], memory.data_ptr(), workers)
    return _Problem(sizes, where, memory)


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, runs: tuple[Run, ...]
) -> Tensor:
    """The same o by the recurrence, token by token, in float32 or wider."""
    wide = torch.promote_types(v.dtype, torch.float32)
    group = v.shape[1] // k.shape[1]
    q, k = (x.to(wide).repeat_interleave(group, dim=1) for x in (q, k))
    behind = {-1: torch.zeros(*k.shape[1:], v.shape[2], dtype=wide, device=v.device)}  # by the last token
    outputs = [v.to(wide)[:0]]
    # Apart, since the gradient of indexing a tensor is as large as the tensor, for each token.
    q_t, k_t, v_t, retained, rates = (x.unbind() for x in (q, k, v.to(wide), decay.to(wide).exp(), beta.to(wide)))
    for (start, stop), before in segments(runs):
        state = behind[before[-1] if before else -1]
        for t in range(start, stop):
            state = state * retained[t][:, None, None]
            predicted = torch.einsum("hkv,hk->hv", state, k_t[t])
            state = state + torch.einsum("hk,hv->hkv", k_t[t], rates[t][:, None] * (v_t[t] - predicted))
            outputs.append(torch.einsum("hkv,hk->hv", state, q_t[t])[None])
        behind[stop - 1] = state
    return torch.cat(outputs).to(v.dtype)
