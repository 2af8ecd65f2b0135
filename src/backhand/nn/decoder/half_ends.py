"""How either half of a block begins and ends: a norm before its first group, a sum behind its last one.

    n  = norm(x)                       the beginning; n = x in families with no norm there
    x' = x + m · norm(z Wᵀ (+ LoRA))   the end, of z that the half has made of n; with no norm there in most families

x is the stream, (T, hidden), and m the family's residual multiplier, 1 in most.

Backward, from G = ∂L/∂x', which goes both ways:
    ∂L/∂(z Wᵀ) = (norm's backward of m G)             (T, hidden)
    ∂L/∂x = G + (norm's backward of ∂L/∂n)            (T, hidden)

Between the two stands the half (`nn.decoder.block`, `nn.decoder.experts`). A norm's factor is kept in place of n, which
is made again from it; of a norm at the end its input as well. A trained norm's weight has its gradient added to the
flat buffer, as `nn.decoder.adapted_group` does with factors.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from backhand.kernels.library import InARow, now_or_in
from backhand.nn.batch import Scratch
from backhand.nn.decoder.adapted_group import BlockAdapter, GroupAdapter, group_forward
from backhand.nn.decoder.family import DecoderConfig
from backhand.ops.frozen_matrix import FrozenMatrix
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_backward, rms_norm_forward


def enter_forward(
    x: Tensor, weight: Tensor | None, config: DecoderConfig, scratch: Scratch, row: InARow | None = None
) -> tuple[Tensor, Tensor | None]:
    """The beginning of either half: x normed, (T, hidden), and the factor, (T, 1); x itself and None without a norm.

    Now, or in its turn where a row is given.
    """
    if weight is None:
        return x, None
    out = scratch.take("normed", x.shape, x)
    n, norm = rms_norm_forward(x, weight, config.norm_eps, config.norm_offset, out=out, row=row)
    return n, norm.factor


def enter_again(x: Tensor, weight: Tensor | None, factor: Tensor | None, config: DecoderConfig) -> Tensor:
    """What `enter_forward` gave, from the factor that it returned."""
    return x if weight is None or factor is None else rms_norm_apply(x, weight, factor, config.norm_offset)


def entered(x: Tensor, weight: Tensor | None, factor: Tensor | None, config: DecoderConfig) -> Tensor | RMSNormSaved:
    """What `enter_forward` gave, for a group's backward, which takes the norm as it is."""
    return x if weight is None or factor is None else RMSNormSaved(x, weight, factor, config.norm_offset)


def enter_backward(
    d_n: Tensor,
    x: Tensor,
    weight: Tensor | None,
    factor: Tensor | None,
    adapter: BlockAdapter,
    name: str | None,
    config: DecoderConfig,
    around: Tensor | None,
    row: InARow | None = None,
) -> Tensor:
    """∂L/∂x, (T, hidden), in d_n's place, now or in its turn; `name` is that of the norm, if there is one.

    Through the half, plus the gradient of the stream that goes `around` it; None for through the half alone.
    """
    if weight is None or factor is None or name is None:
        if around is not None:
            now_or_in(row, partial(d_n.add_, around))
        return d_n
    saved = RMSNormSaved(x, weight, factor, config.norm_offset)
    return norm_backward(d_n, saved, adapter, name, around, out=d_n, row=row)


def join_forward(
    stream: Tensor,
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    adapter: GroupAdapter,
    after: Tensor | None,
    config: DecoderConfig,
    row: InARow | None = None,
) -> tuple[Tensor, Tensor, RMSNormSaved | None]:
    """The end of either half: stream + m · norm(x Wᵀ (+ LoRA)), with no norm where `after`, its weight, is None.

    Args:
        stream: (T, hidden), which went around the half.
        x: (T, in).
        weight: (hidden, in).
        bias: (hidden,) or None.
        adapter: of the projection.
        after: (hidden,) or None.
        config: the family, for the norm and for m, its residual multiplier.
        row: where this is to be done in its turn, or None to do it now; a norm behind and m make what is there.

    Returns:
        the sum (T, hidden), h (T, rank), and what the norm's backward needs.
    """
    sizes = (config.hidden_size,)
    if after is None and config.residual_multiplier == 1.0:
        return *group_forward(x, weight, bias, sizes, adapter, stream, row), None
    if row is not None:
        row.make()
    y, h = group_forward(x, weight, bias, sizes, adapter)
    x, saved = joined(stream, y, after, config)
    return x, h, saved


def joined(
    stream: Tensor, y: Tensor, after: Tensor | None, config: DecoderConfig
) -> tuple[Tensor, RMSNormSaved | None]:
    """stream + m · norm(y), (T, hidden), perhaps in y's place, and what the norm's backward needs; see above."""
    saved = None
    if after is not None:
        y, saved = rms_norm_forward(y, after, config.norm_eps, config.norm_offset)
    if config.residual_multiplier != 1.0:
        y.mul_(config.residual_multiplier)
    return y.add_(stream), saved


def join_backward(
    d_x: Tensor, saved: RMSNormSaved | None, adapter: BlockAdapter, name: str | None, config: DecoderConfig
) -> Tensor:
    """∂L/∂(x Wᵀ) from ∂L/∂(the sum), (T, hidden), which stays as it is; `name` is that of the norm after, if any."""
    d_y = d_x if config.residual_multiplier == 1.0 else d_x * config.residual_multiplier
    return d_y if saved is None or name is None else norm_backward(d_y, saved, adapter, name)


def norm_backward(
    d_y: Tensor,
    saved: RMSNormSaved,
    adapter: BlockAdapter,
    name: str,
    around: Tensor | None = None,
    out: Tensor | None = None,
    row: InARow | None = None,
) -> Tensor:
    """d_x of a norm, of d_y's shape; where the norm is trained, its weight's gradient is added to the flat buffer.

    Args:
        d_y: ∂L/∂y.
        saved: of the norm's forward.
        adapter: of the block.
        name: the end of the norm's name.
        around: of d_y's shape, added to d_x: the gradient of the stream that goes around what the norm begins.
        out: to receive d_x, perhaps d_y itself, or None.
        row: where this is to be done in its turn, or None to do it now.
    """
    receiver = adapter.norms.get(name)
    grads = rms_norm_backward(d_y, saved, weight_gradient=receiver is not None, residual=around, out=out, row=row)
    if receiver is not None and grads.d_weight is not None:
        receiver.add_(grads.d_weight)
    return grads.d_x
