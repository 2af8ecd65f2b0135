"""Building blocks of a sublayer: projections with adapters, the norm before it, and the residual sum after it.

    n  = norm(x)                       n = x in families without a norm before the sublayer
    z  = … [n W₁ᵀ | … ] (+ LoRA) …     modules that share an input form one group (`group_forward`)
    x' = x + m · norm(z Wᵀ (+ LoRA))   most families have no norm here
    x' = norm(x + z Wᵀ (+ LoRA))       BERT, which has no norm before the sublayer

x is the residual stream, (T, hidden). m is a multiplier of the family, 1 in most families. The sublayer computes z from
n. A mixer of two parts has a projection for each, and the sum has a term for each (Falcon-H1). Norms are RMS norms, or
layer norms in encoders.

Backward. G = ∂L/∂x' reaches both the sublayer and the stream that bypasses it:
    ∂L/∂(z Wᵀ) = (backward of the norm applied to m G)             (T, hidden)
    ∂L/∂x = G + (backward of the norm applied to ∂L/∂n)            (T, hidden)
With a norm of the sum, its backward is applied to G first, and both receive the result.

The sublayers are in `nn.decoder.block` and `nn.decoder.experts`. The statistics of the norm before a sublayer are saved
instead of n, which is recomputed from them. For the norm after a sublayer, the input is saved as well. The gradient of
a trained norm weight is added to the flat buffer, like the gradients of factors. Layer norms stay frozen.
"""

from __future__ import annotations

from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter, GroupAdapter
from backhand.nn.decoder.mixer import BlockContext, MixerSaved, MLPSaved
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig
from backhand.nn.scratch import Scratch
from backhand.ops.layer_norm import LayerNormSaved, NormSaved, layer_norm_backward, layer_norm_forward, norm_apply
from backhand.ops.lora_group import LoRAGroupSaved, lora_group_backward, lora_group_forward
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_backward, rms_norm_forward
from backhand.ops.weight_tiles import FrozenMatrix


def group_forward(
    x: Tensor, weight: FrozenMatrix, bias: Tensor | None, adapter: GroupAdapter, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return [y_1 | … | y_n] of the modules and the h of the adapted ones, concatenated.

    Args:
        x: (positions, in).
        weight: (Σ out_i, in), the stacked weights of the modules.
        bias: (Σ out_i,) or None.
        residual: (positions, Σ out_i), added to the result, or None.

    Returns:
        y (positions, Σ out_i) and h (positions, Σ rank). h has no columns if no module is adapted.
    """
    if adapter.extras is not None:
        return adapter.extras.forward(x, weight, bias, residual)
    y, saved = lora_group_forward(x, weight, bias, adapter.lora, residual)
    return y, saved.h


def group_backward(
    d_y: Tensor,
    x: Tensor | NormSaved,
    weight: FrozenMatrix,
    adapter: GroupAdapter,
    h: Tensor,
    *,
    input_gradient: bool,
) -> Tensor | None:
    """Return ∂L/∂x (positions, in), or None without `input_gradient`. Gradients of trained tensors are accumulated.

    Works for any group. x must be available before ∂L/∂y is consumed.

    Args:
        d_y: ∂L/∂y, (positions, Σ out_i).
        x: input of the forward, or the saved tensors of the norm that computed it.
        weight, adapter: as in the forward.
        h: returned by the forward, (positions, Σ rank).
        input_gradient: compute ∂L/∂x.
    """
    if adapter.extras is not None:
        return adapter.extras.backward(d_y, normalized(x), weight, h, input_gradient=input_gradient)
    return lora_group_backward(d_y, LoRAGroupSaved(x, weight, adapter.lora, h), input_gradient=input_gradient).d_x


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: DecoderConfig, out: Tensor | None = None
) -> tuple[Tensor, NormSaved]:
    """Return norm(x) of x's shape, by the family's kind of norm, and its saved tensors."""
    if config.norm == "layer":
        return layer_norm_forward(x, weight, bias, config.norm_eps, out=out)
    return rms_norm_forward(x, weight, config.norm_eps, config.norm_offset, out=out)


def norm_backward(
    d_y: Tensor,
    saved: NormSaved,
    d_weight: Tensor | None,
    residual_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ∂L/∂x of a norm plus `residual_grad`, of d_y's shape, and add ∂L/∂weight to `d_weight`, if given."""
    if isinstance(saved, LayerNormSaved):
        return layer_norm_backward(d_y, saved, weight_gradient=False, residual=residual_grad, out=out).d_x
    grads = rms_norm_backward(d_y, saved, weight_gradient=d_weight is not None, residual=residual_grad, out=out)
    if d_weight is not None and grads.d_weight is not None:
        d_weight.add_(grads.d_weight)
    return grads.d_x


def pre_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, config: DecoderConfig, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """Return norm(x) of shape (T, hidden) and the norm's statistics. Without a norm, return x and None.

    The statistics are the inverse RMS, (T, 1), or mean and inverse deviation of a layer norm, (T, 2).
    """
    if weight is None:
        return x, None
    n, saved = norm_forward(x, weight, bias, config, out=scratch.take("normed", x.shape, x))
    return n, saved.statistics if isinstance(saved, LayerNormSaved) else saved.inverse_rms


def pre_norm_saved(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor | None, config: DecoderConfig
) -> Tensor | NormSaved:
    """Return the saved tensors of the norm before a sublayer, which represent n, or x itself without a norm."""
    if weight is None or statistics is None:
        return x
    if config.norm == "layer":
        return LayerNormSaved(x, weight, bias, statistics)
    return RMSNormSaved(x, weight, statistics, config.norm_offset)


def normalized(n: Tensor | NormSaved) -> Tensor:
    """Return n as a tensor, (T, hidden), recomputed from the norm's saved tensors if necessary."""
    return n if isinstance(n, Tensor) else norm_apply(n)


def pre_norm_backward(
    d_n: Tensor, n: Tensor | NormSaved, d_weight: Tensor | None, residual_grad: Tensor | None
) -> Tensor:
    """Return ∂L/∂x of shape (T, hidden) in the memory of d_n: backward of the norm plus `residual_grad`.

    Args:
        d_n: ∂L/∂n.
        n: from `pre_norm_saved`.
        d_weight: buffer to which the gradient of the norm weight is added, or None if it is frozen.
        residual_grad: the gradient of the stream from `residual_backward`, or None.
    """
    if not isinstance(n, Tensor):
        return norm_backward(d_n, n, d_weight, residual_grad, out=d_n)
    return d_n if residual_grad is None else d_n.add_(residual_grad)


def residual_forward(
    stream: Tensor,
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    adapter: GroupAdapter,
    norm: tuple[Tensor | None, Tensor | None],
    config: DecoderConfig,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor, NormSaved | None]:
    """Return stream + m · norm(x Wᵀ (+ LoRA)), or norm(stream + x Wᵀ (+ LoRA)).

    Args:
        stream: (T, hidden), the input of the sublayer.
        x: (T, in).
        weight: (hidden, in).
        bias: (hidden,) or None.
        norm: weight and bias of the norm, (hidden,) each. The weight is None for no norm.
        config: the family, for the norm and its residual multiplier.
        multiplier: of this projection. m is the product of both.

    Returns:
        the sum (T, hidden), h (T, rank), and the tensors saved by the norm, or None without a norm.
    """
    if config.residual_multiplier * multiplier == 1.0 and (norm[0] is None or config.norms_of_sums):
        y, h = group_forward(x, weight, bias, adapter, stream)
        if norm[0] is None:
            return y, h, None
        x, saved = norm_forward(y, norm[0], norm[1], config)
        return x, h, saved
    y, h = group_forward(x, weight, bias, adapter)
    x, post_norm = residual_sum(stream, y, norm, config, multiplier)
    return x, h, post_norm


def mixer_output_forward(
    stream: Tensor, o: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> tuple[Tensor, Tensor, Tensor | None, NormSaved | None]:
    """Return x₁ = stream + m · norm(o Wᵀ (+ LoRA)), with a second projection of the last features of o if there is one.

    Args:
        stream: (P, hidden), the input of the mixer sublayer.
        o: (P, width), output of the mixer.

    Returns:
        x₁ (P, hidden), h of both projections, (P, rank), and the tensors saved by the norm. None if not there.
    """
    first, second = split_output(o, weights)
    x1, h, saved = residual_forward(
        stream,
        first,
        weights.output,
        weights.output_bias,
        adapter.output,
        (weights.after_attention_norm, weights.after_attention_norm_bias),
        config,
        config.multipliers.output,
    )
    if second is None or weights.second_output is None:
        return x1, h, None, saved
    own = not_none(adapter.second_output), (None, None), config, config.multipliers.second_output
    x1, h_second, _ = residual_forward(x1, second, weights.second_output, None, *own)
    return x1, h, h_second, saved


def split_output(o: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of the projections after the mixer, views of o (T, width). None without a second one."""
    if weights.second_output is None:
        return o, None
    first, second = o.split([weights.output.shape[1], weights.second_output.shape[1]], dim=1)
    return first, second


def residual_sum(
    stream: Tensor,
    y: Tensor,
    norm: tuple[Tensor | None, Tensor | None],
    config: DecoderConfig,
    multiplier: float = 1.0,
) -> tuple[Tensor, NormSaved | None]:
    """Return stream + m · norm(y) of shape (T, hidden) and the tensors saved by the norm. May overwrite y."""
    saved = None
    if norm[0] is not None:
        y, saved = norm_forward(y, norm[0], norm[1], config)
    if config.residual_multiplier * multiplier != 1.0:
        y.mul_(config.residual_multiplier * multiplier)
    return y.add_(stream), saved


def residual_backward(
    d_x: Tensor, saved: NormSaved | None, d_weight: Tensor | None, config: DecoderConfig, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Map the gradient d_x of the sum to ∂L/∂(z Wᵀ) and the gradient of the stream, both (T, hidden).

    The stream's gradient is d_x itself unless the norm is that of the sum. d_x is not modified. The gradient of the
    norm weight is added to `d_weight`, if given.
    """
    if saved is not None and config.norms_of_sums:
        d_sum = norm_backward(d_x, saved, d_weight)
        return d_sum, d_sum
    multiplier *= config.residual_multiplier
    d_y = d_x if multiplier == 1.0 else d_x * multiplier
    return d_y if saved is None else norm_backward(d_y, saved, d_weight), d_x


def mixer_output_buffer(saved: MixerSaved, adapter: BlockAdapter, context: BlockContext, like: Tensor) -> Tensor | None:
    """Return the saved output of the mixer, or a buffer of `like`'s shape for the recomputed one.

    Returns None if the output is neither saved nor needed by the gradient of a factor.
    """
    if saved.mixed is not None or not adapter.output.lora.factors:
        return saved.mixed
    return context.scratch.take("attended", like.shape, like)


def saved_or_recomputed_gate_up(
    saved: MLPSaved, n2: Tensor | NormSaved, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> tuple[Tensor, Tensor]:
    """Return [a | u] of shape (T, 2f) and h of the group, recomputed from n₂ if they are not saved."""
    if saved.gate_up is not None and saved.h_gate_up is not None:
        return saved.gate_up, saved.h_gate_up
    return gate_up_forward(normalized(n2), weights, adapter, config)


def gate_up_forward(
    n2: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig
) -> tuple[Tensor, Tensor]:
    """Return [a | u] of shape (P, 2f), with a multiplied by the family's multiplier, and h of the group."""
    assert weights.gate_up is not None
    gate_up, h = group_forward(n2, weights.gate_up, weights.gate_up_bias, adapter.gate_up)
    scale_gate(gate_up, config)
    return gate_up, h


def scale_gate(gate_up: Tensor, config: DecoderConfig) -> None:
    """Multiply a in [a | u], or its gradient, (P, 2f), by the family's multiplier of the gate."""
    if config.multipliers.gate != 1.0:
        gate_up[:, : config.intermediate_size].mul_(config.multipliers.gate)


def gather_rows(x: Tensor, positions: Tensor | None) -> Tensor:
    """Return the rows of x at `positions`, or x itself if `positions` is None."""
    return x if positions is None else x.index_select(0, positions)


def scatter_rows(d_x: Tensor, positions: Tensor | None, like: Tensor) -> Tensor:
    """Return d_x scattered to `positions` of a zero tensor with as many rows as `like`. Backward of `gather_rows`."""
    return d_x if positions is None else d_x.new_zeros(len(like), d_x.shape[1]).index_copy_(0, positions, d_x)
