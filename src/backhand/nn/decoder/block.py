"""One decoder block, forward and backward by hand, for every family.

    n₁ = norm(x₀)            [q k v] = n₁ W_qkvᵀ (+ LoRA), q and k normed, then rotated where the layer does
    o  = attention(q, k, v)  x₁ = x₀ + o W_oᵀ (+ LoRA)              (with a norm before the sum, where there is one)
    n₂ = norm(x₁)            [a u] = n₂ W_guᵀ (+ LoRA)
    p  = φ(a) ⊙ u            x₂ = x₁ + p W_dᵀ (+ LoRA)              (likewise)

W_qkv and W_gu are projections stacked (`nn.decoder.weights`), a and u the gate and up halves, φ the activation.
The norm and the sum of either half are in `nn.decoder.projections`, attention between its projections in
`nn.decoder.attention_mixer`, and norms of q and k, and gates, in `nn.decoder.attention_extras`.
Sandwich norms are norms also behind attention and MLP, as in Gemma 3. OLMo 2 has norms there alone: n₁ = x₀, n₂ = x₁.
The T tokens of all documents are one axis. In some layers another mixer stands in attention's place, between other
projections (`nn.decoder.mixer`); what is said here of q, k, v and o holds for its input and output.
Gemma 4 has one more part behind the MLP (`nn.decoder.per_layer_input`), whose input is x₂.
Where the family has a residual multiplier m (Granite), what is added to the stream is multiplied by it.

Backward is the same list from the bottom up, each line by its op's backward; at the two sums the gradient of the stream
goes both ways, so d_x₁ = d_x₂ + (through the MLP) and d_x₀ = d_x₁ + (through attention); with a residual multiplier m
the branches begin from m d_x₂ and m d_x₁, the sums stay. A projection's backward is three lines (`ops.lora_group`):
∂L/∂h with ∂L/∂B, then ∂L/∂x, and ∂L/∂A as soon as its input is there: p and o are recomputed on the way down. The gated
unit takes four of these lines, from ∂L/∂p to ∂L/∂h of gate and up, in one pass (`ops.adapted_glu`).
Mixtures of experts have an MLP half of their own (`nn.decoder.experts`). Halves in which more than factors is trained,
or below which nothing needs a gradient, take another order (`nn.decoder.general_backward`).

Kept for backward: x₀, q, k, v, x₁, a, u, the norm factors, every rank-sized h = x Aᵀ, and o with its log-sum-exp where
attention's backward does not recompute o (`ops.attention`). With q/k norms, q and k are kept as they were before the
norm, plus their factors; with norms behind the halves, the two normed outputs as they were before the norm, plus their
factors. p and the rotated q, k of q/k-normed families are recomputed; so are n₁ and n₂, but for factors alone, whose
gradients take them by their norms (`ops.low_rank`).
`recompute="mlp"` does not keep a, u and their h; `recompute="block"` keeps x₀ alone and runs the forward again.

Only the loss reads the last block's output, and only at supervised positions. All its keys and values are needed, since
later tokens attend to them. But from the output projection on positions are independent, so only the supervised ones
(`loss_positions`) are computed, kept and differentiated. At all others the gradients of o and x₁ are zero.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from backhand.nn.batch import Scratch
from backhand.nn.decoder.adapted_group import GATE_UP, INPUT, OUTPUT, BlockAdapter
from backhand.nn.decoder.attention_mixer import ATTENTION_MIXER
from backhand.nn.decoder.delta_mixer import GATED_DELTA_RULE
from backhand.nn.decoder.experts import ExpertsSaved, experts_sublayer_backward, experts_sublayer_forward
from backhand.nn.decoder.family import (
    ATTENTION,
    GATED_DELTA,
    KEYS_AS_VALUES,
    SHARED_KEYS,
    SHORT_CONV,
    VALUE_NORMED,
    DecoderConfig,
)
from backhand.nn.decoder.general_backward import general_mixer_backward, general_mlp_backward
from backhand.nn.decoder.mixer import BlockContext, MixerSaved, MLPSaved
from backhand.nn.decoder.per_layer_input import PLESaved, ple_backward, ple_forward
from backhand.nn.decoder.projections import (
    gather_rows,
    group_backward,
    group_forward,
    mixer_output_buffer,
    pre_norm_backward,
    pre_norm_forward,
    pre_norm_saved,
    residual_backward,
    residual_forward,
    saved_or_recomputed_gate_up,
    scatter_rows,
)
from backhand.nn.decoder.shared_attention import SHARED_ATTENTION
from backhand.nn.decoder.short_conv import SHORT_CONVOLUTION
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.adapted_glu import AdaptedGLUSaved, adapted_glu_backward
from backhand.ops.glu import glu_forward
from backhand.ops.lora_group import group_A_gradients, group_gradients, group_input_gradient
from backhand.ops.low_rank import hidden_gradient

RECOMPUTE_MODES = ("none", "mlp", "block")

MIXERS = {
    ATTENTION: ATTENTION_MIXER,
    SHORT_CONV: SHORT_CONVOLUTION,
    GATED_DELTA: GATED_DELTA_RULE,
    **dict.fromkeys((VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS), SHARED_ATTENTION),
}
"""What `LayerConfig.mixer` names."""


class BlockSaved(NamedTuple):
    """x0 (T, hidden) always; the rest is None under recompute="block". x1 (loss positions, hidden)."""

    x0: Tensor
    mixing: MixerSaved | None
    x1: Tensor | None
    mlp: MLPSaved | ExpertsSaved | None
    end: PLESaved | None = None  # where something stands behind the MLP


def block_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, recompute: str = "none"
) -> tuple[Tensor, BlockSaved]:
    """x₂, (T or loss positions, hidden), from x₀, (T, hidden), and what `block_backward` needs."""
    x1, mixing = mixer_sublayer_forward(x0, weights, adapter, context)
    x2, mlp = mlp_sublayer_forward(x1, weights, adapter, context.config, context.scratch)
    end = None
    if weights.layer_scalar is not None:
        x2, end = ple_forward(x2, weights, adapter, context)
    if recompute == "block":
        return x2, BlockSaved(x0, None, None, None)
    if recompute == "mlp":
        mlp = mlp._replace(gate_up=None, h_gate_up=None)
    return x2, BlockSaved(x0, mixing, x1, mlp, end)


def mixer_sublayer_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext
) -> tuple[Tensor, MixerSaved]:
    """x₁, (T or loss positions, hidden), and what its backward needs."""
    config, loss_positions, mixer = context.config, context.loss_positions, MIXERS[context.layer.mixer]
    n1, factor = pre_norm_forward(x0, weights.attention_norm, config, context.scratch)
    qkv, h_input = group_forward(n1, weights.input, weights.input_bias, adapter.input)
    o, own = mixer.forward(qkv, weights, context)
    x1, h_output, projected = residual_forward(
        *(gather_rows(x0, loss_positions), gather_rows(o, loss_positions), weights.output, weights.output_bias),
        *(adapter.output, weights.after_attention_norm, config),
    )
    kept_output = None if mixer.recomputes_output(o, config) else o
    return x1, MixerSaved(factor, qkv, kept_output, own, h_input, h_output, projected)


def mlp_sublayer_forward(
    x1: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig, scratch: Scratch
) -> tuple[Tensor, MLPSaved | ExpertsSaved]:
    """x₂ from x₁, (T, hidden) both, and what its backward needs."""
    if weights.router is not None:
        return experts_sublayer_forward(x1, weights, adapter, config, scratch)
    ffn = config.intermediate_size
    n2, factor = pre_norm_forward(x1, weights.mlp_norm, config, scratch)
    gate_up, h_gate_up = group_forward(n2, weights.gate_up, weights.gate_up_bias, adapter.gate_up)
    place = scratch.take("product", (x1.shape[0], ffn), x1)
    p, _ = glu_forward(gate_up[:, :ffn], gate_up[:, ffn:], config.activation, out=place)
    x2, h_down, projected = residual_forward(
        x1, p, weights.down, weights.down_bias, adapter.down, weights.after_mlp_norm, config
    )
    return x2, MLPSaved(factor, gate_up, h_gate_up, h_down, projected)


def block_backward(
    d_x2: Tensor,
    saved: BlockSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    lowest_group: int = -1,
) -> Tensor | None:
    """d_x₀, (T, hidden); gradients of what is trained are added to the flat buffer.

    Args:
        d_x2: ∂L/∂x₂, at the loss positions; it may be overwritten.
        saved: from `block_forward`; the gradient of [a | u] takes their place.
        lowest_group: -1 when something below the block needs d_x₀. Else INPUT, OUTPUT, GATE_UP, DOWN or a later one:
            the first of this block's groups that needs a gradient; the pass stops there and returns None.
    """
    x0, mixing, x1, mlp, end = saved
    if mixing is None or x1 is None:
        x1, mixing = mixer_sublayer_forward(x0, weights, adapter, context)
    if mlp is None:
        x2, mlp = mlp_sublayer_forward(x1, weights, adapter, context.config, context.scratch)
        if weights.layer_scalar is not None:
            _, end = ple_forward(x2, weights, adapter, context)
    if end is not None:
        d_end = ple_backward(d_x2, end, weights, adapter, context, lowest_group)
        if d_end is None:
            return None
        d_x2 = d_end
    config, mixer = context.config, context.layer.mixer
    if isinstance(mlp, ExpertsSaved):
        d_x1 = experts_sublayer_backward(d_x2, x1, mlp, weights, adapter, config, lowest_group)
    elif lowest_group >= GATE_UP or adapter.gate_up.extras or adapter.down.extras:
        d_x1 = general_mlp_backward(d_x2, x1, mlp, weights, adapter, config, lowest_group)
    else:
        d_x1 = mlp_sublayer_backward(d_x2, x1, mlp, weights, adapter, config)
    if d_x1 is None:
        return None
    if lowest_group >= OUTPUT or adapter.input.extras or adapter.output.extras:
        return general_mixer_backward(d_x1, x0, mixing, weights, adapter, context, MIXERS[mixer], lowest_group)
    return mixer_sublayer_backward(d_x1, x0, mixing, weights, adapter, context, input_gradient=lowest_group < INPUT)


def mlp_sublayer_backward(
    d_x2: Tensor, x1: Tensor, kept: MLPSaved, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> Tensor:
    """d_x₁ from d_x₂, (T, hidden) both."""
    gate_up, down, norms = adapter.gate_up.group, adapter.down.group, config.norms
    n2 = pre_norm_saved(x1, weights.mlp_norm, kept.factor, config)
    a_u, h = saved_or_recomputed_gate_up(kept, n2, weights, adapter)
    d_down = residual_backward(d_x2, kept.projected, adapter.norms.get(norms.after_mlp), config)
    d_h_down = hidden_gradient(d_down, kept.h_down, down.members)
    d_p = group_input_gradient(d_down, d_h_down, weights.down, down)
    del d_down
    unit = AdaptedGLUSaved(a_u, config.activation, gate_up, h, down, d_h_down)
    d_a_u, d_h, *_ = adapted_glu_backward(d_p, unit, out=a_u)
    del d_p
    d_n2 = group_gradients(d_a_u, n2, d_h, weights.gate_up, gate_up)
    return pre_norm_backward(d_n2, n2, adapter.norms.get(norms.before_mlp), d_x2)


def mixer_sublayer_backward(
    d_x1: Tensor,
    x0: Tensor,
    kept: MixerSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    *,
    input_gradient: bool,
) -> Tensor | None:
    """d_x₀, (T, hidden), from d_x₁ at the loss positions; None where it is not asked for."""
    config, loss_positions, mixer = context.config, context.loss_positions, MIXERS[context.layer.mixer]
    output, norms = adapter.output.group, config.norms
    n1 = pre_norm_saved(x0, weights.attention_norm, kept.factor, config)
    d_projected = residual_backward(d_x1, kept.projected, adapter.norms.get(norms.after_attention), config)
    d_h_output = hidden_gradient(d_projected, kept.h_output, output.members)
    d_o = scatter_rows(group_input_gradient(d_projected, d_h_output, weights.output, output), loss_positions, x0)
    del d_projected
    o = mixer_output_buffer(kept, adapter, context, d_o)
    d_qkv = mixer.backward(d_o, kept, weights, context, adapter, o)
    del d_o
    if o is not None:
        group_A_gradients(gather_rows(o, loss_positions), d_h_output, output)
    d_n1 = group_backward(d_qkv, n1, weights.input, adapter.input, kept.h_input, input_gradient=input_gradient)
    del d_qkv
    if d_n1 is None:
        return None
    residual_grad = d_x1 if loss_positions is None else None
    d_x0 = pre_norm_backward(d_n1, n1, adapter.norms.get(norms.before_attention), residual_grad)
    return d_x0 if loss_positions is None else d_x0.index_add_(0, loss_positions, d_x1)
