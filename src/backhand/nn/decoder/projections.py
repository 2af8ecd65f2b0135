"""A block's projections with their adapters, the norm before, the sum after, and selected rows.

    n  = norm(x)                       n = x in families with no norm there
    z  = … [n W₁ᵀ | … ] (+ LoRA) …     several modules of one input are one group (`group_forward`)
    x' = x + m · norm(z Wᵀ (+ LoRA))   of z that the half has computed from n; with no norm there in most families

x is the residual stream, (T, hidden), and m the family's residual multiplier, 1 in most.

Backward, from G = ∂L/∂x', which goes both ways:
    ∂L/∂(z Wᵀ) = (norm's backward of m G)             (T, hidden)
    ∂L/∂x = G + (norm's backward of ∂L/∂n)            (T, hidden)

The halves themselves are in `nn.decoder.block` and `nn.decoder.experts`. A norm's factor is kept in place of n, which
is recomputed from it; of a norm behind a half its input as well. A trained norm's weight has its gradient added to the
flat buffer, as factors have theirs.
"""

from __future__ import annotations

from torch import Tensor

from backhand.nn.batch import Scratch
from backhand.nn.decoder.adapted_group import BlockAdapter, GroupAdapter
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.mixer import BlockContext, MixerSaved, MLPSaved
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.lora_group import LoRAGroupSaved, lora_group_backward, lora_group_forward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_backward, rms_norm_forward
from backhand.ops.weight_tiles import FrozenMatrix


def group_forward(
    x: Tensor, weight: FrozenMatrix, bias: Tensor | None, adapter: GroupAdapter, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[y_1 | … | y_n] for the modules, and the h of those that are adapted, side by side.

    Args:
        x: (positions, in).
        weight: (Σ out_i, in), the modules' weights stacked.
        bias: (Σ out_i,) or None.
        residual: (positions, Σ out_i) added to the result, or None.

    Returns:
        y (positions, Σ out_i) and h (positions, Σ rank); no columns without an adapter.
    """
    if adapter.extras is not None:
        return adapter.extras.forward(x, weight, bias, residual)
    y, saved = lora_group_forward(x, weight, bias, adapter.group, residual)
    return y, saved.h


def group_backward(
    d_y: Tensor,
    x: Tensor | RMSNormSaved,
    weight: FrozenMatrix,
    adapter: GroupAdapter,
    h: Tensor,
    *,
    input_gradient: bool,
) -> Tensor | None:
    """∂L/∂x, (positions, in), or None when not asked for; everything trained has its gradient added.

    For any group, where x is there before ∂L/∂y.

    Args:
        d_y: ∂L/∂y, (positions, Σ out_i).
        x, weight, adapter: as in the forward; for x also what the norm saved that gave it.
        h: what the forward returned, (positions, Σ rank).
        input_gradient: whether anything below needs ∂L/∂x.
    """
    if adapter.extras is not None:
        formed = rms_norm_apply(*x) if isinstance(x, RMSNormSaved) else x
        return adapter.extras.backward(d_y, formed, weight, h, input_gradient=input_gradient)
    return lora_group_backward(d_y, LoRAGroupSaved(x, weight, adapter.group, h), input_gradient=input_gradient).d_x


def pre_norm_forward(
    x: Tensor, weight: Tensor | None, config: DecoderConfig, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """x normed, (T, hidden), and the factor, (T, 1); x itself and None without a norm."""
    if weight is None:
        return x, None
    out = scratch.take("normed", x.shape, x)
    n, norm = rms_norm_forward(x, weight, config.norm_eps, config.norm_offset, out=out)
    return n, norm.factor


def pre_norm_saved(
    x: Tensor, weight: Tensor | None, factor: Tensor | None, config: DecoderConfig
) -> Tensor | RMSNormSaved:
    """n for what takes the norm that it came from in its place; x itself without a norm."""
    return x if weight is None or factor is None else RMSNormSaved(x, weight, factor, config.norm_offset)


def formed(n: Tensor | RMSNormSaved) -> Tensor:
    """n recomputed, (T, hidden)."""
    return rms_norm_apply(*n) if isinstance(n, RMSNormSaved) else n


def pre_norm_backward(
    d_n: Tensor, n: Tensor | RMSNormSaved, d_weight: Tensor | None, residual_grad: Tensor | None
) -> Tensor:
    """∂L/∂x, (T, hidden), in d_n's memory: through the sublayer, plus `residual_grad`, if given.

    Args:
        d_n: ∂L/∂n.
        n: from `pre_norm_saved`.
        d_weight: to which the norm's gradient is added, or None.
        residual_grad: ∂L/∂x' of the whole stream, or None.
    """
    if isinstance(n, RMSNormSaved):
        return norm_backward(d_n, n, d_weight, residual_grad, out=d_n)
    return d_n if residual_grad is None else d_n.add_(residual_grad)


def residual_forward(
    stream: Tensor,
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    adapter: GroupAdapter,
    after: Tensor | None,
    config: DecoderConfig,
) -> tuple[Tensor, Tensor, RMSNormSaved | None]:
    """stream + m · norm(x Wᵀ (+ LoRA)), with no norm where `after`, its weight, is None.

    Args:
        stream: (T, hidden), which bypasses the sublayer.
        x: (T, in).
        weight: (hidden, in).
        bias: (hidden,) or None.
        after: (hidden,) or None.
        config: the family, for the norm and for m, its residual multiplier.

    Returns:
        the sum (T, hidden), h (T, rank), and what the norm's backward needs.
    """
    if after is None and config.residual_multiplier == 1.0:
        return *group_forward(x, weight, bias, adapter, stream), None
    y, h = group_forward(x, weight, bias, adapter)
    x, saved = residual_sum(stream, y, after, config)
    return x, h, saved


def residual_sum(
    stream: Tensor, y: Tensor, after: Tensor | None, config: DecoderConfig
) -> tuple[Tensor, RMSNormSaved | None]:
    """stream + m · norm(y), (T, hidden), perhaps in y's place, and what the norm's backward needs; see above."""
    saved = None
    if after is not None:
        y, saved = rms_norm_forward(y, after, config.norm_eps, config.norm_offset)
    if config.residual_multiplier != 1.0:
        y.mul_(config.residual_multiplier)
    return y.add_(stream), saved


def residual_backward(
    d_x: Tensor, saved: RMSNormSaved | None, d_weight: Tensor | None, config: DecoderConfig
) -> Tensor:
    """∂L/∂(z Wᵀ) from ∂L/∂(the sum), (T, hidden), which stays as it is; the norm's gradient is added to `d_weight`."""
    d_y = d_x if config.residual_multiplier == 1.0 else d_x * config.residual_multiplier
    return d_y if saved is None else norm_backward(d_y, saved, d_weight)


def norm_backward(
    d_y: Tensor,
    saved: RMSNormSaved,
    d_weight: Tensor | None,
    residual_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """d_x of a norm, of d_y's shape, with `residual_grad` added; ∂L/∂w is added to `d_weight`, if given."""
    grads = rms_norm_backward(d_y, saved, weight_gradient=d_weight is not None, residual=residual_grad, out=out)
    if d_weight is not None and grads.d_weight is not None:
        d_weight.add_(grads.d_weight)
    return grads.d_x


def mixer_output_buffer(kept: MixerSaved, adapter: BlockAdapter, context: BlockContext, like: Tensor) -> Tensor | None:
    """The mixer's output where it is kept; else a place for it, of `like`'s shape, if a factor's gradient needs it."""
    if kept.output is not None or not adapter.output.group.members:
        return kept.output
    return context.scratch.take("attended", like.shape, like)


def saved_or_recomputed_gate_up(
    kept: MLPSaved, n2: Tensor | RMSNormSaved, weights: BlockWeights, adapter: BlockAdapter
) -> tuple[Tensor, Tensor]:
    """[a | u], (T, 2f), and the group's h, recomputed from n₂ where they are not kept."""
    if kept.gate_up is not None and kept.h_gate_up is not None:
        return kept.gate_up, kept.h_gate_up
    return group_forward(formed(n2), weights.gate_up, weights.gate_up_bias, adapter.gate_up)


def gather_rows(x: Tensor, loss_positions: Tensor | None) -> Tensor:
    """These positions of x; all without a choice."""
    return x if loss_positions is None else x.index_select(0, loss_positions)


def scatter_rows(d_x: Tensor, loss_positions: Tensor | None, whole: Tensor) -> Tensor:
    """The gradient of all positions, as many as `whole` has: zero where none is loss_positions."""
    return (
        d_x if loss_positions is None else d_x.new_zeros(len(whole), d_x.shape[1]).index_copy_(0, loss_positions, d_x)
    )
