"""One decoder block, forward and backward by hand, for every family.

    n₁ = norm(x₀)            [q k v] = n₁ W_qkvᵀ (+ LoRA), q and k normed where the family does, then rotated
    o  = attention(q, k, v)  x₁ = x₀ + o W_oᵀ (+ LoRA)              (with a norm before the sum for sandwich norms)
    n₂ = norm(x₁)            [a u] = n₂ W_guᵀ (+ LoRA)
    p  = φ(a) ⊙ u            x₂ = x₁ + p W_dᵀ (+ LoRA)              (likewise)

Backward is the same list from the bottom up, each line by its op's backward; at the two sums the gradient of the stream
goes both ways, so d_x₁ = d_x₂ + (through the MLP) and d_x₀ = d_x₁ + (through attention).

Kept for backward: x₀, q, k, v, o, log-sum-exp, x₁, a, u, the norm factors, and every rank-sized x Aᵀ. With q/k norms, q
and k are kept as they were before the norm, plus their factors; with sandwich norms, the two normed outputs as they
were before the norm, plus their factors. n₁, n₂, p and the rotated q, k of q/k-normed families are recomputed.
`recompute="mlp"` keeps no a, u and none of their x Aᵀ; `recompute="block"` keeps x₀ alone and runs the forward again.

Nobody reads the last block's output but the loss, and that only where a token is supervised. Every key and value
counts, since later tokens see them; but from the output projection on each row goes its own way, so that only the
supervised `rows` are computed, kept and differentiated. The gradient of all other rows of o and x₁ is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.adapted_group import group_backward, group_forward
from backhand.nn.block_adapter import DOWN, GATE_UP, OUTPUT, QKV, BlockAdapter
from backhand.nn.decoder_weights import BlockWeights
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.attention import AttentionSaved, attention_backward, attention_forward
from backhand.ops.document_groups import Run
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward, glu_recompute
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import RotaryTable, rotary_backward, rotary_forward

RECOMPUTE_MODES = ("none", "mlp", "block")


class BlockContext(NamedTuple):
    """What a block needs besides tensors: family, window, the tokens' angles, the documents, the rows wanted."""

    config: DecoderConfig
    window: int | None
    rotary: RotaryTable
    runs: tuple[Run, ...]
    rows: Tensor | None = None  # (wanted,) int64, of x₂; None for all
    shared: int = 0  # tokens of the shared prefix


class AttentionKept(NamedTuple):
    """The attention half's kept tensors (T tokens, H heads): see the module docstring."""

    factor: Tensor  # (T, 1) of the norm before
    qkv: Tensor  # (T, q + 2k): rotated, or before the q/k norm
    output: Tensor  # (T, H, head_dim)
    log_sum_exp: Tensor  # (≤ T · H,): of what torch's kernels attended, see `ops.attention`
    h_qkv: Tensor  # (T, Σ rank)
    h_output: Tensor  # (T, rank)
    q_factor: Tensor | None  # (T, H, 1), families with q/k norm
    k_factor: Tensor | None
    projected: RMSNormSaved | None  # input and factor of the norm after, families with sandwich norms


class MLPKept(NamedTuple):
    """The MLP half's kept tensors; where only some rows of x₂ are wanted, T stands for these."""

    factor: Tensor  # (T, 1) of the norm before
    gate_up: Tensor | None  # (T, 2f); None when recomputed
    h_gate_up: Tensor | None  # (T, Σ rank); None when recomputed
    h_down: Tensor  # (T, rank)
    projected: RMSNormSaved | None


class BlockSaved(NamedTuple):
    """x0 (T, hidden) always; the rest is None under recompute="block". x1 (wanted, hidden)."""

    x0: Tensor
    attention: AttentionKept | None
    x1: Tensor | None
    mlp: MLPKept | None


def attention_half_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext
) -> tuple[Tensor, AttentionKept]:
    """x₁ and what its backward needs."""
    config = context.config
    heads, kv_heads, head_dim = config.num_heads, config.num_key_value_heads, config.head_dim
    n1, norm = rms_norm_forward(x0, weights.attention_norm, config.norm_eps, config.norm_offset)
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    qkv, h_qkv = group_forward(n1, weights.qkv, weights.qkv_bias, sizes, adapter.qkv)
    del n1
    q, k, v, q_factor, k_factor = prepare_qkv(qkv, weights, context)
    output, attended = attention_forward(
        q, k, v, context.runs, config.attention_scaling, context.window, context.shared
    )
    sandwich = weights.after_attention_norm
    stream, wanted = _rows(x0, context.rows), _rows(output.flatten(1), context.rows)
    residual = None if sandwich is not None else stream
    x1, h_output = group_forward(
        wanted, weights.output, weights.output_bias, (config.hidden_size,), adapter.output, residual
    )
    projected = None
    if sandwich is not None:
        normed, projected = rms_norm_forward(x1, sandwich, config.norm_eps, config.norm_offset)
        x1 = normed.add_(stream)
    return x1, AttentionKept(
        norm.factor, qkv, output, attended.log_sum_exp, h_qkv, h_output, q_factor, k_factor, projected
    )


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of x; all without a choice."""
    return x if rows is None else x.index_select(0, rows)


def prepare_qkv(
    qkv: Tensor,
    weights: BlockWeights,
    context: BlockContext,
    kept_factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k normed (where the family does) and rotated, and v, as (T, heads, head_dim), and the q/k norm factors.

    Without a q/k norm the rotation happens in place: qkv then holds what attention saw. With one, qkv stays untouched.
    """
    config = context.config
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    by_head = qkv.unflatten(1, (heads + 2 * kv_heads, config.head_dim))
    q, k, v = by_head.split([heads, kv_heads, kv_heads], dim=1)
    if weights.q_norm is None or weights.k_norm is None:
        turned = by_head[:, : heads + kv_heads]
        rotary_forward(turned, context.rotary, out=turned)
        return q, k, v, None, None
    if kept_factors is None:
        q, q_saved = rms_norm_forward(q, weights.q_norm, config.norm_eps, config.norm_offset)
        k, k_saved = rms_norm_forward(k, weights.k_norm, config.norm_eps, config.norm_offset)
        kept_factors = (q_saved.factor, k_saved.factor)
    else:
        q = rms_norm_apply(q, weights.q_norm, kept_factors[0], config.norm_offset)
        k = rms_norm_apply(k, weights.k_norm, kept_factors[1], config.norm_offset)
    rotary_forward(q, context.rotary, out=q)
    rotary_forward(k, context.rotary, out=k)
    return q, k, v, *kept_factors


def gate_up_forward(
    n2: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> tuple[Tensor, Tensor]:
    """[a | u], (T, 2f), and the group's h, from the normed x₁."""
    ffn = config.intermediate_size
    return group_forward(n2, weights.gate_up, weights.gate_up_bias, (ffn, ffn), adapter.gate_up)


def mlp_half_forward(
    x1: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig, keep_gate_up: bool = True
) -> tuple[Tensor, MLPKept]:
    """x₂ and what its backward needs."""
    ffn = config.intermediate_size
    n2, norm = rms_norm_forward(x1, weights.mlp_norm, config.norm_eps, config.norm_offset)
    gate_up, h_gate_up = gate_up_forward(n2, weights, adapter, config)
    del n2
    p, _ = glu_forward(gate_up[:, :ffn], gate_up[:, ffn:], config.activation)
    sandwich = weights.after_mlp_norm
    residual = None if sandwich is not None else x1
    x2, h_down = group_forward(p, weights.down, weights.down_bias, (config.hidden_size,), adapter.down, residual)
    projected = None
    if sandwich is not None:
        normed, projected = rms_norm_forward(x2, sandwich, config.norm_eps, config.norm_offset)
        x2 = normed.add_(x1)
    kept = MLPKept(
        norm.factor, gate_up if keep_gate_up else None, h_gate_up if keep_gate_up else None, h_down, projected
    )
    return x2, kept


def block_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, recompute: str = "none"
) -> tuple[Tensor, BlockSaved]:
    """x₂, (T, hidden) or its wanted rows, and what `block_backward` needs under the given recompute mode."""
    x1, attention = attention_half_forward(x0, weights, adapter, context)
    x2, mlp = mlp_half_forward(x1, weights, adapter, context.config, keep_gate_up=recompute == "none")
    if recompute == "block":
        return x2, BlockSaved(x0, None, None, None)
    return x2, BlockSaved(x0, attention, x1, mlp)


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
        saved: from `block_forward`.
        lora: whose gradient buffer receives.
        lowest_group: the first of this block's groups that needs a gradient, when nothing below the block does: the
            pass stops there and returns None. -1 when something below needs d_x₀.
    """
    x0, attention, x1, mlp = saved
    if attention is None or x1 is None:
        x1, attention = attention_half_forward(x0, weights, adapter, context)
    if mlp is None:
        _, mlp = mlp_half_forward(x1, weights, adapter, context.config)
    d_x1 = _mlp_half_backward(d_x2, x1, mlp, weights, adapter, context.config, lora, lowest_group)
    if d_x1 is None:
        return None
    return _attention_half_backward(d_x1, x0, attention, weights, adapter, context, lora, lowest_group)


def _mlp_half_backward(
    d_x2: Tensor,
    x1: Tensor,
    kept: MLPKept,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    lora: LoRAParameters,
    lowest_group: int,
) -> Tensor | None:
    """d_x₁, or None when nothing below needs it."""
    ffn = config.intermediate_size
    d_down = d_x2
    if kept.projected is not None:
        d_down = _norm_backward(d_x2, kept.projected, adapter, "post_feedforward_layernorm")
    n2 = rms_norm_apply(x1, weights.mlp_norm, kept.factor, config.norm_offset)
    gate_up, h_gate_up = kept.gate_up, kept.h_gate_up
    if gate_up is None or h_gate_up is None:
        gate_up, h_gate_up = gate_up_forward(n2, weights, adapter, config)

    # p again, for the down projection's lora_A gradient.
    glu_saved = GLUSaved(gate_up[:, :ffn], gate_up[:, ffn:], config.activation)
    p, ready = glu_recompute(glu_saved)
    hidden = (config.hidden_size,)
    d_p = group_backward(
        d_down, p, weights.down, hidden, adapter.down, kept.h_down, lora, input_gradient=lowest_group < DOWN
    )
    del p
    if d_p is None:
        return None
    d_gate_up = torch.empty_like(gate_up)
    glu_backward(d_p, glu_saved, ready=ready, out=d_gate_up)
    del d_p, ready

    d_n2 = group_backward(
        d_gate_up,
        n2,
        weights.gate_up,
        (ffn, ffn),
        adapter.gate_up,
        h_gate_up,
        lora,
        input_gradient=lowest_group < GATE_UP,
    )
    if d_n2 is None:
        return None
    norm = RMSNormSaved(x1, weights.mlp_norm, kept.factor, config.norm_offset)
    name = "post_attention_layernorm" if weights.after_attention_norm is None else "pre_feedforward_layernorm"
    return _norm_backward(d_n2, norm, adapter, name).add_(d_x2)


def _attention_half_backward(
    d_x1: Tensor,
    x0: Tensor,
    kept: AttentionKept,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    lora: LoRAParameters,
    lowest_group: int,
) -> Tensor | None:
    """d_x₀, or None when nothing below needs it."""
    config, rows = context.config, context.rows
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    d_projected = d_x1
    if kept.projected is not None:
        d_projected = _norm_backward(d_x1, kept.projected, adapter, "post_attention_layernorm")
    d_output = group_backward(
        d_projected,
        _rows(kept.output.flatten(1), rows),
        weights.output,
        (config.hidden_size,),
        adapter.output,
        kept.h_output,
        lora,
        input_gradient=lowest_group < OUTPUT,
    )
    if d_output is None:
        return None
    if rows is not None:
        d_output = d_output.new_zeros(x0.shape[0], d_output.shape[1]).index_copy_(0, rows, d_output)

    d_qkv = attention_input_gradient(d_output, kept, weights, context, adapter)
    n1 = rms_norm_apply(x0, weights.attention_norm, kept.factor, config.norm_offset)
    sizes = (heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim)
    d_n1 = group_backward(
        d_qkv, n1, weights.qkv, sizes, adapter.qkv, kept.h_qkv, lora, input_gradient=lowest_group < QKV
    )
    if d_n1 is None:
        return None
    norm = RMSNormSaved(x0, weights.attention_norm, kept.factor, config.norm_offset)
    d_x0 = _norm_backward(d_n1, norm, adapter, "input_layernorm")
    return d_x0.add_(d_x1) if rows is None else d_x0.index_add_(0, rows, d_x1)


def _norm_backward(d_y: Tensor, saved: RMSNormSaved, adapter: BlockAdapter, name: str) -> Tensor:
    """d_x of a norm; where the norm is trained, the gradient of its weight is added to the flat buffer."""
    receiver = adapter.norms.get(name)
    grads = rms_norm_backward(d_y, saved, weight_gradient=receiver is not None)
    if receiver is not None and grads.d_weight is not None:
        receiver.add_(grads.d_weight)
    return grads.d_x


def attention_input_gradient(
    d_output: Tensor, kept: AttentionKept, weights: BlockWeights, context: BlockContext, adapter: BlockAdapter
) -> Tensor:
    """∂L/∂[q k v], (T, q + 2k), as the projections gave them: through attention, back through rotation and q/k norm."""
    config = context.config
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    by_head = kept.qkv.unflatten(1, (heads + 2 * kv_heads, config.head_dim))
    raw_q, raw_k, v = by_head.split([heads, kv_heads, kv_heads], dim=1)
    q, k = raw_q, raw_k
    if kept.q_factor is not None and kept.k_factor is not None:
        q, k, _, _, _ = prepare_qkv(kept.qkv, weights, context, (kept.q_factor, kept.k_factor))
    saved = AttentionSaved(
        q,
        k,
        v,
        kept.output,
        kept.log_sum_exp,
        context.runs,
        config.attention_scaling,
        context.window,
        context.shared,
    )
    d_qkv = torch.empty_like(kept.qkv)
    d_by_head = d_qkv.unflatten(1, (heads + 2 * kv_heads, config.head_dim))
    attention_backward(d_output.unflatten(1, (heads, config.head_dim)), saved, out=d_by_head)
    turned = d_by_head[:, : heads + kv_heads]
    rotary_backward(turned, context.rotary, out=turned)
    for name, raw, factor, weight, gradient in (
        ("self_attn.q_norm", raw_q, kept.q_factor, weights.q_norm, d_by_head[:, :heads]),
        ("self_attn.k_norm", raw_k, kept.k_factor, weights.k_norm, d_by_head[:, heads : heads + kv_heads]),
    ):
        if factor is not None and weight is not None:
            norm = RMSNormSaved(raw, weight, factor, config.norm_offset)
            gradient.copy_(_norm_backward(gradient, norm, adapter, name))
    return d_qkv
