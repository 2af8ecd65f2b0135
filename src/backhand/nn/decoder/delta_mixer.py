"""Qwen3.5's mixer: the gated delta rule with its convolution, norms and gate, and its state during generation.

    [q k v | z | b | a] = in_proj(n₁),   [q k v] ← SiLU(conv([q k v])),   β = σ(b),   g = decay_gate(a)
    q̂ = q / (√w ‖q‖),   k̂ = k / ‖k‖,   o = delta rule(q̂, k̂, v, g, β),   y = norm(o) ⊙ SiLU(z)

w is the width of a key head. ‖·‖ is √(Σ² + ε) over one head, with ε = 1e-6 in every model. Dividing by it is an RMSNorm
with ε / w and gain w^-½ for keys, 1 / w for queries. The code calls the RMSNorm op with the gain as offset and a zero
weight. q̂ and k̂ stay in float32 or wider, as the rule expects. norm is computed over each value head. It multiplies by
its weight, not by 1 + weight.

Backward takes the lines in reverse order and applies the backward of each op. The mixer saves o and the inverse RMS of
its norm in addition to its input and output. The backward recomputes q̂, k̂, v, g and β from the input, at the cost of
a convolution and two norms.

The output of a token depends on [q k v] before the convolution of the J-1 tokens before it, and on the state of the
rule. These are the two states of a row, zero before its first token. Their size does not grow with the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved, Rows
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig, DeltaSizes
from backhand.ops.causal_conv import Taps, causal_conv_backward, causal_conv_continued, causal_conv_forward
from backhand.ops.decay_gate import DecayGateSaved, decay_gate_backward, decay_gate_forward
from backhand.ops.delta_chunks import GatedDeltaRuleSaved
from backhand.ops.document_groups import SegmentRun
from backhand.ops.elementwise import OutputSaved, sigmoid_backward, sigmoid_forward
from backhand.ops.gated_delta_rule import gated_delta_rule_backward, gated_delta_rule_forward
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_backward, rms_norm_forward

NORM = "linear_attn.norm"
L2_EPS = 1e-6


class DeltaMixerSaved(NamedTuple):
    """o (T, value heads, value width) and the inverse RMS of its norm (T, value heads, 1)."""

    output: Tensor
    inverse_rms: Tensor


class _RuleInputs(NamedTuple):
    """q̂, k̂, v, g and β, and the tensors saved for the backward of each."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    q_norm: RMSNormSaved
    k_norm: RMSNormSaved
    decay_gate: DecayGateSaved
    rate: OutputSaved


def delta_forward(x: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, DeltaMixerSaved]:
    """Return y of shape (T, value heads · value width) for [q k v | z | b | a], within each document."""
    sizes = not_none(context.config.delta)
    qkv, z, b, a = x.split(sizes.inputs, dim=1)
    convolved, _ = causal_conv_forward(qkv, _taps(weights), context.segment_runs, silu=True)
    rule = _rule_inputs(convolved, b, a, weights, sizes)
    o, _ = gated_delta_rule_forward(*rule[:5], context.segment_runs)
    return _gated(o, z, weights, context.config)


def delta_backward(
    d_y: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    _output: Tensor | None,
) -> Tensor:
    """Return ∂L/∂[q k v | z | b | a] for ∂L/∂y (T, value heads · value width). Adds the gradient of a trained norm."""
    sizes, inner, x = not_none(context.config.delta), saved.inner, saved.projected
    qkv, z, b, a = x.split(sizes.inputs, dim=1)
    d_x = torch.empty_like(x)
    d_qkv, d_z, d_b, d_a = d_x.split(sizes.inputs, dim=1)

    normed = rms_norm_apply(inner.output, not_none(weights.gated_norm), inner.inverse_rms).flatten(1)
    d_gate, d_normed = glu_backward(d_y, GLUSaved(z, normed, "silu"))
    d_z.copy_(d_gate)
    norm = RMSNormSaved(inner.output, not_none(weights.gated_norm), inner.inverse_rms, 0.0)
    d_o = norm_backward(d_normed.unflatten(1, inner.output.shape[1:]), norm, adapter.d_norms.get(NORM))
    del normed, d_gate, d_normed

    convolved, conv = causal_conv_forward(qkv, _taps(weights), context.segment_runs, silu=True)
    rule = _rule_inputs(convolved, b, a, weights, sizes)
    delta_rule = GatedDeltaRuleSaved(*rule[:5], context.segment_runs)
    d_q, d_k, d_v, d_decay, d_beta = gated_delta_rule_backward(d_o, delta_rule)
    del delta_rule, d_o
    d_b.copy_(sigmoid_backward(d_beta, rule.rate).d_x)
    d_a.copy_(decay_gate_backward(d_decay, rule.decay_gate).d_a)
    d_convolved = torch.empty_like(convolved)
    d_raw_q, d_raw_k, d_raw_v = _heads(d_convolved, sizes)
    d_raw_q.copy_(rms_norm_backward(d_q, rule.q_norm, weight_gradient=False).d_x)
    d_raw_k.copy_(rms_norm_backward(d_k, rule.k_norm, weight_gradient=False).d_x)
    d_raw_v.copy_(d_v)
    del rule, convolved, d_q, d_k, d_v
    causal_conv_backward(d_convolved, conv, out=d_qkv)
    return d_x


def delta_states(
    config: DecoderConfig, rows: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return zero states: [q k v] of each row's last J-1 tokens, and the state of the rule.

    The shapes are (rows, J-1, channels) and (rows, value heads, key width, value width). The second is float32 or
    wider.
    """
    sizes = not_none(config.delta)
    seen = torch.zeros(rows, sizes.taps - 1, sizes.channels, dtype=dtype, device=device)
    shape = (rows, sizes.value_heads, sizes.key_width, sizes.value_width)
    return seen, torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)


def delta_extend(
    x: Tensor, weights: BlockWeights, states: tuple[Tensor, ...], rows: Sequence[Rows], config: DecoderConfig
) -> Tensor:
    """Return y of new tokens, (tokens, value heads · value width), which continue their rows, and update the states.

    Args:
        x: [q k v | z | b | a] of the new tokens.
        states: from `delta_states`.
        rows: the rows that the tokens belong to.
    """
    sizes, (seen, state) = not_none(config.delta), states
    qkv, z, b, a = x.split(sizes.inputs, dim=1)
    o = x.new_empty(x.shape[0], sizes.value_heads, sizes.value_width)
    for first, count, start, new in rows:
        tokens, row_range = slice(start, start + count * new), slice(first, first + count)
        by_row = qkv[tokens].unflatten(0, (count, new))
        convolved = causal_conv_continued(by_row, _taps(weights), seen[row_range], silu=True).flatten(0, 1)
        rule = _rule_inputs(convolved, b[tokens], a[tokens], weights, sizes)
        o[tokens] = gated_delta_rule_forward(*rule[:5], (SegmentRun(0, count, new),), states=state[row_range])[0]
    return _gated(o, z, weights, config)[0]


def _rule_inputs(convolved: Tensor, b: Tensor, a: Tensor, weights: BlockWeights, sizes: DeltaSizes) -> _RuleInputs:
    """Return the inputs of the rule.

    Args:
        convolved: [q k v] after the convolution, (tokens, channels).
        b, a: (tokens, value heads) each.
    """
    raw_q, raw_k, v = _heads(convolved, sizes)
    width, wide = sizes.key_width, torch.promote_types(convolved.dtype, torch.float32)
    zeros = convolved.new_zeros(width, dtype=wide)
    q, q_norm = rms_norm_forward(raw_q.to(wide), zeros, L2_EPS / width, 1 / width)
    k, k_norm = rms_norm_forward(raw_k.to(wide), zeros, L2_EPS / width, width**-0.5)
    decay, decay_gate = decay_gate_forward(a, not_none(weights.log_rate), not_none(weights.rate_bias))
    beta, rate = sigmoid_forward(b)
    return _RuleInputs(q, k, v, decay, beta, q_norm, k_norm, decay_gate, rate)


def _heads(x: Tensor, sizes: DeltaSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of q, k and v in x of shape (tokens, channels) as (tokens, heads, width)."""
    keys = sizes.key_heads * sizes.key_width
    q, k, v = x.split([keys, keys, sizes.value_heads * sizes.value_width], dim=1)
    key_shape, value_shape = (sizes.key_heads, sizes.key_width), (sizes.value_heads, sizes.value_width)
    return q.unflatten(1, key_shape), k.unflatten(1, key_shape), v.unflatten(1, value_shape)


def _gated(o: Tensor, z: Tensor, weights: BlockWeights, config: DecoderConfig) -> tuple[Tensor, DeltaMixerSaved]:
    """Return norm(o) ⊙ SiLU(z) of shape (tokens, value heads · value width) and the tensors saved for backward."""
    normed, norm = rms_norm_forward(o, not_none(weights.gated_norm), config.norm_eps)
    y, _ = glu_forward(z, normed.flatten(1), "silu")
    return y, DeltaMixerSaved(o, norm.inverse_rms)


def _taps(weights: BlockWeights) -> Taps:
    """Return the convolution in the shape that the op expects. Files have one more axis."""
    return Taps(not_none(weights.conv).squeeze(1))


GATED_DELTA_RULE = Mixer(delta_forward, delta_backward, delta_states, delta_extend)
