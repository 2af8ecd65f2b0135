"""Attention as a block's mixer, between its two projections, forward and backward by hand.

    [q k v] = n₁ W_qkvᵀ                        what the first group gave; with gates, one beside each query
    q, k ← rotated(norm(q)), rotated(norm(k))  norms in some families, rotation where the layer does
    o = attention(q, k, v)                     within each document; σ(gate) ⊙ that where there are gates

Backward is the same list from the bottom up, each line by its op's backward, into one ∂L/∂[q k v]:
    ∂L/∂(q, k, v) = (attention's backward of ∂L/∂o)                             (T, heads, head_dim)
    ∂L/∂[q k v] = [norm's backward of (∂L/∂q, ∂L/∂k rotated back) | ∂L/∂v]      (T, q + 2k)

Without q/k norms the rotation happens in place: [q k v] is kept as attention saw it. With them it is kept as it was
before, and q and k are recomputed from the norms' factors. o is kept where attention's backward does not recompute it
(`ops.attention`). Norms and gates themselves are `nn.decoder.attention_extras`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.attention_extras import Parts, gate_backward, normed, normed_backward
from backhand.nn.decoder.family import DecoderConfig, LayerConfig
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.attention import AttentionSaved, attention_backward, attention_forward, can_recompute_output
from backhand.ops.attention_blocks import Scores
from backhand.ops.document_groups import Run
from backhand.ops.glu import glu_forward
from backhand.ops.rotary import RotaryTable, rotary_backward, rotary_forward


class AttentionMixerSaved(NamedTuple):
    """What attention keeps beside its input and output; T tokens, H heads."""

    attended: Tensor | None  # (T, H, head_dim), where a gate follows: else it is the output
    log_sum_exp: Tensor  # (≤ T · H,): of what torch's kernels attended, see `ops.attention`
    # of the q/k norms in families with them: (T, H, 1) and (T, key/value heads, 1); (T, 1) where they go over all heads
    factors: tuple[Tensor, Tensor] | None


def attention_output(qkv: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, AttentionMixerSaved]:
    """o, (T, q), from qkv, (T, q + 2k) or (T, 2q + 2k), and what its backward needs beside both."""
    config = context.config
    q, k, v, factors = prepare_qkv(qkv, weights, context)
    place = context.scratch.take("attended", q.shape, q) if recomputes_output(qkv, config) else None
    output, attended = attention_forward(q, k, v, *attention_setting(weights, context), out=place)
    kept = AttentionMixerSaved(output if config.attention_gate else None, attended.log_sum_exp, factors)
    return gated_output(qkv, output, config), kept


def recomputes_output(x: Tensor, config: DecoderConfig) -> bool:
    """Whether the backward recomputes o, in x's dtype and place: gates need what attention gave before them."""
    return not config.attention_gate and can_recompute_output(x, config.attention_cap)


def output_by_itself(kept: MixerSaved, weights: BlockWeights, context: BlockContext) -> Tensor:
    """o, (T, q), where it is not kept, without the backward."""
    q, k, v = attended_qkv(kept, weights, context)
    return attention_forward(q, k, v, *attention_setting(weights, context))[0].flatten(1)


def attention_setting(weights: BlockWeights, context: BlockContext) -> tuple[tuple[Run, ...], Scores]:
    """What attention takes behind q, k and v."""
    return context.runs, layer_scores(context.config, context.layer, weights)


def layer_scores(config: DecoderConfig, layer: LayerConfig, weights: BlockWeights) -> Scores:
    """What decides a layer's scores beside queries and keys."""
    return Scores(config.attention_scaling, layer.window, config.attention_cap, weights.sinks)


def gated_output(qkv: Tensor, attended: Tensor, config: DecoderConfig) -> Tensor:
    """o, (T, q), from what attention gave, (T, H, head_dim): multiplied by the gates' sigmoid where there are any."""
    if not config.attention_gate:
        return attended.flatten(1)
    return glu_forward(_parts(qkv, config).gate, attended, "sigmoid")[0].flatten(1)


def _parts(qkv: Tensor, config: DecoderConfig) -> Parts:
    """The heads in qkv, (T, q + 2k); beside each head's query stands its gate, where the family has gates."""
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    by_head = _by_head(qkv, config)
    if not config.attention_gate:
        q, k, v = by_head.split_with_sizes([heads, kv_heads, kv_heads], dim=1)
        return Parts(q, q, k, v)
    queries, k, v = by_head.split_with_sizes([2 * heads, kv_heads, kv_heads], dim=1)
    return Parts(queries[:, ::2], queries[:, 1::2], k, v)


def _by_head(x: Tensor, config: DecoderConfig) -> Tensor:
    """A view of x, (T, heads of any kind · head_dim): (T, heads, head_dim)."""
    return x.view(x.shape[0], x.shape[1] // config.head_dim, config.head_dim)


def prepare_qkv(
    qkv: Tensor, weights: BlockWeights, context: BlockContext, kept_factors: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """q, k normed (where the family does) and rotated, and v, as (T, heads, head_dim), from qkv, (T, q + 2k).

    Behind them the factors of the q/k norms, None without; given as `kept_factors`, they are not computed again.

    Without a q/k norm the rotation happens in place: qkv then holds what attention saw. With one, qkv stays untouched.
    """
    config = context.config
    parts = _parts(qkv, config)
    if weights.q_norm is None or weights.k_norm is None:
        for part, table in _rotated_parts(_by_head(qkv, config), context):
            rotary_forward(part, table, out=part)
        return parts.q, parts.k, parts.v, None
    q, k, factors = normed(qkv, parts, weights, config, kept_factors)
    if context.rotary is not None:
        rotary_forward(q, context.query_rotary or context.rotary, out=q)
        rotary_forward(k, context.rotary, out=k)
    return q, k, parts.v, factors


def _rotated_parts(by_head: Tensor, context: BlockContext) -> list[tuple[Tensor, RotaryTable]]:
    """Views of q and k in (T, H + 2 key/value heads, head_dim) with their angles: one view where these are the same."""
    heads, rotated = context.config.num_heads, context.config.num_heads + context.config.num_key_value_heads
    if context.rotary is None:
        return []
    if context.query_rotary is None:
        return [(by_head[:, :rotated], context.rotary)]
    return [(by_head[:, :heads], context.query_rotary), (by_head[:, heads:rotated], context.rotary)]


def attended_qkv(kept: MixerSaved, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention saw them, (T, heads, head_dim), from what is kept."""
    if kept.inner.factors is not None:
        return prepare_qkv(kept.input, weights, context, kept.inner.factors)[:3]
    q, _, k, v = _parts(kept.input, context.config)
    return q, k, v


def attention_input_gradient(
    d_output: Tensor,
    kept: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    output: Tensor | None,
) -> Tensor:
    """∂L/∂[q k v], (T, q + 2k), as the projections gave them: through attention, back through rotation and q/k norm.

    `output`, (T, q), receives o where it is not kept, if there is a place for it.
    """
    config, own = context.config, kept.inner
    d_qkv, d_attended = torch.empty_like(kept.input), _by_head(d_output, config)
    if own.attended is None:
        attended, d_by_head = None if kept.output is None else _by_head(kept.output, config), _by_head(d_qkv, config)
    else:
        parts, d_parts, attended = _parts(kept.input, config), _parts(d_qkv, config), own.attended
        d_attended, d_by_head = gate_backward(d_attended, parts.gate, attended, d_parts.gate, config)
    saved = AttentionSaved(
        *attended_qkv(kept, weights, context), attended, own.log_sum_exp, *attention_setting(weights, context)
    )
    again = None if output is None or kept.output is not None else _by_head(output, config)
    attention_backward(d_attended, saved, out=d_by_head, output_buffer=again)
    for part, table in _rotated_parts(d_by_head, context):
        rotary_backward(part, table, out=part)
    if own.factors is not None:
        both, apart = (_parts(kept.input, config), _parts(d_qkv, config)), None if own.attended is None else d_by_head
        normed_backward(apart, kept.input, d_qkv, both, own.factors, weights, adapter, config)
    return d_qkv


ATTENTION_MIXER = Mixer(
    attention_output,
    attention_input_gradient,
    qkv=prepare_qkv,
    recomputes_output=recomputes_output,
    output=output_by_itself,
)
