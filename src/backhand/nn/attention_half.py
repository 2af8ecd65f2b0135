"""The attention half of a decoder block: norm, projections, rotation, attention, output projection, forward and back.

The equations, what is kept, and what the last block leaves out stand in `nn.block`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.adapted_group import group_backward, group_forward
from backhand.nn.block_adapter import OUTPUT, QKV, BlockAdapter, norm_backward
from backhand.nn.decoder_weights import BlockWeights
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.scratch import Scratch
from backhand.ops.attention import AttentionSaved, attention_backward, attention_forward
from backhand.ops.document_groups import Run
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_forward
from backhand.ops.rotary import RotaryTable, rotary_backward, rotary_forward


class BlockContext(NamedTuple):
    """What a block needs besides tensors: family, window, the tokens' angles, the documents, the rows wanted.

    `scratch` is the pass's, for what no block keeps.
    """

    config: DecoderConfig
    window: int | None
    rotary: RotaryTable
    runs: tuple[Run, ...]
    scratch: Scratch
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


def attention_half_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext
) -> tuple[Tensor, AttentionKept]:
    """x₁ and what its backward needs."""
    config = context.config
    heads, kv_heads, head_dim = config.num_heads, config.num_key_value_heads, config.head_dim
    n1, norm = rms_norm_forward(
        x0,
        weights.attention_norm,
        config.norm_eps,
        config.norm_offset,
        out=context.scratch.take("normed", x0.shape, x0),
    )
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    qkv, h_qkv = group_forward(n1, weights.qkv, weights.qkv_bias, sizes, adapter.qkv)
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


def attention_half_backward(
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
        d_projected = norm_backward(d_x1, kept.projected, adapter, "post_attention_layernorm")
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
    d_x0 = norm_backward(d_n1, norm, adapter, "input_layernorm")
    return d_x0.add_(d_x1) if rows is None else d_x0.index_add_(0, rows, d_x1)


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
            gradient.copy_(norm_backward(gradient, norm, adapter, name))
    return d_qkv
