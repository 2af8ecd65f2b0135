"""Falcon-H1's mixer: attention and Mamba-2 next to each other, from the same input.

    [q k v | z x b c a] = n₁ W_inputᵀ,   [o | y] = [attention(q, k, v) | mamba(z, x, b, c, a)]
    x₁ = x₀ + m_o (o W_oᵀ) + m_y (y W_yᵀ)

Both parts and their backward are those of `attention_mixer` and `ssm_mixer`. Each has its own projection after it, with
a multiplier, in `projections`. o is saved next to y, so that the backward of attention does not recompute it.

In generation a row has keys and values, and the states of Mamba-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.attention_mixer import (
    AttentionMixerSaved,
    attention_input_gradient,
    attention_output,
    prepare_qkv,
)
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved, Rows
from backhand.nn.decoder.ssm_mixer import SSMSaved, ssm_backward, ssm_extend, ssm_forward, ssm_states
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig


class ParallelSaved(NamedTuple):
    """Tensors saved by both parts."""

    attention: AttentionMixerSaved
    ssm: SSMSaved


def parallel_forward(x: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, ParallelSaved]:
    """Return [o | y] of shape (T, width) for [q k v | z x b c a]."""
    qkv, projected = _parts(x, context.config)
    o, attention = attention_output(qkv, weights, context)
    y, ssm = ssm_forward(projected, weights, context)
    return torch.cat([o, y], dim=1), ParallelSaved(attention, ssm)


def parallel_backward(
    d_y: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    _output: Tensor | None,
) -> Tensor:
    """Return ∂L/∂[q k v | z x b c a] for ∂L/∂[o | y] (T, width). Adds the gradients of trained norms."""
    qkv, projected = _parts(saved.projected, context.config)
    width = context.config.num_heads * context.config.head_dim
    output, d_o = not_none(saved.mixed)[:, :width], d_y[:, :width]
    attention = saved._replace(projected=qkv, mixed=output, inner=saved.inner.attention)
    d_qkv = attention_input_gradient(d_o, attention, weights, context, adapter, output)
    ssm = saved._replace(projected=projected, mixed=None, inner=saved.inner.ssm)
    return torch.cat([d_qkv, ssm_backward(d_y[:, width:], ssm, weights, context, adapter, None)], dim=1)


def parallel_extend(
    x: Tensor, weights: BlockWeights, states: tuple[Tensor, ...], rows: Sequence[Rows], config: DecoderConfig
) -> Tensor:
    """Return y of new tokens, (tokens, heads · head width), which continue their rows, and update the states."""
    return ssm_extend(_parts(x, config)[1], weights, states, rows, config)


def _parallel_qkv(x: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Any, ...]:
    return prepare_qkv(_parts(x, context.config)[0], weights, context)


def _parts(x: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Return views of [q k v] and [z x b c a]."""
    projected = sum(not_none(config.ssm).inputs)
    qkv, rest = x.split([x.shape[1] - projected, projected], dim=1)
    return qkv, rest


PARALLEL = Mixer(parallel_forward, parallel_backward, ssm_states, parallel_extend, _parallel_qkv)
