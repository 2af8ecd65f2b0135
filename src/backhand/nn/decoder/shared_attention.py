"""Gemma 4's mixer: attention with a norm on values too, whose keys and values may be another layer's.

With H heads, K key/value heads and n̂ the norm without a weight, a layer that has keys and values of its own computes

    q = turn(norm(z_q)),   k = turn(norm(z_k)),   v = n̂(z_v),   o = attention(q, k, v)

from z = [z_q | z_k | z_v], what its projections gave. Where values are made of the keys' projection, z_v = z_k, before
norm and rotation. A layer that shares has z = z_q alone, and takes k and v of an earlier layer of its kind (sliding or
full), as they stood there: normed and rotated. Scores are not scaled: the norms see to their size.

Backward. Let layer p make (k, v), and let layers u ∈ U use them beside p itself. The loss depends on k by every one of
these layers, L(o_p(k, v), o_u(k, v), …), so that by the chain rule

    ∂L/∂k = Σ_{l ∈ {p} ∪ U} (∂o_l/∂k)ᵀ ∂L/∂o_l      (T, K, head_dim)
    ∂L/∂v = Σ_{l ∈ {p} ∪ U} (∂o_l/∂v)ᵀ ∂L/∂o_l      (T, K, head_dim)

where ∂L/∂o_l holds everything between layer l and the loss, and each term is attention's own backward in layer l, with
that layer's queries. Users stand above p, so that all their terms are there when the backward pass arrives at p: each
adds its term to the sum (`cross_layer`), and p adds its own before it goes on through rotation, norms and projections.
Whoever takes one user's term for the whole, or p's alone, trains k_proj and v_proj of p on a part of their effect.

∂L/∂q stays within its layer. Where z_v = z_k, ∂L/∂z_k is the sum of what comes through the norm of k and through n̂.

Kept beside input and output: log-sum-exp and the factors of the norms. q, and a layer's own k and v, are
recomputed from them; what is shared is kept once, for all its users, until the pass is over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.attention_mixer import attention_setting
from backhand.nn.decoder.family import KEYS_AS_VALUES, SHARED_KEYS
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.attention import AttentionSaved, attention_backward, attention_forward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_forward
from backhand.ops.rotary import rotary_backward, rotary_forward


class SharedAttentionSaved(NamedTuple):
    """What is kept beside input and output."""

    log_sum_exp: Tensor  # see `ops.attention`
    factors: tuple[Tensor, ...]  # (T, heads, 1) of the norms of q, and of k and v where these are the layer's own


def _parts(z: Tensor, context: BlockContext) -> tuple[Tensor, ...]:
    """Views of what the first group gave, (T, heads, head_dim): q, and k and v where these are the layer's own."""
    config, mixer = context.config, context.layer.mixer
    own = {SHARED_KEYS: 0, KEYS_AS_VALUES: 1}.get(mixer, 2)
    counts = [config.num_heads, *[config.num_key_value_heads] * own]
    parts = z.unflatten(1, (sum(counts), config.head_dim)).split(counts, dim=1)
    return (*parts, parts[1]) if mixer == KEYS_AS_VALUES else parts


def shared_attention_forward(
    z: Tensor, weights: BlockWeights, context: BlockContext
) -> tuple[Tensor, SharedAttentionSaved]:
    """o, (T, H · head_dim), from what the projections gave, and what backward needs beside both."""
    q, k, v, norms = _prepared(z, weights, context)
    output, attended = attention_forward(q, k, v, *attention_setting(weights, context))
    return output.flatten(1), SharedAttentionSaved(attended.log_sum_exp, tuple(norm.factor for norm in norms))


def shared_qkv(z: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention takes them, (T, heads, head_dim) each; what others use is lent on the way."""
    return _prepared(z, weights, context)[:3]


def _prepared(
    z: Tensor, weights: BlockWeights, context: BlockContext, factors: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor, list[RMSNormSaved]]:
    """q, k and v as attention takes them, and the norms that made them, whose factors may be known."""
    eps, cross_layer, kv_source = context.config.norm_eps, not_none(context.cross_layer), context.layer.kv_source
    normed: list[Tensor] = []
    norms: list[RMSNormSaved] = []
    for place, x in enumerate(_parts(z, context)):
        gain = not_none((weights.q_norm, weights.k_norm, x.new_ones(x.shape[-1]))[place])
        if factors is None:
            y, norm = rms_norm_forward(x, gain, eps)
        else:
            norm = RMSNormSaved(x, gain, factors[place], 0.0)
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
    kept: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    _output: Tensor | None,
) -> Tensor:
    """∂L/∂z of z's shape; what another layer's keys and values get is given back to them."""
    config, own, cross_layer, kv_source = (
        context.config,
        kept.inner,
        not_none(context.cross_layer),
        context.layer.kv_source,
    )
    q, k, v, norms = _prepared(kept.input, weights, context, own.factors)
    # Plain attention alone gives its output again.
    output, d_attended = (x.unflatten(1, q.shape[1:]) for x in (not_none(kept.output), d_output))
    saved = AttentionSaved(q, k, v, output, own.log_sum_exp, *attention_setting(weights, context))
    by_head = q.new_empty(len(q), config.num_heads + 2 * config.num_key_value_heads, config.head_dim)
    d_q, d_k, d_v = attention_backward(d_attended, saved, out=by_head)
    if kv_source is not None:
        cross_layer.accumulate_grad(kv_source, d_k, d_v)
    elif (users := cross_layer.pop_grad(context.number)) is not None:
        d_k.add_(users.k)
        d_v.add_(users.v)
    d_z = torch.empty_like(kept.input)
    into = _parts(d_z, context)
    for place, (d_y, norm) in enumerate(zip((d_q, d_k, d_v), norms, strict=False)):
        if place < 2 and context.rotary is not None:
            rotary_backward(d_y, context.rotary, out=d_y)
        trained = adapter.norms.get(config.qk_norms[place]) if place < 2 else None
        d_x = norm_backward(d_y, norm, trained)
        if place == 2 and context.layer.mixer == KEYS_AS_VALUES:
            into[place].add_(d_x)  # to what came through k
        else:
            into[place].copy_(d_x)
    return d_z


SHARED_ATTENTION = Mixer(shared_attention_forward, shared_attention_backward, qkv=shared_qkv)
