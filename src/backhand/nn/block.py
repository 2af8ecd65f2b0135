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

from torch import Tensor

from backhand.nn.attention_half import (
    AttentionKept,
    BlockContext,
    attention_half_backward,
    attention_half_forward,
)
from backhand.nn.block_adapter import BlockAdapter
from backhand.nn.decoder_weights import BlockWeights
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.mlp_half import MLPKept, mlp_half_backward, mlp_half_forward

RECOMPUTE_MODES = ("none", "mlp", "block")


class BlockSaved(NamedTuple):
    """x0 (T, hidden) always; the rest is None under recompute="block". x1 (wanted, hidden)."""

    x0: Tensor
    attention: AttentionKept | None
    x1: Tensor | None
    mlp: MLPKept | None


def block_forward(
    x0: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext, recompute: str = "none"
) -> tuple[Tensor, BlockSaved]:
    """x₂, (T, hidden) or its wanted rows, and what `block_backward` needs under the given recompute mode."""
    x1, attention = attention_half_forward(x0, weights, adapter, context)
    x2, mlp = mlp_half_forward(x1, weights, adapter, context.config, context.scratch, keep_gate_up=recompute == "none")
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
        _, mlp = mlp_half_forward(x1, weights, adapter, context.config, context.scratch)
    d_x1 = mlp_half_backward(d_x2, x1, mlp, weights, adapter, context.config, lora, lowest_group)
    if d_x1 is None:
        return None
    return attention_half_backward(d_x1, x0, attention, weights, adapter, context, lora, lowest_group)
