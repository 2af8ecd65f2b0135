"""General backward of a block's sublayers, for blocks that the plain order in `nn.decoder.block` does not cover.

There are five such cases:
- the MLP sublayer is a mixture of experts (`nn.decoder.experts`);
- the MLP has no gate, as in BERT;
- the sublayer trains more than LoRA factors (`nn.decoder.group_extras`);
- the family multiplies the gate of the MLP, or has a second projection after the mixer (Falcon-H1);
- the backward pass ends in the MLP sublayer, or at the output projection of the mixer.

T, P and the names of tensors are defined in `nn.decoder.block`.

Each projection receives its input and computes all its gradients in one call, so p and o are recomputed first.
`input_grad_groups` contains the groups whose input gradient is needed. The pass visits the groups in reverse order and
ends at the first one that is not in this set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter, Group
from backhand.nn.decoder.experts import ExpertsSaved, experts_backward
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved, MLPSaved
from backhand.nn.decoder.projections import (
    gather_rows,
    group_backward,
    pre_norm_backward,
    pre_norm_saved,
    residual_backward,
    saved_or_recomputed_gate_up,
    scale_gate,
    scatter_rows,
    split_output,
)
from backhand.nn.decoder.weights import BlockWeights, mlp_matrix
from backhand.nn.families.family import DecoderConfig
from backhand.ops.activation import activate, activation_gradient
from backhand.ops.glu import GLUSaved, glu_backward, glu_recompute
from backhand.ops.layer_norm import NormSaved


def general_mlp_backward(
    d_x2: Tensor,
    x1: Tensor,
    saved: MLPSaved | ExpertsSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    input_grad_groups: frozenset[Group],
) -> Tensor | None:
    """Return d_x₁ for d_x₂, both of shape (P, hidden), or None if the backward pass ends in this sublayer."""
    n2 = pre_norm_saved(x1, weights.mlp_norm, weights.mlp_norm_bias, saved.statistics, config)
    d_norm_weight, multiplier = adapter.d_norms.get(config.norms.after_mlp), config.multipliers.down
    d_y, d_stream = residual_backward(d_x2, saved.post_norm, d_norm_weight, config, multiplier)
    if isinstance(saved, ExpertsSaved):
        mlp = saved.mlp
        d_n2 = None if mlp is None else _mlp_backward(d_y, n2, mlp, weights, adapter, config, input_grad_groups)
        if mlp is None or d_n2 is not None:
            through_experts = experts_backward(d_y, n2, saved, weights, adapter, config, input_grad_groups)
            d_n2 = through_experts if d_n2 is None else d_n2.add_(not_none(through_experts))
    else:
        d_n2 = _mlp_backward(d_y, n2, saved, weights, adapter, config, input_grad_groups)
    return None if d_n2 is None else pre_norm_backward(d_n2, n2, adapter.d_norms.get(config.norms.before_mlp), d_stream)


def _mlp_backward(
    d_y: Tensor,
    n2: Tensor | NormSaved,
    saved: MLPSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    input_grad_groups: frozenset[Group],
) -> Tensor | None:
    """Return d_n₂ for ∂L/∂(p W_dᵀ), both of shape (P, hidden), or None if the backward pass ends in this sublayer."""
    ffn = config.intermediate_size
    a_u, h = saved_or_recomputed_gate_up(saved, n2, weights, adapter, config)
    unit = GLUSaved(a_u[:, :ffn], a_u[:, ffn:], config.activation) if config.gated_mlp else None
    if unit is None:
        p, ready = activate(a_u, config.activation, None), None
    else:
        p, ready = glu_recompute(unit)
    needs_d_p = Group.DOWN in input_grad_groups
    d_p = group_backward(d_y, p, mlp_matrix(weights.down), adapter.down, saved.h_down, input_gradient=needs_d_p)
    del p
    if d_p is None:
        return None
    if unit is None:
        activation_gradient(d_p, a_u, config.activation, a_u)
    else:
        glu_backward(d_p, unit, ready=ready, out=a_u)
        scale_gate(a_u, config)
    del ready, d_p
    needs_d_n2 = Group.GATE_UP in input_grad_groups
    return group_backward(a_u, n2, mlp_matrix(weights.gate_up), adapter.gate_up, h, input_gradient=needs_d_n2)


def general_mixer_backward(
    d_x1: Tensor,
    x0: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    mixer: Mixer,
    input_grad_groups: frozenset[Group],
) -> Tensor | None:
    """Return d_x₀ (T, hidden) for d_x₁ (P, hidden), or None if the backward pass ends in this sublayer."""
    config, positions, norms = context.config, context.loss_positions, context.config.norms
    n1 = pre_norm_saved(x0, weights.attention_norm, weights.attention_norm_bias, saved.statistics, config)
    after = adapter.d_norms.get(norms.after_attention)
    d_projected, d_stream = residual_backward(d_x1, saved.post_norm, after, config, config.multipliers.output)
    o = not_none(mixer.output)(saved, weights, context) if saved.mixed is None else saved.mixed
    needs_d_o = Group.OUTPUT in input_grad_groups
    o_rows, second = split_output(gather_rows(o, positions), weights)
    d_o = group_backward(d_projected, o_rows, weights.output, adapter.output, saved.h_output, input_gradient=needs_d_o)
    if weights.second_output is not None:
        d_projected, _ = residual_backward(d_x1, None, None, config, config.multipliers.second_output)
        own = weights.second_output, not_none(adapter.second_output), not_none(saved.h_second)
        d_second = group_backward(d_projected, not_none(second), *own, input_gradient=needs_d_o)
        d_o = None if d_o is None or d_second is None else torch.cat([d_o, d_second], dim=1)
    del o, o_rows, second, d_projected
    if d_o is None:
        return None
    d_input = mixer.backward(scatter_rows(d_o, positions, x0), saved, weights, context, adapter, saved.mixed)
    del d_o
    needs_d_n1 = Group.INPUT in input_grad_groups
    d_n1 = group_backward(d_input, n1, weights.input, adapter.input, saved.h_input, input_gradient=needs_d_n1)
    if d_n1 is None:
        return None
    residual_grad = d_stream if positions is None else None
    d_x0 = pre_norm_backward(d_n1, n1, adapter.d_norms.get(norms.before_attention), residual_grad)
    return d_x0 if positions is None else d_x0.index_add_(0, positions, d_stream)
