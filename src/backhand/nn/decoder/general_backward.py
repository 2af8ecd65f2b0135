"""The halves' backward where the block's own order (`nn.decoder.block`) does not do, chosen once for a half.

Some group trains more than factors, and its gradients need its input beforehand (`group_extras`), or nothing below some
group needs a gradient, and the pass ends there. So each projection is given its input and makes all its gradients at
once (`group_backward`): p and o are recomputed before, not on the way.
"""

from __future__ import annotations

from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import DOWN, GATE_UP, INPUT, OUTPUT, BlockAdapter
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved, MLPSaved
from backhand.nn.decoder.projections import (
    gather_rows,
    group_backward,
    pre_norm_backward,
    pre_norm_saved,
    residual_backward,
    saved_or_recomputed_gate_up,
    scatter_rows,
)
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.glu import GLUSaved, glu_backward, glu_recompute


def general_mlp_backward(
    d_x2: Tensor,
    x1: Tensor,
    kept: MLPSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    lowest_group: int,
) -> Tensor | None:
    """d_x₁ from d_x₂, (T, hidden) both, or None when nothing below needs it."""
    ffn, norms = config.intermediate_size, config.norms
    n2 = pre_norm_saved(x1, weights.mlp_norm, kept.factor, config)
    a_u, h = saved_or_recomputed_gate_up(kept, n2, weights, adapter)
    d_down = residual_backward(d_x2, kept.projected, adapter.norms.get(norms.after_mlp), config)
    unit = GLUSaved(a_u[:, :ffn], a_u[:, ffn:], config.activation)
    p, ready = glu_recompute(unit)
    d_p = group_backward(d_down, p, weights.down, adapter.down, kept.h_down, input_gradient=lowest_group < DOWN)
    del p, d_down
    if d_p is None:
        return None
    glu_backward(d_p, unit, ready=ready, out=a_u)
    del ready, d_p
    d_n2 = group_backward(a_u, n2, weights.gate_up, adapter.gate_up, h, input_gradient=lowest_group < GATE_UP)
    return None if d_n2 is None else pre_norm_backward(d_n2, n2, adapter.norms.get(norms.before_mlp), d_x2)


def general_mixer_backward(
    d_x1: Tensor,
    x0: Tensor,
    kept: MixerSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    mixer: Mixer,
    lowest_group: int,
) -> Tensor | None:
    """d_x₀, (T, hidden), from d_x₁, of what is loss_positions of it, or None when nothing below needs it."""
    config, loss_positions, norms = context.config, context.loss_positions, context.config.norms
    n1 = pre_norm_saved(x0, weights.attention_norm, kept.factor, config)
    d_projected = residual_backward(d_x1, kept.projected, adapter.norms.get(norms.after_attention), config)
    o = not_none(mixer.output)(kept, weights, context) if kept.output is None else kept.output
    d_o = group_backward(
        *(d_projected, gather_rows(o, loss_positions), weights.output, adapter.output, kept.h_output),
        input_gradient=lowest_group < OUTPUT,
    )
    del o, d_projected
    if d_o is None:
        return None
    d_input = mixer.backward(scatter_rows(d_o, loss_positions, x0), kept, weights, context, adapter, kept.output)
    del d_o
    d_n1 = group_backward(d_input, n1, weights.input, adapter.input, kept.h_input, input_gradient=lowest_group < INPUT)
    if d_n1 is None:
        return None
    residual_grad = d_x1 if loss_positions is None else None
    d_x0 = pre_norm_backward(d_n1, n1, adapter.norms.get(norms.before_attention), residual_grad)
    return d_x0 if loss_positions is None else d_x0.index_add_(0, loss_positions, d_x1)
