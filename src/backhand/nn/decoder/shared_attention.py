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
adds its term to the sum (`carried`), and p adds its own before it goes on through rotation, norms and projections.
Whoever takes one user's term for the whole, or p's alone, trains k_proj and v_proj of p on a part of their effect.

∂L/∂q stays within its layer. Where z_v = z_k, ∂L/∂z_k is the sum of what comes through the norm of k and through n̂.

Kept beside input and output: log-sum-exp and the factors of the norms. q, and a layer's own k and v, are
recomputed from them; what is shared is kept once, for all its users, until the pass is over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.carried import Carried
from backhand.nn.decoder.family import KEYS_AS_VALUES, SHARED_KEYS
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixingKept
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.attention import AttentionSaved, attention_backward, attention_forward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import rotary_backward, rotary_forward


class SharedAttentionKept(NamedTuple):
    """What is kept beside input and output; T tokens, H heads, K key/value heads."""

    log_sum_exp: Tensor  # see `ops.attention`
    q_factor: Tensor  # (T, H, 1)
    k_factor: Tensor | None  # (T, K, 1); None where keys and values are another layer's
    v_factor: Tensor | None  # (T, K, 1), likewise


class _Parts(NamedTuple):
    """Views of what the first group gave, (T, heads, head_dim); k and v are None where they are another layer's."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None


def _parts(z: Tensor, context: BlockContext) -> _Parts:
    config, mixer = context.config, context.layer.mixer
    if mixer == SHARED_KEYS:
        return _Parts(z.unflatten(1, (config.num_heads, config.head_dim)), None, None)
    kv_heads = config.num_key_value_heads
    counts = [config.num_heads, kv_heads] if mixer == KEYS_AS_VALUES else [config.num_heads, kv_heads, kv_heads]
    parts = z.unflatten(1, (sum(counts), config.head_dim)).split(counts, dim=1)
    return _Parts(parts[0], parts[1], parts[-1])


def shared_attention_forward(
    z: Tensor, weights: BlockWeights, context: BlockContext
) -> tuple[Tensor, SharedAttentionKept]:
    """o, (T, H · head_dim), from what the projections gave, and what backward needs beside both."""
    config = context.config
    q, k, v, factors = _prepared(z, weights, context)
    output, attended = attention_forward(
        q, k, v, context.runs, config.attention_scaling, context.layer.window, config.attention_cap
    )
    return output.flatten(1), SharedAttentionKept(attended.log_sum_exp, *factors)


def attending(z: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention takes them, (T, heads, head_dim) each; what others use is lent on the way."""
    return _prepared(z, weights, context)[:3]


_Factors = tuple[Tensor, Tensor | None, Tensor | None]


def _prepared(
    z: Tensor, weights: BlockWeights, context: BlockContext, factors: _Factors | None = None
) -> tuple[Tensor, Tensor, Tensor, _Factors]:
    """q, k and v as attention takes them, and the norms' factors; given, they are not computed again."""
    config, parts, carried = context.config, _parts(z, context), _carried(context)
    assert weights.q_norm is not None

    def normed(x: Tensor, weight: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        if factor is not None:
            return rms_norm_apply(x, weight, factor), factor
        y, saved = rms_norm_forward(x, weight, config.norm_eps)
        return y, saved.factor

    q_known, k_known, v_known = (None, None, None) if factors is None else factors
    q, q_factor = normed(parts.q, weights.q_norm, q_known)
    if context.rotary is not None:
        rotary_forward(q, context.rotary, out=q)
    if parts.k is None or parts.v is None:
        assert context.layer.keys_of is not None
        return q, *carried.lent(context.layer.keys_of), (q_factor, None, None)
    assert weights.k_norm is not None
    k, k_factor = normed(parts.k, weights.k_norm, k_known)
    v, v_factor = normed(parts.v, _no_gain(parts.v), v_known)
    if context.rotary is not None:
        rotary_forward(k, context.rotary, out=k)
    carried.lend(context.number, k, v)
    return q, k, v, (q_factor, k_factor, v_factor)


def shared_attention_backward(
    d_output: Tensor,
    kept: MixingKept,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    _output: Tensor | None,
) -> Tensor:
    """∂L/∂z of z's shape; what another layer's keys and values get is given back to them."""
    config, own, carried = context.config, kept.own, _carried(context)
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    q, k, v, _ = _prepared(kept.input, weights, context, (own.q_factor, own.k_factor, own.v_factor))
    assert kept.output is not None  # plain attention alone gives it again
    saved = AttentionSaved(
        q,
        k,
        v,
        kept.output.unflatten(1, (heads, config.head_dim)),
        own.log_sum_exp,
        context.runs,
        config.attention_scaling,
        context.layer.window,
        config.attention_cap,
    )
    by_head = torch.empty(len(q), heads + 2 * kv_heads, config.head_dim, dtype=q.dtype, device=q.device)
    d_q, d_k, d_v = attention_backward(d_output.unflatten(1, (heads, config.head_dim)), saved, out=by_head)
    d_z = torch.empty_like(kept.input)
    raw, into = _parts(kept.input, context), _parts(d_z, context)
    if context.rotary is not None:
        rotary_backward(d_q, context.rotary, out=d_q)
    q_norm = RMSNormSaved(raw.q, _there(weights.q_norm), own.q_factor, 0.0)
    into.q.copy_(norm_backward(d_q, q_norm, adapter.norms.get(config.qk_norms[0])))
    if raw.k is None or raw.v is None or into.k is None or into.v is None:
        assert context.layer.keys_of is not None
        carried.give_back(context.layer.keys_of, d_k, d_v)
        return d_z
    users = carried.returned(context.number)
    if users is not None:
        d_k.add_(users.k)
        d_v.add_(users.v)
    if context.rotary is not None:
        rotary_backward(d_k, context.rotary, out=d_k)
    k_norm = RMSNormSaved(raw.k, _there(weights.k_norm), own.k_factor, 0.0)
    d_raw_v = rms_norm_backward(d_v, RMSNormSaved(raw.v, _no_gain(raw.v), own.v_factor, 0.0), weight_gradient=False).d_x
    into.k.copy_(norm_backward(d_k, k_norm, adapter.norms.get(config.qk_norms[1])))
    if context.layer.mixer == KEYS_AS_VALUES:
        into.k.add_(d_raw_v)
    else:
        into.v.copy_(d_raw_v)
    return d_z


def _no_gain(x: Tensor) -> Tensor:
    """The weight of a norm that has none."""
    return torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)


def _there(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight


def _carried(context: BlockContext) -> Carried:
    assert context.carried is not None
    return context.carried


SHARED_ATTENTION = Mixer(shared_attention_forward, shared_attention_backward, attending=attending)
