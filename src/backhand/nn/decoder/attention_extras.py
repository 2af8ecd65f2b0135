"""Norms of queries and keys, and gates on the output of attention, for the families that have them.

    q = norm(z_q),   k = norm(z_k)          before the rotation, over each head or over all heads at once
    o = σ(z_gate) ⊙ attention(q, k, v)      each head's query is followed by its gate

Plain families (Llama, Mistral, Qwen2) do not use this file. Backward applies the op backwards in reverse order, gates
first. The outputs of the projections interleave queries and gates, and so do their gradients. The gradient of attention
is therefore computed in a separate buffer and copied through the norms into place. Families with gates also have norms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig
from backhand.ops.glu import GLUSaved, glu_backward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_forward


class Parts(NamedTuple):
    """Views of the first group's output, (T, heads, head_dim) each. Without gates, `gate` is q."""

    q: Tensor
    gate: Tensor
    k: Tensor
    v: Tensor


def normed(
    qkv: Tensor, parts: Parts, weights: BlockWeights, config: DecoderConfig, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return normalized copies of q and k (T, heads, head_dim) and the inverse RMS of both, (T, heads, 1) or (T, 1).

    Args:
        qkv: output of the first group, (T, q + 2k) or (T, 2q + 2k).
        known: the inverse RMS of both, if they are saved.
    """
    q_norm, k_norm = not_none(weights.q_norm), not_none(weights.k_norm)
    raw_q, raw_k = _norm_inputs(qkv, parts, config)
    if known is None:
        q, q_saved = rms_norm_forward(raw_q, q_norm, config.norm_eps, config.norm_offset)
        k, k_saved = rms_norm_forward(raw_k, k_norm, config.norm_eps, config.norm_offset)
        known = (q_saved.inverse_rms, k_saved.inverse_rms)
    else:
        q = rms_norm_apply(raw_q, q_norm, known[0], config.norm_offset)
        k = rms_norm_apply(raw_k, k_norm, known[1], config.norm_offset)
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    return q.view(-1, heads, config.head_dim), k.view(-1, kv_heads, config.head_dim), known


def normed_backward(
    d_by_head: Tensor | None,
    qkv: Tensor,
    d_qkv: Tensor,
    parts: tuple[Parts, Parts],
    inverse_rms: tuple[Tensor, Tensor],
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
) -> None:
    """Write ∂L/∂[q k v] of the projections' outputs into d_qkv, and add the gradients of trained norm weights.

    Args:
        d_by_head: ∂L/∂(q, k, v) of the norms' outputs, (T, H + 2 key/value heads, head_dim). None if d_qkv already
            contains it.
        qkv: as in `normed`.
        d_qkv: of qkv's shape.
        inverse_rms: from `normed`.
    """
    (raw_q, raw_k), (d_q, d_k) = _norm_inputs(qkv, parts[0], config), _norm_inputs(d_qkv, parts[1], config)
    d_normed_q, d_normed_k = d_q, d_k
    if d_by_head is not None:
        heads, kv_heads = config.num_heads, config.num_key_value_heads
        d_normed_q, d_normed_k, d_v = d_by_head.split([heads, kv_heads, kv_heads], dim=1)
        parts[1].v.copy_(d_v)
    for name, raw, saved_rms, weight, d_normed, d_raw in (
        (config.qk_norms[0], raw_q, inverse_rms[0], weights.q_norm, d_normed_q, d_q),
        (config.qk_norms[1], raw_k, inverse_rms[1], weights.k_norm, d_normed_k, d_k),
    ):
        norm = RMSNormSaved(raw, not_none(weight), saved_rms, config.norm_offset)
        d_raw.copy_(norm_backward(d_normed, norm, adapter.d_norms.get(name)))


def gate_backward(
    d_gated: Tensor, gate: Tensor, attended: Tensor, d_gate: Tensor, config: DecoderConfig
) -> tuple[Tensor, Tensor]:
    """Return ∂L/∂(output of attention), (T, H, head_dim), and an empty buffer for the gradients of q, k and v.

    Args:
        d_gated: ∂L/∂o. This and all following arguments are (T, H, head_dim).
        gate: before the sigmoid.
        attended: output of attention.
        d_gate: receives ∂L/∂gate.
    """
    gate_grad, d_attended = glu_backward(d_gated, GLUSaved(gate, attended, "sigmoid"))
    d_gate.copy_(gate_grad)
    heads = config.num_heads + 2 * config.num_key_value_heads
    return d_attended, torch.empty(len(gate), heads, config.head_dim, dtype=gate.dtype, device=gate.device)


def _norm_inputs(qkv: Tensor, parts: Parts, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Return views of q and k in the shape of their norms: (T, heads, head_dim), or (T, q) and (T, k)."""
    if config.qk_norm == "width":
        queries = config.num_heads * config.head_dim
        return qkv[:, :queries], qkv[:, queries : queries + config.num_key_value_heads * config.head_dim]
    return parts.q, parts.k
