"""Attention as the mixer of a block: everything between [q k v] and the output projection, forward and backward.

    [q k v] = n₁ W_qkvᵀ                        output of the first group; with gates, each query is followed by its gate
    q, k ← rotated(norm(q)), rotated(norm(k))  norms in some families, rotation if the layer has a rotary embedding
    o = attention(q, k, v)                     within each document; with gates, o = σ(gate) ⊙ attention(q, k, v)

Backward is the same list in reverse order. All gradients are written into one ∂L/∂[q k v]:
    ∂L/∂(q, k, v) = (backward of attention applied to ∂L/∂o)                    (T, heads, head_dim)
    ∂L/∂[q k v] = [backward of the norm applied to (∂L/∂q, ∂L/∂k rotated back) | ∂L/∂v]      (T, q + 2k)

Without q/k norms, q and k are rotated in place, and [q k v] is saved as attention reads it. With q/k norms it is saved
before the norms, and q and k are recomputed from the inverse RMS of the norms. The output o is saved unless the
backward of attention recomputes it. ℓ is saved of long documents (`ops.attention`). Norms and gates are in
`nn.decoder.attention_extras`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.attention_extras import Parts, gate_backward, normed, normed_backward
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig, LayerConfig
from backhand.ops.attention import AttentionSaved, attention_backward, attention_forward, can_recompute_output
from backhand.ops.attention_blocks import Scores
from backhand.ops.document_groups import SegmentRun
from backhand.ops.glu import glu_forward
from backhand.ops.rotary import RotaryTable, rotary_backward, rotary_forward


class AttentionMixerSaved(NamedTuple):
    """Tensors that attention saves in addition to its input and output, for T tokens and H heads."""

    attended: Tensor | None  # (T, H, head_dim) with gates; None without, because it is then the output
    # of the q/k norms, if any: (T, H, 1) and (T, key/value heads, 1), or (T, 1) for norms over all heads
    inverse_rms: tuple[Tensor, Tensor] | None
    logsumexp: Tensor | None  # (H, T) of long documents; None if the backward of attention recomputes it


def attention_output(qkv: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, AttentionMixerSaved]:
    """Return o (T, q) for qkv (T, q + 2k) or (T, 2q + 2k), and the tensors saved in addition to both."""
    config = context.config
    q, k, v, inverse_rms = prepare_qkv(qkv, weights, context)
    buffer = context.scratch.take("attended", q.shape, q) if recomputes_output(qkv, context) else None
    output, saved = attention_forward(q, k, v, *attention_setting(weights, context), out=buffer)
    kept = AttentionMixerSaved(output if config.attention_gate else None, inverse_rms, saved.logsumexp)
    return gated_output(qkv, output, config), kept


def recomputes_output(x: Tensor, context: BlockContext) -> bool:
    """Return True if the backward of attention recomputes o for x's dtype and device and the documents' lengths.

    With gates, the output of attention before gating is saved instead.
    """
    config, runs = context.config, context.segment_runs
    return not config.attention_gate and can_recompute_output(x, runs, context.layer.window, config.attention_cap)


def recomputed_output(saved: MixerSaved, weights: BlockWeights, context: BlockContext) -> Tensor:
    """Recompute o of shape (T, q) outside the backward of attention."""
    q, k, v = attended_qkv(saved, weights, context)
    return attention_forward(q, k, v, *attention_setting(weights, context))[0].flatten(1)


def attention_setting(weights: BlockWeights, context: BlockContext) -> tuple[tuple[SegmentRun, ...], Scores]:
    """Return the arguments of attention after q, k and v."""
    return context.segment_runs, layer_scores(context.config, context.layer, weights)


def layer_scores(config: DecoderConfig, layer: LayerConfig, weights: BlockWeights) -> Scores:
    """Return the settings of a layer's attention scores."""
    return Scores(config.attention_scaling, layer.window, config.attention_cap, weights.sinks, config.causal)


def gated_output(qkv: Tensor, attended: Tensor, config: DecoderConfig) -> Tensor:
    """Return o of shape (T, q) for the output of attention, (T, H, head_dim).

    With gates, it is multiplied by their sigmoid.
    """
    if not config.attention_gate:
        return attended.flatten(1)
    return glu_forward(_parts(qkv, config).gate, attended, "sigmoid")[0].flatten(1)


def _parts(qkv: Tensor, config: DecoderConfig) -> Parts:
    """Return views of the heads in qkv of shape (T, q + 2k). With gates, the gate of each head follows its query."""
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    by_head = _by_head(qkv, config)
    if not config.attention_gate:
        q, k, v = by_head.split_with_sizes([heads, kv_heads, kv_heads], dim=1)
        return Parts(q, q, k, v)
    queries, k, v = by_head.split_with_sizes([2 * heads, kv_heads, kv_heads], dim=1)
    return Parts(queries[:, ::2], queries[:, 1::2], k, v)


def _by_head(x: Tensor, config: DecoderConfig) -> Tensor:
    """Return a view of x of shape (T, heads · head_dim) as (T, heads, head_dim)."""
    return x.view(x.shape[0], x.shape[1] // config.head_dim, config.head_dim)


def prepare_qkv(
    qkv: Tensor, weights: BlockWeights, context: BlockContext, saved_inverse_rms: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return q, k and v as attention reads them, (T, heads, head_dim) each, and the inverse RMS of the q/k norms.

    q and k are normalized and rotated if the layer does so. Without q/k norms they are rotated in place. qkv then
    contains the rotated values, and the inverse RMS is None. With q/k norms qkv is not modified.

    Args:
        qkv: (T, q + 2k).
        saved_inverse_rms: returned by an earlier call; it is then not recomputed.
    """
    config = context.config
    parts = _parts(qkv, config)
    if weights.q_norm is None or weights.k_norm is None:
        for part, table in _rotated_parts(_by_head(qkv, config), context):
            rotary_forward(part, table, out=part)
        return parts.q, parts.k, parts.v, None
    q, k, inverse_rms = normed(qkv, parts, weights, config, saved_inverse_rms)
    if context.rotary is not None:
        rotary_forward(q, context.query_rotary or context.rotary, out=q)
        rotary_forward(k, context.rotary, out=k)
    return q, k, parts.v, inverse_rms


def _rotated_parts(by_head: Tensor, context: BlockContext) -> list[tuple[Tensor, RotaryTable]]:
    """Return views of q and k with their angles; by_head is (T, H + 2 key/value heads, head_dim).

    One view covers both if they have the same angles.
    """
    heads, rotated = context.config.num_heads, context.config.num_heads + context.config.num_key_value_heads
    if context.rotary is None:
        return []
    if context.query_rotary is None:
        return [(by_head[:, :rotated], context.rotary)]
    return [(by_head[:, :heads], context.query_rotary), (by_head[:, heads:rotated], context.rotary)]


def attended_qkv(saved: MixerSaved, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as attention reads them, (T, heads, head_dim), from the saved tensors."""
    if saved.inner.inverse_rms is not None:
        return prepare_qkv(saved.projected, weights, context, saved.inner.inverse_rms)[:3]
    q, _, k, v = _parts(saved.projected, context.config)
    return q, k, v


def attention_input_gradient(
    d_output: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    output: Tensor | None,
) -> Tensor:
    """Return ∂L/∂[q k v] of shape (T, q + 2k): through attention, then back through rotation and q/k norms.

    Args:
        d_output: ∂L/∂o, (T, q).
        output: o if it is saved, else a buffer (T, q) that receives the recomputed o, or None.
    """
    config, inner = context.config, saved.inner
    d_qkv, d_attended = torch.empty_like(saved.projected), _by_head(d_output, config)
    if inner.attended is None:
        attended, d_by_head = None if saved.mixed is None else _by_head(saved.mixed, config), _by_head(d_qkv, config)
    else:
        parts, d_parts, attended = _parts(saved.projected, config), _parts(d_qkv, config), inner.attended
        d_attended, d_by_head = gate_backward(d_attended, parts.gate, attended, d_parts.gate, config)
    q, k, v = attended_qkv(saved, weights, context)
    attention = AttentionSaved(q, k, v, attended, *attention_setting(weights, context), inner.logsumexp)
    buffer = None if output is None or saved.mixed is not None else _by_head(output, config)
    attention_backward(d_attended, attention, out=d_by_head, output_buffer=buffer)
    for part, table in _rotated_parts(d_by_head, context):
        rotary_backward(part, table, out=part)
    if inner.inverse_rms is not None:
        both, apart = (
            (_parts(saved.projected, config), _parts(d_qkv, config)),
            None if inner.attended is None else d_by_head,
        )
        normed_backward(apart, saved.projected, d_qkv, both, inner.inverse_rms, weights, adapter, config)
    return d_qkv


ATTENTION_MIXER = Mixer(
    attention_output,
    attention_input_gradient,
    qkv=prepare_qkv,
    recomputes_output=recomputes_output,
    output=recomputed_output,
)
