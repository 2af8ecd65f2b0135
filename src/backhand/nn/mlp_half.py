"""The MLP half of a decoder block: norm, gate and up, their product, down projection, forward and back.

The equations, and what is kept, stand in `nn.block`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.adapted_group import group_backward, group_forward
from backhand.nn.block_adapter import DOWN, GATE_UP, BlockAdapter, norm_backward
from backhand.nn.decoder_weights import BlockWeights
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.scratch import Scratch
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward, glu_recompute
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_forward


class MLPKept(NamedTuple):
    """The MLP half's kept tensors; where only some rows of x₂ are wanted, T stands for these."""

    factor: Tensor  # (T, 1) of the norm before
    gate_up: Tensor | None  # (T, 2f); None when recomputed
    h_gate_up: Tensor | None  # (T, Σ rank); None when recomputed
    h_down: Tensor  # (T, rank)
    projected: RMSNormSaved | None


def gate_up_forward(
    n2: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> tuple[Tensor, Tensor]:
    """[a | u], (T, 2f), and the group's h, from the normed x₁."""
    ffn = config.intermediate_size
    return group_forward(n2, weights.gate_up, weights.gate_up_bias, (ffn, ffn), adapter.gate_up)


def mlp_half_forward(
    x1: Tensor,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    scratch: Scratch,
    *,
    keep_gate_up: bool = True,
) -> tuple[Tensor, MLPKept]:
    """x₂ and what its backward needs; `scratch` is the pass's, for what no block keeps."""
    ffn = config.intermediate_size
    n2, norm = rms_norm_forward(
        x1, weights.mlp_norm, config.norm_eps, config.norm_offset, out=scratch.take("normed", x1.shape, x1)
    )
    gate_up, h_gate_up = gate_up_forward(n2, weights, adapter, config)
    product = scratch.take("product", (x1.shape[0], ffn), x1)
    p, _ = glu_forward(gate_up[:, :ffn], gate_up[:, ffn:], config.activation, out=product)
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


def mlp_half_backward(
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
        d_down = norm_backward(d_x2, kept.projected, adapter, "post_feedforward_layernorm")
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
    return norm_backward(d_n2, norm, adapter, name).add_(d_x2)
