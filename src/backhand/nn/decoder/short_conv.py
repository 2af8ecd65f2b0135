"""LFM2's mixer: the gated short convolution (`ops.gated_conv`), and its state during generation.

    [B | C | x] = in_proj(n₁),   z = B ⊙ x,   y = C ⊙ conv(z)

The output of a token depends on z of that token and of the J-1 tokens before it. The state of a row is therefore z of
its last J-1 tokens, padded with zeros at the start of a document, as in the convolution.

Nothing is saved in addition to the mixer's input and output: the backward receives the documents and the taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved, Rows
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig
from backhand.ops.causal_conv import Taps, causal_conv_continued
from backhand.ops.gated_conv import GatedConvSaved, gated_conv_backward, gated_conv_forward


def short_conv_forward(bcx: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, None]:
    """Return y of shape (T, channels) for [B | C | x] of shape (T, 3 channels), within each document."""
    return gated_conv_forward(bcx, _taps(weights), context.segment_runs)[0], None


def short_conv_backward(
    d_y: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    _adapter: BlockAdapter,
    _output: Tensor | None,
) -> Tensor:
    """Return ∂L/∂[B | C | x] of shape (T, 3 channels) for ∂L/∂y of shape (T, channels)."""
    conv = GatedConvSaved(saved.projected, _taps(weights), context.segment_runs)
    return gated_conv_backward(d_y, conv).d_bcx


def short_conv_states(
    config: DecoderConfig, rows: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Return zeros for z of each row's last J-1 tokens, (rows, J-1, channels)."""
    return (torch.zeros(rows, not_none(config.short_conv).taps - 1, config.hidden_size, dtype=dtype, device=device),)


def short_conv_extend(
    bcx: Tensor, weights: BlockWeights, states: tuple[Tensor, ...], rows: Sequence[Rows], _config: DecoderConfig
) -> Tensor:
    """Return y of new tokens, (tokens, channels), which continue their rows, and update the states in place.

    Args:
        bcx: [B | C | x] of the new tokens, (tokens, 3 channels).
        states: from `short_conv_states`.
        rows: the rows that the tokens belong to.
    """
    (seen,), taps = states, _taps(weights)
    b, c, x = bcx.chunk(3, dim=-1)
    z, y = b * x, torch.empty_like(c)
    for first, count, start, new in rows:
        tokens = slice(start, start + count * new)
        by_row = z[tokens].unflatten(0, (count, new))
        y[tokens] = causal_conv_continued(by_row, taps, seen[first : first + count]).flatten(0, 1)
    return y.mul_(c)


def _taps(weights: BlockWeights) -> Taps:
    """Return the convolution in the shape that the op expects. Files have one more axis."""
    return Taps(not_none(weights.conv).squeeze(1), weights.conv_bias)


SHORT_CONVOLUTION = Mixer(short_conv_forward, short_conv_backward, short_conv_states, short_conv_extend)
