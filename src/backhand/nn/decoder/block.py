"""One decoder block, forward and backward by hand, for every family.

    n₁ = norm(x₀)            [q k v] = n₁ W_qkvᵀ (+ LoRA), q and k normed, then rotated where the layer does
    o  = attention(q, k, v)  x₁ = x₀ + o W_oᵀ (+ LoRA)              (with a norm before the sum, where there is one)
    n₂ = norm(x₁)            [a u] = n₂ W_guᵀ (+ LoRA)
    p  = φ(a) ⊙ u            x₂ = x₁ + p W_dᵀ (+ LoRA)              (likewise)

W_qkv and W_gu are projections stacked (`nn.decoder.weights`), a and u the gate and up halves, φ the activation.
How either half begins and ends, the norm and the sum, is `nn.decoder.half_ends`'s; what attention is between its
projections `nn.decoder.attention_half`'s; norms of q and k, and gates, `nn.decoder.attention_extras`'s.
Sandwich norms are norms also behind attention and MLP, as in Gemma 3. OLMo 2 has norms there alone: n₁ = x₀, n₂ = x₁.
T tokens of all documents are one axis. In some layers another mixer stands in attention's place, between other
projections (`nn.decoder.mixer`); what is said here of q, k, v and o holds there for what enters and leaves it.
Gemma 4 has an end behind the MLP (`nn.decoder.per_layer_input`), for which x₂ is what enters.
Where the family has a residual multiplier m (Granite), what is added to the stream is multiplied by it.

Backward is the same list from the bottom up, each line by its op's backward; at the two sums the gradient of the stream
goes both ways, so d_x₁ = d_x₂ + (through the MLP) and d_x₀ = d_x₁ + (through attention); with a residual multiplier m
the branches begin from m d_x₂ and m d_x₁, the sums stay.

Kept for backward: x₀, q, k, v, x₁, a, u, the norm factors, every rank-sized h = x Aᵀ, and o with its log-sum-exp where
attention's backward does not give o again (`ops.attention`). With q/k norms, q and k are kept as they were before the
norm, plus their factors; with norms behind the halves, the two normed outputs as they were before the norm, plus their
factors. p and the rotated q, k of q/k-normed families are recomputed; so are n₁ and n₂, but for factors alone, whose
gradients take them by their norms (`ops.low_rank`).
`recompute="mlp"` keeps no a, u and none of their h; `recompute="block"` keeps x₀ alone and runs the forward again.

Nobody reads the last block's output but the loss, and that only where a token is supervised. Every key and value
counts, since later tokens see them; but from the output projection on each row goes its own way, so that only the
supervised `rows` are computed, kept and differentiated. The gradient of all other rows of o and x₁ is zero.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from backhand.kernels.library import InARow
from backhand.nn.batch import Scratch
from backhand.nn.decoder.adapted_group import (
    DOWN,
    GATE_UP,
    INPUT,
    OUTPUT,
    BlockAdapter,
    group_backward,
    group_backward_without_input,
    group_forward,
    lone_lora_A_gradient,
    unit_backward,
    unit_takes_factors,
)
from backhand.nn.decoder.attention_half import (
    attending_again,
    attention_input_gradient,
    attention_output,
    attention_setting,
    comes_again,
    prepare_qkv,
)
from backhand.nn.decoder.delta_mixer import GATED_DELTA_RULE
from backhand.nn.decoder.experts import ExpertsKept, experts_half_backward, experts_half_forward
from backhand.nn.decoder.family import (
    ATTENTION,
    GATED_DELTA,
    KEYS_AS_VALUES,
    SHARED_KEYS,
    SHORT_CONV,
    VALUE_NORMED,
    DecoderConfig,
)
from backhand.nn.decoder.half_ends import (
    enter_again,
    enter_backward,
    enter_forward,
    entered,
    join_backward,
    join_forward,
)
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixingKept
from backhand.nn.decoder.per_layer_input import EndKept, end_backward, end_forward
from backhand.nn.decoder.shared_attention import SHARED_ATTENTION
from backhand.nn.decoder.short_conv import SHORT_CONVOLUTION
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.attention import attention_forward
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward, glu_recompute
from backhand.ops.rms_norm import RMSNormSaved

RECOMPUTE_MODES = ("none", "mlp", "block")


class BlockSaved(NamedTuple):
    """x0 (T, hidden) always; the rest is None under recompute="block". x1 (wanted, hidden)."""

    x0: Tensor
    mixing: MixingKept | None
    x1: Tensor | None
    mlp: MLPKept | ExpertsKept | None
    end: EndKept | None = None  # where something stands behind the MLP


class MLPKept(NamedTuple):
    """The MLP half's kept tensors; where only some rows of x₂ are wanted, T stands for these; f is the MLP's width."""

    factor: Tensor | None  # (T, 1) of the norm before, if any
    gate_up: Tensor | None  # (T, 2f); None when recomputed
    h_gate_up: Tensor | None  # (T, Σ rank); None when recomputed
    h_down: Tensor  # (T, rank)
    projected: RMSNormSaved | None  # input and factor of the norm after, if any


def block_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, recompute: str = "none"
) -> tuple[Tensor, BlockSaved]:
    """x₂, (T, hidden) or its wanted rows, from x₀, (T, hidden), and what `block_backward` needs under `recompute`."""
    row = InARow()
    x1, mixing = mixing_half_forward(x0, weights, adapter, context, row)
    x2, mlp = mlp_half_forward(
        x1, weights, adapter, context.config, context.scratch, keep_gate_up=recompute == "none", row=row
    )
    end = None
    if weights.layer_scalar is not None:
        x2, end = end_forward(x2, weights, adapter, context)
    if recompute == "block":
        return x2, BlockSaved(x0, None, None, None)
    return x2, BlockSaved(x0, mixing, x1, mlp, end)


def mixing_half_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, row: InARow | None = None
) -> tuple[Tensor, MixingKept]:
    """x₁, (T, hidden) or its wanted rows, and what its backward needs; x₁ has its turn in the row, if one is given."""
    config, mixer = context.config, context.layer.mixer
    turn = InARow() if row is None else row
    n1, factor = enter_forward(x0, weights.attention_norm, config, context.scratch, turn)
    sizes = config.mixers[mixer].sizes
    entering, h_input = group_forward(n1, weights.input, weights.input_bias, sizes, adapter.input, row=turn)
    if mixer == ATTENTION:
        output, own = attention_output(entering, weights, context, turn)
    else:
        turn.make()
        output, own = MIXERS[mixer].forward(entering, weights, context)
    stream, wanted = _rows(x0, context.rows), _rows(output, context.rows)
    after = weights.after_attention_norm
    x1, h_output, projected = join_forward(
        stream, wanted, weights.output, weights.output_bias, adapter.output, after, config, turn
    )
    if row is None:
        turn.make()
    kept_output = None if mixer == ATTENTION and comes_again(output, config) else output
    return x1, MixingKept(factor, entering, kept_output, own, h_input, h_output, projected)


def mlp_half_forward(
    x1: Tensor,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    scratch: Scratch,
    *,
    keep_gate_up: bool = True,
    row: InARow | None = None,
) -> tuple[Tensor, MLPKept | ExpertsKept]:
    """x₂ from x₁, (T, hidden) both, and what its backward needs; x₁ may have its turn in `row`, which is made."""
    row = InARow() if row is None else row
    if weights.router is not None:
        row.make()
        return experts_half_forward(x1, weights, adapter, config, scratch, keep_gate_up=keep_gate_up)
    ffn = config.intermediate_size
    n2, factor = enter_forward(x1, weights.mlp_norm, config, scratch, row)
    gate_up, h_gate_up = gate_up_forward(n2, weights, adapter, config, row)
    product = scratch.take("product", (x1.shape[0], ffn), x1)
    p, _ = glu_forward(gate_up[:, :ffn], gate_up[:, ffn:], config.activation, out=product, row=row)
    x2, h_down, projected = join_forward(
        x1, p, weights.down, weights.down_bias, adapter.down, weights.after_mlp_norm, config, row
    )
    row.make()
    kept = MLPKept(factor, gate_up if keep_gate_up else None, h_gate_up if keep_gate_up else None, h_down, projected)
    return x2, kept


def gate_up_forward(
    n2: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig, row: InARow | None = None
) -> tuple[Tensor, Tensor]:
    """[a | u], (T, 2f), and the group's h, from the normed x₁; in its turn if a row is given."""
    return group_forward(n2, weights.gate_up, weights.gate_up_bias, config.gate_up_sizes, adapter.gate_up, row=row)


def block_backward(
    d_x2: Tensor,
    saved: BlockSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    lora: LoRAParameters,
    lowest_group: int = -1,
) -> Tensor | None:
    """d_x₀, (T, hidden); the adapter's gradients are added to `lora.gradients`.

    Args:
        d_x2: ∂L/∂x₂, or of its wanted rows; it may be overwritten.
        saved: from `block_forward`; the gradient of [a | u] takes their place.
        lora: whose gradient buffer receives.
        lowest_group: INPUT, OUTPUT, GATE_UP, DOWN or one behind them: the first of this block's groups that needs a
            gradient, when nothing below the block does: the pass stops there and returns None. -1 when something
            below needs d_x₀.
    """
    x0, mixing, x1, mlp, end = saved
    if mixing is None or x1 is None:
        x1, mixing = mixing_half_forward(x0, weights, adapter, context)
    if mlp is None:
        x2, mlp = mlp_half_forward(x1, weights, adapter, context.config, context.scratch)
        if weights.layer_scalar is not None:
            _, end = end_forward(x2, weights, adapter, context)
    if end is not None:
        d_end = end_backward(d_x2, end, weights, adapter, context, lora, lowest_group)
        if d_end is None:
            return None
        d_x2 = d_end
    d_x1 = mlp_half_backward(d_x2, x1, mlp, weights, adapter, context.config, lora, lowest_group)
    if d_x1 is None:
        return None
    return mixing_half_backward(d_x1, x0, mixing, weights, adapter, context, lora, lowest_group)


def mlp_half_backward(
    d_x2: Tensor,
    x1: Tensor,
    kept: MLPKept | ExpertsKept,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    lora: LoRAParameters,
    lowest_group: int,
) -> Tensor | None:
    """d_x₁ from d_x₂, (T, hidden) both, or None when nothing below needs it."""
    if isinstance(kept, ExpertsKept):
        return experts_half_backward(d_x2, x1, kept, weights, adapter, config, lora, lowest_group)
    ffn = config.intermediate_size
    d_down = join_backward(d_x2, kept.projected, adapter, config.norms.after_mlp, config)
    gate_up, h_gate_up = kept.gate_up, kept.h_gate_up
    if gate_up is None or h_gate_up is None:
        n2 = enter_again(x1, weights.mlp_norm, kept.factor, config)
        gate_up, h_gate_up = gate_up_forward(n2, weights, adapter, config)
        del n2

    row, d_h_inner = InARow(), None
    below = lowest_group < DOWN
    if adapter.down.extras is not None or not below:
        # p is wanted before there is a ∂L/∂p, or without one.
        glu_saved = GLUSaved(gate_up[:, :ffn], gate_up[:, ffn:], config.activation)
        p, ready = glu_recompute(glu_saved)
        hidden = (config.hidden_size,)
        d_p = group_backward(d_down, p, weights.down, hidden, adapter.down, kept.h_down, lora, input_gradient=below)
        del p, d_down
        if d_p is None:
            return None
        glu_backward(d_p, glu_saved, ready=ready, out=gate_up)
        del ready, glu_saved
    else:
        d_p, d_h = group_backward_without_input(d_down, weights.down, adapter.down, kept.h_down, lora, row)
        if d_down is not d_x2:
            row.make()  # a tensor of its own: it is let go before there are others
        del d_down
        if unit_takes_factors(adapter.gate_up, adapter.down):
            adapters = adapter.gate_up, adapter.down
            d_h_inner = unit_backward(d_p, d_h, gate_up, h_gate_up, config.activation, adapters, lora, row)
        else:
            row.make()
            # p again, in ∂L/∂p's place: for the down projection's lora_A gradient alone.
            glu_saved = GLUSaved(gate_up[:, :ffn], gate_up[:, ffn:], config.activation)
            glu_backward(d_p, glu_saved, out=gate_up, again=None if d_h is None else d_p)
            if d_h is not None:
                lone_lora_A_gradient(d_p, d_h, adapter.down, lora)
            del glu_saved
        del d_h
    del d_p

    d_n2 = group_backward(
        gate_up,  # by now its gradient, or in its turn
        entered(x1, weights.mlp_norm, kept.factor, config),
        weights.gate_up,
        config.gate_up_sizes,
        adapter.gate_up,
        h_gate_up,
        lora,
        input_gradient=lowest_group < GATE_UP,
        d_h=d_h_inner,
        row=None if d_h_inner is None else row,
    )
    if d_n2 is None:
        row.make()
        return None
    name = config.norms.before_mlp
    d_x1 = enter_backward(d_n2, x1, weights.mlp_norm, kept.factor, adapter, name, config, d_x2, row)
    row.make()
    return d_x1


def mixing_half_backward(
    d_x1: Tensor,
    x0: Tensor,
    kept: MixingKept,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    lora: LoRAParameters,
    lowest_group: int,
) -> Tensor | None:
    """d_x₀, (T, hidden), from d_x₁, of its wanted rows, or None when nothing below needs it."""
    config, mixer, rows, output = context.config, context.layer.mixer, context.rows, kept.output
    d_projected = join_backward(d_x1, kept.projected, adapter, config.norms.after_attention, config)
    below = lowest_group < OUTPUT
    if output is None and (adapter.output.extras is not None or not below):
        # Wanted before attention's own backward, or without it.
        q, k, v = attending_again(kept, weights, context)
        output = attention_forward(q, k, v, *attention_setting(weights, context))[0].flatten(1)
    d_output: Tensor | None
    d_h: Tensor | None = None
    row = InARow()
    if output is None:
        d_output, d_h = group_backward_without_input(
            d_projected, weights.output, adapter.output, kept.h_output, lora, row
        )
    else:
        of_output = weights.output, (config.hidden_size,), adapter.output, kept.h_output, lora
        d_output = group_backward(d_projected, _rows(output, rows), *of_output, input_gradient=below)
    if d_output is None:
        return None
    if rows is not None or d_projected is not d_x1:
        row.make()  # as in the MLP's half
    del d_projected
    if rows is not None:
        d_output = d_output.new_zeros(x0.shape[0], d_output.shape[1]).index_copy_(0, rows, d_output)

    if output is None:
        again = None if d_h is None else context.scratch.take("attended", d_output.shape, d_output)
        d_input = attention_input_gradient(d_output, kept, weights, context, adapter, again, row)
        if again is not None and d_h is not None:
            if rows is not None:
                row.make()
            lone_lora_A_gradient(_rows(again, rows), d_h, adapter.output, lora, row)
        del again
    else:
        d_input = MIXERS[mixer].backward(d_output, kept, weights, context, adapter)
    del d_output, d_h
    n1 = entered(x0, weights.attention_norm, kept.factor, config)
    sizes = config.mixers[mixer].sizes
    below = lowest_group < INPUT
    d_n1 = group_backward(
        d_input, n1, weights.input, sizes, adapter.input, kept.h_input, lora, input_gradient=below, row=row
    )
    if d_n1 is None:
        row.make()
        return None
    del d_input
    name = config.norms.before_attention
    around = d_x1 if rows is None else None
    d_x0 = enter_backward(d_n1, x0, weights.attention_norm, kept.factor, adapter, name, config, around, row)
    row.make()
    return d_x0 if rows is None else d_x0.index_add_(0, rows, d_x1)


MIXERS = {
    ATTENTION: Mixer(attention_output, attention_input_gradient, attending=prepare_qkv),
    SHORT_CONV: SHORT_CONVOLUTION,
    GATED_DELTA: GATED_DELTA_RULE,
    **dict.fromkeys((VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS), SHARED_ATTENTION),
}
"""What `LayerConfig.mixer` names."""


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of x; all without a choice."""
    return x if rows is None else x.index_select(0, rows)
