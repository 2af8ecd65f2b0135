"""The gated delta rule in chunks: a linear attention whose state decays and is corrected by each token.

For each value head, with a state S (key width, value width) that is zero before a document's first token
[arXiv:2412.06464, eq. 10]:
    S_t = α_t S_{t-1} + k_t u_tᵀ,   u_t = β_t (v_t - α_t S_{t-1}ᵀ k_t),   o_t = S_tᵀ q_t,   α_t = e^{g_t}
so that u_t corrects what the decayed state predicts for v_t. A key head serves neighbouring value heads.

In chunks. Let a chunk of n tokens start from the state S, let c_i = g_1 + … + g_i within it, and let the rows of Q, K,
V, U be its tokens. Unrolled, the state after token i is e^{c_i} S + Σ_{j≤i} e^{c_i - c_j} k_j u_jᵀ. So with
    D_ij = e^{c_i - c_j} for j ≤ i, else 0,   L = (D ⊙ K Kᵀ) below the diagonal,   P = D ⊙ Q Kᵀ
    R = V - e^c ⊙ (K S),   Y = R - L U,   U = β ⊙ Y,   hence   (I + L diag β) Y = R,   Y = T R
    O = e^c ⊙ (Q S) + P U,   S' = e^{c_n} S + Kᵀ Û,   Û = e^{c_n - c} ⊙ U
where T = (I + L diag β)⁻¹ is unit lower triangular. Everything is a product of matrices except the inverse of an n × n
triangle.

Backward of a chunk, from G = ∂L/∂O and S̄ = ∂L/∂S' (zero after the last chunk). Writing dP etc. for ∂L/∂P etc.:
    W = Pᵀ G + e^{c_n - c} ⊙ (K S̄) is the gradient of U through O and S'. Y contributes -Lᵀ dY, so that
    dU = W - Lᵀ dY and dY = β ⊙ dU,   hence   (I + L diag β)ᵀ dY = β ⊙ W,   dY = Tᵀ (β ⊙ W)
    dV = dR = dY,   dP = G Uᵀ,   dL = -dY Uᵀ = N diag β,   N = -dY Yᵀ
    dβ = rowsum(dU ⊙ Y) = rowsum(W ⊙ Y) + colsum(L ⊙ N),   for (Lᵀ dY)_i · Y_i = Σ_j L_ji dY_j · Y_i
    dS = Qᵀ (e^c ⊙ G) - Kᵀ (e^c ⊙ dR) + e^{c_n} S̄,    which is S̄ of the chunk before
    dQ = (D ⊙ dP) K + (e^c ⊙ G) Sᵀ
    dK = (D ⊙ dP)ᵀ Q + (D ⊙ dL + (D ⊙ dL)ᵀ) K - (e^c ⊙ dR) Sᵀ + Û S̄ᵀ
where dQ and dK are summed over the value heads of a key head. The decays occur in exponents, each a sum of some g. The
gradient of such an exponent is the product of the factor e^… and the gradient of that factor, and dg_i sums over the
exponents that contain g_i. With
E = P ⊙ dP + L ⊙ dL and F = rowsum(Q ⊙ (e^c ⊙ G) Sᵀ) - rowsum(K ⊙ (e^c ⊙ dR) Sᵀ), H = rowsum(Û ⊙ (K S̄))
    dg_i = Σ_{a ≥ i > b} E_ab + Σ_{a ≥ i} F_a + Σ_{b < i} H_b + e^{c_n} ⟨S, S̄⟩
where the first sum is Σ_{a ≥ i} (rowsum(E) - colsum(E))_a. In this difference all other terms cancel, but exactly only
if the sums are exact, so they are computed in float64.

Each document starts from a zero state. A segment that others continue (`document_groups`) passes its last state to all
of them, and its S̄ is the sum over them.

Saved: the inputs. The backward runs the chunks forward again and saves the state before each chunk until it is done:
one state per `chunk` tokens, never one per token. Everything is computed in float32 or wider.

Torch's form is `delta_chunks`. The kernels (native/gated_delta_rule.cpp) take one head of one document at a time, whose
matrices stay in the caches. They solve the triangular systems without an inverse, and save Y in addition to the states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.kernels import gated_delta_rule as kernels
from backhand.ops.chunk_steps import CHUNK_TOKENS
from backhand.ops.delta_chunks import (
    GatedDeltaRuleGrads,
    GatedDeltaRuleSaved,
    backward_in_chunks,
    forward_in_chunks,
)
from backhand.ops.document_groups import SegmentRun, segments


def gated_delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    runs: tuple[SegmentRun, ...],
    *,
    states: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, GatedDeltaRuleSaved]:
    """Read and correct each document's state token by token, computed in chunks.

    Args:
        q: (tokens, key heads, key width), normalised and scaled by the family's rule.
        k: of q's shape, with norms of at most 1 if β may be 1.
        v: (tokens, value heads, value width); value heads is a multiple of key heads.
        decay: g ≤ 0, (tokens, value heads).
        beta: β, (tokens, value heads).
        runs: the segments of all documents, covering all tokens; each follows the segments that it continues.
        states: for generation, the states before the first token of each document, (documents, value heads, key width,
            value width), float32 or wider. They are overwritten by the states after the last token. No segment may
            continue another. None starts from zeros and discards the last states.
        chunk: tokens per chunk.

    Returns:
        o (tokens, value heads, value width) in v's dtype, and the saved tensors.
    """
    if states is not None and any(run.before for run in runs):
        raise ValueError("a segment that continues another begins with no state of its own")
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    saved = GatedDeltaRuleSaved(q, k, v, decay, beta, runs, chunk)
    if not kernels.gated_delta_rule(*saved, states, out):
        forward_in_chunks(saved, states, out)
    return out, saved


def gated_delta_rule_backward(d_y: Tensor, saved: GatedDeltaRuleSaved) -> GatedDeltaRuleGrads:
    """Map d_y of shape (tokens, value heads, value width) to the gradients derived in the module docstring."""
    compiled = kernels.gated_delta_rule_gradients(d_y, *saved)
    if compiled is not None:
        return GatedDeltaRuleGrads(*compiled)
    grads = GatedDeltaRuleGrads(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved[:5]))
    backward_in_chunks(d_y, saved, grads)
    return grads


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, runs: tuple[SegmentRun, ...]
) -> Tensor:
    """Compute the same o by the recurrence, token by token, in float32 or wider."""
    wide = torch.promote_types(v.dtype, torch.float32)
    group = v.shape[1] // k.shape[1]
    q, k = (x.to(wide).repeat_interleave(group, dim=1) for x in (q, k))
    state_after = {
        -1: torch.zeros(*k.shape[1:], v.shape[2], dtype=wide, device=v.device)
    }  # by the last token of a segment
    outputs = [v.to(wide)[:0]]
    # Unbound, since the gradient of each indexing would be as large as the tensor.
    q_t, k_t, v_t, retained, rates = (x.unbind() for x in (q, k, v.to(wide), decay.to(wide).exp(), beta.to(wide)))
    for (start, stop), before in segments(runs):
        state = state_after[before[-1] if before else -1]
        for t in range(start, stop):
            state = state * retained[t][:, None, None]
            predicted = torch.einsum("hkv,hk->hv", state, k_t[t])
            state = state + torch.einsum("hk,hv->hkv", k_t[t], rates[t][:, None] * (v_t[t] - predicted))
            outputs.append(torch.einsum("hkv,hk->hv", state, q_t[t])[None])
        state_after[stop - 1] = state
    return torch.cat(outputs).to(v.dtype)
