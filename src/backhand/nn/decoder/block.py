"""One decoder block of any family, forward and backward by hand.

    n₁ = norm(x₀)            [q k v] = n₁ W_qkvᵀ (+ LoRA)           q and k are normalized and rotated if the layer does
    o  = attention(q, k, v)  x₁ = x₀ + o W_oᵀ (+ LoRA)              with a norm before the sum in some families
    n₂ = norm(x₁)            [a u] = n₂ W_guᵀ (+ LoRA)
    p  = φ(a) ⊙ u            x₂ = x₁ + p W_dᵀ (+ LoRA)              with a norm before the sum in some families

The T tokens of all documents form one axis. W_qkv and W_gu are stacked projections (`nn.decoder.weights`), a and u are
the outputs of gate and up, and φ is the activation. The first two lines are the mixer sublayer, the last two the MLP
sublayer. The norm and the sum of a sublayer are in `nn.decoder.projections`, and attention between its projections is
in `nn.decoder.attention_mixer`.

Variants, by family:
- Gemma 3 has norms both before and after each sublayer. OLMo 2 has norms after them only: n₁ = x₀ and n₂ = x₁.
- Some layers have another mixer instead of attention, between other projections (`nn.decoder.mixer`).
- Granite multiplies the output of each sublayer by a residual multiplier m before the sum.
- A mixture of experts replaces the MLP sublayer (`nn.decoder.experts`).
- Gemma 4 adds per-layer embeddings to x₂ (`nn.decoder.ple_block`).

Backward is the same list in reverse order, each line by the backward of its op. At both sums the gradient of the
residual stream has two terms: d_x₁ = d_x₂ + (through the MLP) and d_x₀ = d_x₁ + (through attention). With a residual
multiplier m the sublayers receive m d_x₂ and m d_x₁. The backward of a projection is three functions
(`ops.lora_group`): ∂L/∂h with ∂L/∂B, then ∂L/∂x, and then ∂L/∂A as soon as the projection's input is recomputed. The
gated unit computes four of these lines in one pass, from ∂L/∂p to ∂L/∂h of gate and up (`ops.adapted_glu`). Blocks that
train more than LoRA factors, mixtures of experts, and the block in which the backward pass ends use
`nn.decoder.general_backward`.

Saved for backward: x₀, q, k, v, x₁, a, u, the norm factors, every rank-sized h = x Aᵀ, and o if the backward of
attention does not recompute o (`ops.attention`). With q/k norms, q and k are saved before the norm, together with the
norm factors. With norms after the sublayers, their inputs and factors are saved too. Recomputed: p, the rotated q and k
of families with q/k norms, and n₁ and n₂. If only factors are trained, n₁ and n₂ are not formed. The gradients of the
factors are computed from x and the norm factor (`ops.low_rank`).
`recompute="mlp"` drops a, u and their h. `recompute="block"` saves x₀ only and runs the forward pass again.

The loss reads the output of the last block at the supervised positions only. All keys and values are needed, because
later tokens attend to them. From the output projection on, positions are independent, so the last block computes and
saves only `loss_positions`. At all other positions the gradients of o and x₁ are zero.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from backhand.nn.decoder.adapted_group import ALL_GROUPS, BlockAdapter, Group
from backhand.nn.decoder.attention_mixer import ATTENTION_MIXER
from backhand.nn.decoder.delta_mixer import GATED_DELTA_RULE
from backhand.nn.decoder.experts import ExpertsSaved, experts_sublayer_forward
from backhand.nn.decoder.general_backward import general_mixer_backward, general_mlp_backward
from backhand.nn.decoder.mixer import BlockContext, MixerSaved, MLPSaved
from backhand.nn.decoder.ple_block import PLESaved, ple_backward, ple_forward
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
from backhand.nn.families.family import (
    ATTENTION,
    GATED_DELTA,
    KEYS_AS_VALUES,
    SHARED_KEYS,
    SHORT_CONV,
    VALUE_NORMED,
    DecoderConfig,
)
from backhand.nn.scratch import Scratch
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
"""Mixers by the names in `LayerConfig.mixer`."""


class BlockSaved(NamedTuple):
    """Tensors saved for the backward pass of a block. Under recompute="block" everything but x0 is None."""

    x0: Tensor  # (T, hidden)
    mixer: MixerSaved | None
    x1: Tensor | None  # (T or loss positions, hidden)
    mlp: MLPSaved | ExpertsSaved | None
    ple: PLESaved | None = None  # in families with per-layer embeddings or layer scalars


def block_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, recompute: str = "none"
) -> tuple[Tensor, BlockSaved]:
    """Return x₂, (T or loss positions, hidden), and the tensors saved for `block_backward`. x₀ is (T, hidden)."""
    x1, mixer = mixer_sublayer_forward(x0, weights, adapter, context)
    x2, mlp = mlp_sublayer_forward(x1, weights, adapter, context.config, context.scratch)
    ple = None
    if weights.layer_scalar is not None:
        x2, ple = ple_forward(x2, weights, adapter, context)
    if recompute == "block":
        return x2, BlockSaved(x0, None, None, None)
    if recompute == "mlp":
        mlp = mlp._replace(gate_up=None, h_gate_up=None)
    return x2, BlockSaved(x0, mixer, x1, mlp, ple)


def mixer_sublayer_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext
) -> tuple[Tensor, MixerSaved]:
    """Return x₁, (T or loss positions, hidden), and the tensors saved for its backward."""
    config, positions, mixer = context.config, context.loss_positions, MIXERS[context.layer.mixer]
    n1, factor = pre_norm_forward(x0, weights.attention_norm, config, context.scratch)
    qkv, h_input = group_forward(n1, weights.input, weights.input_bias, adapter.input)
    o, inner = mixer.forward(qkv, weights, context)
    x1, h_output, post_norm = residual_forward(
        *(gather_rows(x0, positions), gather_rows(o, positions), weights.output, weights.output_bias),
        *(adapter.output, weights.after_attention_norm, config),
    )
    saved_output = None if mixer.recomputes_output(o, config) else o
    return x1, MixerSaved(factor, qkv, saved_output, inner, h_input, h_output, post_norm)


def mlp_sublayer_forward(
    x1: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig, scratch: Scratch
) -> tuple[Tensor, MLPSaved | ExpertsSaved]:
    """Return x₂ for x₁, (T, hidden) both, and the tensors saved for its backward."""
    if weights.router is not None:
        return experts_sublayer_forward(x1, weights, adapter, config, scratch)
    ffn = config.intermediate_size
    n2, factor = pre_norm_forward(x1, weights.mlp_norm, config, scratch)
    gate_up, h_gate_up = group_forward(n2, weights.gate_up, weights.gate_up_bias, adapter.gate_up)
    buffer = scratch.take("product", (x1.shape[0], ffn), x1)
    p, _ = glu_forward(gate_up[:, :ffn], gate_up[:, ffn:], config.activation, out=buffer)
    x2, h_down, post_norm = residual_forward(
        x1, p, weights.down, weights.down_bias, adapter.down, weights.after_mlp_norm, config
    )
    return x2, MLPSaved(factor, gate_up, h_gate_up, h_down, post_norm)


def block_backward(
    d_x2: Tensor,
    saved: BlockSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    input_grads: frozenset[Group] = ALL_GROUPS,
) -> Tensor | None:
    """Return d_x₀, (T, hidden), and add the gradients of trained tensors to the flat buffer.

    Args:
        d_x2: ∂L/∂x₂, at the loss positions. It may be overwritten.
        saved: from `block_forward`. The gradient of [a | u] overwrites [a | u].
        input_grads: groups whose input gradient is needed. In the lowest trained block the backward pass ends at the
            first group that is not in the set, and the function returns None.
    """
    x0, mixer, x1, mlp, ple = saved
    if mixer is None or x1 is None:
        x1, mixer = mixer_sublayer_forward(x0, weights, adapter, context)
    if mlp is None:
        x2, mlp = mlp_sublayer_forward(x1, weights, adapter, context.config, context.scratch)
        if weights.layer_scalar is not None:
            _, ple = ple_forward(x2, weights, adapter, context)
    if ple is not None:
        d_ple = ple_backward(d_x2, ple, weights, adapter, context, input_grads)
        if d_ple is None:
            return None
        d_x2 = d_ple
    config = context.config
    if isinstance(mlp, MLPSaved) and Group.GATE_UP in input_grads and not adapter.mlp_extras:
        d_x1: Tensor | None = mlp_sublayer_backward(d_x2, x1, mlp, weights, adapter, config)
    else:
        d_x1 = general_mlp_backward(d_x2, x1, mlp, weights, adapter, config, input_grads)
    if d_x1 is None:
        return None
    if Group.OUTPUT in input_grads and not adapter.mixer_extras:
        return mixer_sublayer_backward(d_x1, x0, mixer, weights, adapter, context, Group.INPUT in input_grads)
    return general_mixer_backward(d_x1, x0, mixer, weights, adapter, context, MIXERS[context.layer.mixer], input_grads)


def mlp_sublayer_backward(
    d_x2: Tensor, x1: Tensor, saved: MLPSaved, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> Tensor:
    """Return d_x₁ for d_x₂, (T, hidden) both."""
    gate_up, down, norms = adapter.gate_up.group, adapter.down.group, config.norms
    n2 = pre_norm_saved(x1, weights.mlp_norm, saved.factor, config)
    a_u, h = saved_or_recomputed_gate_up(saved, n2, weights, adapter)
    d_down = residual_backward(d_x2, saved.post_norm, adapter.norms.get(norms.after_mlp), config)
    d_h_down = hidden_gradient(d_down, saved.h_down, down.adapters)
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
    saved: MixerSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    input_gradient: bool,
) -> Tensor | None:
    """Return d_x₀, (T, hidden), for d_x₁ at the loss positions, or None without `input_gradient`."""
    config, positions, mixer = context.config, context.loss_positions, MIXERS[context.layer.mixer]
    output, norms = adapter.output.group, config.norms
    n1 = pre_norm_saved(x0, weights.attention_norm, saved.factor, config)
    d_projected = residual_backward(d_x1, saved.post_norm, adapter.norms.get(norms.after_attention), config)
    d_h_output = hidden_gradient(d_projected, saved.h_output, output.adapters)
    d_o = scatter_rows(group_input_gradient(d_projected, d_h_output, weights.output, output), positions, x0)
    del d_projected
    o = mixer_output_buffer(saved, adapter, context, d_o)
    d_qkv = mixer.backward(d_o, saved, weights, context, adapter, o)
    del d_o
    if o is not None:
        group_A_gradients(gather_rows(o, positions), d_h_output, output)
    d_n1 = group_backward(d_qkv, n1, weights.input, adapter.input, saved.h_input, input_gradient=input_gradient)
    del d_qkv
    if d_n1 is None:
        return None
    residual_grad = d_x1 if positions is None else None
    d_x0 = pre_norm_backward(d_n1, n1, adapter.norms.get(norms.before_attention), residual_grad)
    return d_x0 if positions is None else d_x0.index_add_(0, positions, d_x1)
