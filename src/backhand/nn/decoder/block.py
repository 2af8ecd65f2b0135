"""One decoder block of any family, forward and backward by hand.

    n₁ = norm(x₀)            [q k v] = n₁ W_qkvᵀ (+ LoRA)           then q and k are rotated by their positions
    o  = attention(q, k, v)  x₁ = x₀ + o W_oᵀ (+ LoRA)
    n₂ = norm(x₁)            [a u] = n₂ W_guᵀ (+ LoRA)
    p  = φ(a) ⊙ u            x₂ = x₁ + p W_dᵀ (+ LoRA)

The first two lines are the mixer sublayer, the last two the MLP sublayer. The input x₀ is (T, hidden): the T tokens of
all documents, one after another. W_qkv and W_gu are stacked projections (`nn.decoder.weights`). W_o is the output
projection of attention, and W_d is `down_proj`. a and u are the outputs of gate and up, and φ is the activation.
Projections, norms and residual sums are in `nn.decoder.projections`. Everything between [q k v] and o is in
`nn.decoder.attention_mixer`.

Families differ from these lines as follows:
- Some normalize q and k before the rotation. Some layers have no rotation.
- Gemma 3 also normalizes the output of each sublayer, before the sum. OLMo 2 has only this norm: n₁ = x₀ and n₂ = x₁.
- Encoders such as BERT are computed by the same code: layer norms, and attention in both directions. BERT normalizes
  the sums instead: x₁ = norm(x₀ + …), with n₁ = x₀ and n₂ = x₁. Its MLP has no gate: p = φ(a).
- In some layers another mixer replaces attention, and has its own input projections (`nn.decoder.mixer`).
- Granite multiplies the output of each sublayer by a constant m, the residual multiplier, before the sum. Falcon-H1
  multiplies the outputs of several modules by constants.
- Falcon-H1's mixer is attention and Mamba-2 in parallel, with one output projection each (`nn.decoder.parallel_mixer`).
- Nemotron-H's blocks are a mixer sublayer alone: x₂ = x₁. In some of them an MLP replaces the mixer (`mlp_mixer`).
- A mixture of experts replaces the MLP sublayer, or is added to its MLP (`nn.decoder.experts`).
- Gemma 4 adds per-layer embeddings to x₂ and multiplies the sum by a scalar (`nn.decoder.ple_block`).

The loss reads the output of the last block at P positions only, the loss positions. Attention needs the keys and values
of all tokens, but everything after it treats each position separately. Therefore the last block computes o W_oᵀ and the
MLP only at the loss positions, and ∂L/∂o is zero at all others. In the other blocks P = T.

Backward takes the lines in reverse order and applies the backward of each op:
- At both sums, the gradient of x has two terms: d_x₁ = d_x₂ + (the gradient through the MLP), and d_x₀ = d_x₁ + (the
  gradient through attention). With a residual multiplier m, the sublayers receive m d_x₂ and m d_x₁. In families that
  normalize the sums, the backward of this norm comes first.
- The backward of a group of projections has three parts: `h_gradient` returns ∂L/∂h and adds ∂L/∂B,
  `group_input_gradient` returns ∂L/∂x, and `group_A_gradients` adds ∂L/∂A. The third reads the input of the projection.
  If this input is the output of a norm, the tensors that the norm saved are enough. `group_gradients` is the last two
  parts in one call, and `group_backward` is all three.
- `ops.adapted_glu` computes three things while it reads a and u once: the backward of p = φ(a) ⊙ u, `h_gradient` of
  gate and up, and `group_A_gradients` of down, whose input is p. It receives d_p, and returns ∂L/∂[a u] and the ∂L/∂h
  of gate and up.

`nn.decoder.general_backward` has the backward functions for mixtures of experts, for MLPs without a gate, for
Falcon-H1, and for sublayers that train more than LoRA factors. It is also used if the backward pass ends in the MLP
sublayer or at W_o. A LoRA adapter of all linear layers of a Llama never needs these functions, because the backward
pass ends at W_qkv of the first block.

Saved for the backward:
- x₀, x₁, a, u, v, and of both norms the inverse RMS of their input, 1 / √(mean x² + ε);
- q and k after the rotation. Families that normalize q and k save them before norm and rotation instead, and also save
  the inverse RMS of these norms;
- h = x Aᵀ of every adapted projection, which has r columns (r is the rank);
- o, unless the backward of attention recomputes it (`ops.attention`);
- in families that normalize the output of a sublayer: this output before the norm, and its inverse RMS.

With `recompute="mlp"`, a, u and their h are not saved. With `recompute="block"`, only x₀ is saved, and the backward
runs the forward pass of the block again.

The backward always recomputes p. In families that normalize q and k, it also applies norm and rotation to the saved q
and k again. It recomputes n₁ and n₂ only if it needs them as tensors, for example with dropout. Otherwise it computes
∂L/∂A from x₀ or x₁ and the inverse RMS (`ops.low_rank`).
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
from backhand.nn.decoder.mlp_mixer import MLP_MIXER
from backhand.nn.decoder.parallel_mixer import PARALLEL
from backhand.nn.decoder.ple_block import PLESaved, ple_backward, ple_forward
from backhand.nn.decoder.projections import (
    gate_up_forward,
    gather_rows,
    group_backward,
    group_forward,
    mixer_output_buffer,
    mixer_output_forward,
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
from backhand.nn.decoder.ssm_mixer import STATE_SPACE
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import (
    ATTENTION,
    ATTENTION_AND_SSM,
    GATED_DELTA,
    KEYS_AS_VALUES,
    MLP,
    SHARED_KEYS,
    SHORT_CONV,
    SSM,
    VALUE_NORMED,
    DecoderConfig,
)
from backhand.nn.scratch import Scratch
from backhand.ops.activation import activate
from backhand.ops.adapted_glu import AdaptedGLUSaved, adapted_glu_backward
from backhand.ops.glu import glu_forward
from backhand.ops.lora_group import group_A_gradients, group_gradients, group_input_gradient
from backhand.ops.low_rank import h_gradient

RECOMPUTE_MODES = ("none", "mlp", "block")

MIXERS = {
    ATTENTION: ATTENTION_MIXER,
    SHORT_CONV: SHORT_CONVOLUTION,
    GATED_DELTA: GATED_DELTA_RULE,
    SSM: STATE_SPACE,
    ATTENTION_AND_SSM: PARALLEL,
    MLP: MLP_MIXER,
    **dict.fromkeys((VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS), SHARED_ATTENTION),
}
"""Mixers by the names in `LayerConfig.mixer`."""


class BlockSaved(NamedTuple):
    """Tensors saved for the backward pass of a block. With recompute="block" everything but x0 is None.

    mlp is also None in blocks without an MLP sublayer. The output of such a block is x1.
    """

    x0: Tensor  # (T, hidden)
    mixer: MixerSaved | None
    x1: Tensor | None  # (P, hidden)
    mlp: MLPSaved | ExpertsSaved | None
    ple: PLESaved | None = None  # None in families without per-layer embeddings


def block_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, recompute: str = "none"
) -> tuple[Tensor, BlockSaved]:
    """Map x₀ (T, hidden) to x₂ (P, hidden), and return x₂ and the tensors saved for `block_backward`."""
    x1, mixer_saved = mixer_sublayer_forward(x0, weights, adapter, context)
    x2, mlp_saved = mlp_sublayer_forward(x1, weights, adapter, context.config, context.scratch)
    ple_saved = None
    if weights.layer_scalar is not None:
        x2, ple_saved = ple_forward(x2, weights, adapter, context)
    if recompute == "block":
        return x2, BlockSaved(x0, None, None, None)
    if recompute == "mlp" and mlp_saved is not None:
        if isinstance(mlp_saved, ExpertsSaved) and mlp_saved.mlp is not None:
            mlp_saved = mlp_saved._replace(mlp=mlp_saved.mlp._replace(gate_up=None, h_gate_up=None))
        mlp_saved = mlp_saved._replace(gate_up=None, h_gate_up=None)
    return x2, BlockSaved(x0, mixer_saved, x1, mlp_saved, ple_saved)


def mixer_sublayer_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext
) -> tuple[Tensor, MixerSaved]:
    """Map x₀ (T, hidden) to x₁ (P, hidden), and return x₁ and the tensors saved for the backward."""
    config, positions, mixer = context.config, context.loss_positions, MIXERS[context.layer.mixer]
    n1, statistics = pre_norm_forward(x0, weights.attention_norm, weights.attention_norm_bias, config, context.scratch)
    qkv, h_input = group_forward(n1, weights.input, weights.input_bias, adapter.input)
    o, inner = mixer.forward(qkv, weights, context)
    x1, h_output, h_second, post_norm = mixer_output_forward(
        gather_rows(x0, positions), gather_rows(o, positions), weights, adapter, config
    )
    saved_o = None if mixer.recomputes_output(o, context) else o
    return x1, MixerSaved(
        statistics=statistics,
        projected=qkv,
        mixed=saved_o,
        inner=inner,
        h_input=h_input,
        h_output=h_output,
        post_norm=post_norm,
        h_second=h_second,
    )


def mlp_sublayer_forward(
    x1: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig, scratch: Scratch
) -> tuple[Tensor, MLPSaved | ExpertsSaved | None]:
    """Map x₁ to x₂, both of shape (P, hidden), and return x₂ and the tensors saved for the backward.

    Return x₁ itself and None in blocks without an MLP sublayer.
    """
    if weights.down is None:
        return x1, None
    if weights.router is not None:
        return experts_sublayer_forward(x1, weights, adapter, config, scratch)
    ffn = config.intermediate_size
    n2, statistics = pre_norm_forward(x1, weights.mlp_norm, weights.mlp_norm_bias, config, scratch)
    gate_up, h_gate_up = gate_up_forward(n2, weights, adapter, config)
    buffer = scratch.take("product", (x1.shape[0], ffn), x1)
    if config.gated_mlp:
        p, _ = glu_forward(gate_up[:, :ffn], gate_up[:, ffn:], config.activation, out=buffer)
    else:
        p = activate(gate_up, config.activation, buffer)
    x2, h_down, post_norm = residual_forward(
        x1,
        p,
        weights.down,
        weights.down_bias,
        adapter.down,
        (weights.after_mlp_norm, weights.after_mlp_norm_bias),
        config,
        config.multipliers.down,
    )
    return x2, MLPSaved(statistics, gate_up, h_gate_up, h_down, post_norm)


def block_backward(
    d_x2: Tensor,
    saved: BlockSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    input_grad_groups: frozenset[Group] = ALL_GROUPS,
) -> Tensor | None:
    """Map d_x₂ (P, hidden) to d_x₀ (T, hidden), and add the gradients of trained tensors to the flat buffer.

    Args:
        d_x2: ∂L/∂x₂. It may be overwritten.
        saved: from `block_forward`. [a u] is overwritten by its gradient.
        input_grad_groups: groups of projections whose input gradient is needed. If the backward pass ends in this
            block, these are the groups that follow the lowest trained group in the forward pass, otherwise all groups.
            The backward visits all groups in reverse order and ends at the first one that is not in this set.

    Returns:
        d_x₀, or None if the backward pass ends in this block.
    """
    x0, mixer_saved, x1, mlp_saved, ple_saved = saved
    if mixer_saved is None or x1 is None:
        x1, mixer_saved = mixer_sublayer_forward(x0, weights, adapter, context)
    if mlp_saved is None:
        x2, mlp_saved = mlp_sublayer_forward(x1, weights, adapter, context.config, context.scratch)
        if weights.layer_scalar is not None:
            _, ple_saved = ple_forward(x2, weights, adapter, context)
    if ple_saved is not None:
        d_before_ple = ple_backward(d_x2, ple_saved, weights, adapter, context, input_grad_groups)
        if d_before_ple is None:
            return None
        d_x2 = d_before_ple
    config, needs_d_n1 = context.config, Group.INPUT in input_grad_groups
    d_x1: Tensor | None = d_x2
    plain_mlp = config.gated_mlp and not adapter.mlp_extras and config.multipliers.gate == 1.0
    if plain_mlp and Group.GATE_UP in input_grad_groups and isinstance(mlp_saved, MLPSaved):
        d_x1 = mlp_sublayer_backward(d_x2, x1, mlp_saved, weights, adapter, config)
    elif mlp_saved is not None:
        d_x1 = general_mlp_backward(d_x2, x1, mlp_saved, weights, adapter, config, input_grad_groups)
    if d_x1 is None:
        return None
    if Group.OUTPUT in input_grad_groups and not adapter.mixer_extras and weights.second_output is None:
        return mixer_sublayer_backward(d_x1, x0, mixer_saved, weights, adapter, context, needs_d_n1)
    mixer = MIXERS[context.layer.mixer]
    return general_mixer_backward(d_x1, x0, mixer_saved, weights, adapter, context, mixer, input_grad_groups)


def mlp_sublayer_backward(
    d_x2: Tensor, x1: Tensor, saved: MLPSaved, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> Tensor:
    """Map d_x₂ to d_x₁, both of shape (P, hidden), and add the gradients of the MLP's factors to the flat buffer."""
    assert weights.gate_up is not None and weights.down is not None
    gate_up_lora, down_lora, norms = adapter.gate_up.lora, adapter.down.lora, config.norms
    # x₁ and the inverse RMS, which replace n₂ in the backward
    n2_saved = pre_norm_saved(x1, weights.mlp_norm, weights.mlp_norm_bias, saved.statistics, config)
    a_u, h = saved_or_recomputed_gate_up(saved, n2_saved, weights, adapter, config)
    d_norm_weight, multiplier = adapter.d_norms.get(norms.after_mlp), config.multipliers.down
    d_projected, d_stream = residual_backward(d_x2, saved.post_norm, d_norm_weight, config, multiplier)
    d_h_down = h_gradient(d_projected, saved.h_down, down_lora.factors)
    d_p = group_input_gradient(d_projected, d_h_down, weights.down, down_lora)
    del d_projected
    glu_saved = AdaptedGLUSaved(a_u, config.activation, gate_up_lora, h, down_lora, d_h_down)
    d_a_u, d_h, *_ = adapted_glu_backward(d_p, glu_saved, out=a_u)
    del d_p
    d_n2 = group_gradients(d_a_u, n2_saved, d_h, weights.gate_up, gate_up_lora)
    return pre_norm_backward(d_n2, n2_saved, adapter.d_norms.get(norms.before_mlp), d_stream)


def mixer_sublayer_backward(
    d_x1: Tensor,
    x0: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    input_gradient: bool,
) -> Tensor | None:
    """Map d_x₁ (P, hidden) to d_x₀ (T, hidden), and add the gradients of the mixer's factors to the flat buffer.

    Without `input_gradient`, d_x₀ is not needed, and the function returns None.
    """
    config, positions, mixer = context.config, context.loss_positions, MIXERS[context.layer.mixer]
    output_lora, norms = adapter.output.lora, config.norms
    n1_saved = pre_norm_saved(x0, weights.attention_norm, weights.attention_norm_bias, saved.statistics, config)
    d_norm_weight, multiplier = adapter.d_norms.get(norms.after_attention), config.multipliers.output
    d_projected, d_stream = residual_backward(d_x1, saved.post_norm, d_norm_weight, config, multiplier)
    d_h_output = h_gradient(d_projected, saved.h_output, output_lora.factors)
    d_o = scatter_rows(group_input_gradient(d_projected, d_h_output, weights.output, output_lora), positions, x0)
    del d_projected
    # the saved o, or a buffer for mixer.backward to fill; None if o is not saved and no gradient reads it
    o = mixer_output_buffer(saved, adapter, context, d_o)
    d_qkv = mixer.backward(d_o, saved, weights, context, adapter, o)
    del d_o
    if o is not None:
        group_A_gradients(gather_rows(o, positions), d_h_output, output_lora)
    d_n1 = group_backward(d_qkv, n1_saved, weights.input, adapter.input, saved.h_input, input_gradient=input_gradient)
    del d_qkv
    if d_n1 is None:
        return None
    residual_grad = d_stream if positions is None else None
    d_x0 = pre_norm_backward(d_n1, n1_saved, adapter.d_norms.get(norms.before_attention), residual_grad)
    return d_x0 if positions is None else d_x0.index_add_(0, positions, d_stream)
