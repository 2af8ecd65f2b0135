"""Gemma 4's mixer: attention with a norm on the values, and optionally with the keys and values of another layer.

With H heads, K key/value heads, and n̂ the norm without a weight, a layer with its own keys and values computes

    q = rotate(norm(z_q)),   k = rotate(norm(z_k)),   v = n̂(z_v),   o = attention(q, k, v)

from z = [z_q | z_k | z_v], the outputs of its projections. If values share the projection of the keys, z_v = z_k,
before norm and rotation. A layer that shares keys and values has z = z_q only. It reads k and v of an earlier layer of
its kind (sliding or full), already normalized and rotated. Scores are not scaled: the norms determine their size.

Backward. Let layer p compute (k, v), and let the layers u ∈ U use them as well. The loss depends on k through each of
these layers, L(o_p(k, v), o_u(k, v), …), so the chain rule gives

    ∂L/∂k = Σ_{l ∈ {p} ∪ U} (∂o_l/∂k)ᵀ ∂L/∂o_l      (T, K, head_dim)
    ∂L/∂v = Σ_{l ∈ {p} ∪ U} (∂o_l/∂v)ᵀ ∂L/∂o_l      (T, K, head_dim)

∂L/∂o_l contains everything between layer l and the loss. Each term is the backward of attention in layer l, with that
layer's queries. The layers in U are above p, so their terms are complete when the backward pass reaches p. Each layer
adds its term to the sum (`nn.decoder.cross_layer`). p adds its own term and continues through rotation, norms and
projections. With only one term instead of the sum, k_proj and v_proj of p would be trained on part of their effect.

∂L/∂q stays within its layer. If z_v = z_k, ∂L/∂z_k is the sum of the gradients through the norm of k and through n̂.

Saved in addition to input and output: the inverse RMS of the norms, and attention's ℓ of long documents. q, and a
layer's own k and v, are recomputed from the norms. Shared keys and values are stored once for all layers until the pass
ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.attention_mixer import attention_setting
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import KEYS_AS_VALUES, SHARED_KEYS
from backhand.ops.attention import AttentionSaved, attention_backward, attention_forward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_forward
from backhand.ops.rotary import rotary_backward, rotary_forward


class SharedAttentionSaved(NamedTuple):
    """Tensors saved in addition to input and output."""

    # (T, heads, 1) of the norm of q, and of the norms of k and v if the layer has its own
    inverse_rms: tuple[Tensor, ...]
    logsumexp: Tensor | None  # (H, T) of long documents; None if the backward of attention recomputes it


def _parts(z: Tensor, context: BlockContext) -> tuple[Tensor, ...]:
    """Return views of the first group's output, (T, heads, head_dim): q, and k and v if the layer has its own."""
    config, mixer = context.config, context.layer.mixer
    own_parts = {SHARED_KEYS: 0, KEYS_AS_VALUES: 1}.get(mixer, 2)
    counts = [config.num_heads, *[config.num_key_value_heads] * own_parts]
    parts = z.unflatten(1, (sum(counts), config.head_dim)).split(counts, dim=1)
    return (*parts, parts[1]) if mixer == KEYS_AS_VALUES else parts


def shared_attention_forward(
    z: Tensor, weights: BlockWeights, context: BlockContext
) -> tuple[Tensor, SharedAttentionSaved]:
    """Return o (T, H · head_dim) for the outputs of the projections, and the tensors saved in addition to both."""
    q, k, v, norms = _prepared(z, weights, context)
    output, saved = attention_forward(q, k, v, *attention_setting(weights, context))
    return output.flatten(1), SharedAttentionSaved(tuple(norm.inverse_rms for norm in norms), saved.logsumexp)


def shared_qkv(z: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as attention reads them, (T, heads, head_dim) each. Publishes k and v that other layers use."""
    return _prepared(z, weights, context)[:3]


def _prepared(
    z: Tensor, weights: BlockWeights, context: BlockContext, inverse_rms: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor, list[RMSNormSaved]]:
    """Return q, k and v as attention reads them, and the saved tensors of their norms. Reuse `inverse_rms` if given."""
    eps, cross_layer, kv_source = context.config.norm_eps, not_none(context.cross_layer), context.layer.kv_source
    normed: list[Tensor] = []
    norms: list[RMSNormSaved] = []
    for place, x in enumerate(_parts(z, context)):
        gain = not_none((weights.q_norm, weights.k_norm, x.new_ones(x.shape[-1]))[place])
        if inverse_rms is None:
            y, norm = rms_norm_forward(x, gain, eps)
        else:
            norm = RMSNormSaved(x, gain, inverse_rms[place], 0.0)
            y = rms_norm_apply(*norm)
        if place < 2 and context.rotary is not None:
            rotary_forward(y, context.rotary, out=y)
        normed.append(y)
        norms.append(norm)
    if kv_source is not None:
        return normed[0], *cross_layer.shared_kv(kv_source), norms
    q, k, v = normed
    cross_layer.publish(context.number, k, v)
    return q, k, v, norms


def shared_attention_backward(
    d_output: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    _output: Tensor | None,
) -> Tensor:
    """Return ∂L/∂z, of z's shape. Gradients of another layer's keys and values are accumulated for that layer."""
    config, inner = context.config, saved.inner
    cross_layer, kv_source = not_none(context.cross_layer), context.layer.kv_source
    q, k, v, norms = _prepared(saved.projected, weights, context, inner.inverse_rms)
    # This mixer's backward does not recompute the output, so it is always saved.
    output, d_attended = (x.unflatten(1, q.shape[1:]) for x in (not_none(saved.mixed), d_output))
    attention = AttentionSaved(q, k, v, output, *attention_setting(weights, context), inner.logsumexp)
    by_head = q.new_empty(len(q), config.num_heads + 2 * config.num_key_value_heads, config.head_dim)
    d_q, d_k, d_v = attention_backward(d_attended, attention, out=by_head)
    if kv_source is not None:
        cross_layer.accumulate_grad(kv_source, d_k, d_v)
    elif (users := cross_layer.pop_grad(context.number)) is not None:
        d_k.add_(users.k)
        d_v.add_(users.v)
    d_z = torch.empty_like(saved.projected)
    into = _parts(d_z, context)
    for place, (d_y, norm) in enumerate(zip((d_q, d_k, d_v), norms, strict=False)):
        if place < 2 and context.rotary is not None:
            rotary_backward(d_y, context.rotary, out=d_y)
        trained = adapter.d_norms.get(config.qk_norms[place]) if place < 2 else None
        d_x = norm_backward(d_y, norm, trained)
        if place == 2 and context.layer.mixer == KEYS_AS_VALUES:
            into[place].add_(d_x)  # added to the gradient through k
        else:
            into[place].copy_(d_x)
    return d_z


SHARED_ATTENTION = Mixer(shared_attention_forward, shared_attention_backward, qkv=shared_qkv)
