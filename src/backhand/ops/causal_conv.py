"""Causal depthwise convolution over packed documents, followed by SiLU in some families.

    c_t = Σ_s w_s ⊙ x_{t-s} + b,   s = 0 … J-1,   y = c, or y = c σ(c)          [arXiv:2312.00752, §3.4]

for each channel separately, with w_s the tap for the token s places back. (In the stored weight, (channels, 1, J), the
last tap is that of the token itself: w_s is column J-1-s.) No sum crosses documents: x_{t-s} is zero before the first
token of a document. If documents begin alike, their common beginning is a segment that others continue
(`document_groups`).

Backward, with w and b frozen. With G = ∂L/∂y and C = G, or C = G ⊙ φ'(c), φ'(c) = σ + c σ (1 - σ):
    dc_t = Σ_s w_s ⊙ dx_{t-s},   hence   ∂L/∂x_t = Σ_s w_s ⊙ C_{t+s}     (tokens, channels)
where C_{t+s} is zero after the document's end: the same taps, read forward in time. A token near a segment's end is
read by the first tokens of every segment that continues it, and its gradient is the sum over all of them.

Saved: x. Where SiLU's slope needs c, it is recomputed, which takes J multiplications per element. The kernels
(native/causal_conv.cpp) read each number once and round each sum once. Torch's form computes tiles of tokens, so that
the intermediate results of a tile stay in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import causal_conv as kernels
from backhand.kernels.pieces import piece_size
from backhand.ops.document_groups import SegmentRun, Span, continued_end, segments, tokens_of
from backhand.ops.elementwise import InputSaved, silu_backward

# Elements of a tile, whose input and output then stay in the second-level cache.
TILE_ELEMENTS = 1 << 16


class Taps(NamedTuple):
    """The frozen convolution: weight (channels, J), with the token's own tap last; bias (channels,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class CausalConvSaved(NamedTuple):
    """x (tokens, channels), the taps, the documents' segments, and True if SiLU follows."""

    x: Tensor
    taps: Taps
    runs: tuple[SegmentRun, ...]
    silu: bool


class CausalConvGrads(NamedTuple):
    """d_x (tokens, channels)."""

    d_x: Tensor


def causal_conv_forward(
    x: Tensor, taps: Taps, runs: tuple[SegmentRun, ...], *, silu: bool = False
) -> tuple[Tensor, CausalConvSaved]:
    """Convolve within each document.

    Args:
        x: (tokens, channels).
        taps: weight and bias.
        runs: the segments of all documents, covering all tokens; each follows the segments that it continues.
        silu: True for y = c σ(c), False for y = c.

    Returns:
        y (tokens, channels) in x's dtype, and the saved tensors.
    """
    saved = CausalConvSaved(x, taps, runs, silu)
    c = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if kernels.causal_conv(kernels.WITH_SILU if silu else kernels.PLAIN, x, *taps, runs, c):
        return c, saved
    for tile in _tiles(x, runs):
        part = _convolve(x, taps, tile, tile.of(c))
        if silu:
            torch.nn.functional.silu(part, inplace=True)
    return c, saved


def causal_conv_backward(d_y: Tensor, saved: CausalConvSaved, *, out: Tensor | None = None) -> CausalConvGrads:
    """Map d_y of shape (tokens, channels) to the gradient derived in the module docstring.

    Args:
        out: (tokens, channels) to receive d_x, or None.
    """
    x, taps, runs, silu = saved
    out = torch.empty(x.shape, dtype=d_y.dtype, device=d_y.device) if out is None else out
    if kernels.causal_conv_gradient(kernels.WITH_SILU if silu else kernels.PLAIN, d_y, x, *taps, runs, out):
        return CausalConvGrads(out)
    d_c = d_y
    if silu:
        d_c = torch.empty(x.shape, dtype=d_y.dtype, device=d_y.device)
        for tile in _tiles(x, runs):
            c = _convolve(x, taps, tile, torch.empty_like(tile.of(x)))
            tile.of(d_c).copy_(silu_backward(tile.of(d_y), InputSaved(c)).d_x)
    return CausalConvGrads(_convolve_back(d_c, taps, runs, out))


def causal_conv_continued(x: Tensor, taps: Taps, seen: Tensor, *, silu: bool = False) -> Tensor:
    """Compute y of tokens that continue documents, for generation, and update their last tokens.

    Args:
        x: (documents, new tokens, channels).
        taps: weight and bias.
        seen: (documents, J-1, channels), x of each document's last tokens, or zeros if it has fewer. It is overwritten
            by the last tokens including the new ones.
        silu: True for y = c σ(c), False for y = c.

    Returns:
        y (documents, new tokens, channels), which may be a view.
    """
    documents, before = seen.shape[:2]
    # The last tokens and the new ones form a document, of which the new tokens' part is returned.
    own = torch.cat([seen, x], dim=1)
    whole = convolved(own.flatten(0, 1), taps, (SegmentRun(0, documents, own.shape[1]),))
    c = whole.unflatten(0, (documents, own.shape[1]))[:, before:]
    seen.copy_(own[:, x.shape[1] :])
    return torch.nn.functional.silu(c) if silu else c


def convolved(x: Tensor, taps: Taps, runs: tuple[SegmentRun, ...]) -> Tensor:
    """Return c of shape (tokens, channels) as a new tensor."""
    return causal_conv_forward(x, taps, runs)[0]


def convolved_back(d_c: Tensor, taps: Taps, runs: tuple[SegmentRun, ...]) -> Tensor:
    """Return ∂L/∂x from ∂L/∂c of shape (tokens, channels) as a new tensor."""
    return causal_conv_backward(d_c, CausalConvSaved(d_c, taps, runs, silu=False)).d_x


def _convolve_back(d_c: Tensor, taps: Taps, runs: tuple[SegmentRun, ...], d_x: Tensor) -> Tensor:
    """Write ∂L/∂x from ∂L/∂c to d_x of shape (tokens, channels) and return it."""
    weight, continued = taps.weight, continued_end(runs)
    # The gradients that segments add to those before them, rounded once at the end.
    wide = torch.promote_types(d_c.dtype, torch.float32)
    shares = torch.zeros(continued, d_c.shape[1], dtype=wide, device=d_c.device)
    for tile in _tiles(d_c, runs):
        gradients, part = tile.documents(d_c), torch.mul(tile.of(d_c), _tap(weight, 0), out=tile.of(d_x))
        for s in range(1, weight.shape[1]):
            last = min(tile.last, tile.length - s)
            if last > tile.first:
                part[:, : last - tile.first].addcmul_(gradients[:, tile.first + s : last + s], _tap(weight, s))
            own, before = _before(s, tile)
            if before:
                share = gradients[:, own].sum(0, dtype=wide) * _tap(weight, s)
                shares.index_add_(0, torch.tensor(before, device=d_c.device), share)
    d_x[:continued] += shares
    return d_x


class _Tile(NamedTuple):
    """A range of tokens of several neighbouring segments of one length."""

    start: int  # the first token of the first segment
    number: int  # of segments
    length: int  # of each segment
    first: int  # the first token of the range, counted within each segment
    last: int  # the end of the range
    before: tuple[Span, ...]  # the segments before each of them

    def documents(self, x: Tensor) -> Tensor:
        """View the segments' part of x, (tokens, channels), as (number, length, channels)."""
        tokens = slice(self.start, self.start + self.number * self.length)
        by_document: Tensor = x[tokens].unflatten(0, (self.number, self.length))
        return by_document

    def of(self, x: Tensor) -> Tensor:
        """View the tile's part of x as (number, last - first, channels)."""
        return self.documents(x)[:, self.first : self.last]


def tile_tokens(channels: int) -> int:
    """Return the most tokens of a tile."""
    return max(1, piece_size(TILE_ELEMENTS) // max(channels, 1))


def _tiles(x: Tensor, runs: tuple[SegmentRun, ...]) -> Iterator[_Tile]:
    """Yield the tiles of x of shape (tokens, channels): several segments at a time, or a part of one segment."""
    most = tile_tokens(x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    for start, count, length, before in runs:
        at_once = max(1, most // max(length, 1))
        for document in range(0, count, at_once):
            segments_of_tile = start + document * length, min(at_once, count - document)
            for first in range(0, length, most):
                yield _Tile(*segments_of_tile, length, first, min(first + most, length), before)


def _convolve(x: Tensor, taps: Taps, tile: _Tile, out: Tensor) -> Tensor:
    """Write c of a tile to `out`, (number, last - first, channels), and return it."""
    weight, bias = taps
    inputs = tile.documents(x)
    torch.mul(tile.of(x), _tap(weight, 0), out=out)
    if bias is not None:
        out += bias
    for s in range(1, weight.shape[1]):
        first = max(tile.first, s)
        if first < tile.last:
            out[:, first - tile.first :].addcmul_(inputs[:, first - s : tile.last - s], _tap(weight, s))
        own, before = _before(s, tile)
        if before:
            out[:, own.start - tile.first : own.stop - tile.first].addcmul_(x[before], _tap(weight, s))
    return out


def _tap(weight: Tensor, s: int) -> Tensor:
    """Return w_s of shape (channels,)."""
    return weight[:, weight.shape[1] - 1 - s]


def _before(s: int, tile: _Tile) -> tuple[slice, list[int]]:
    """Return the range of a segment's tokens in the tile whose s-th predecessor is before the segment, and these."""
    before = tokens_of(tile.before)
    first = max(tile.first, s - len(before))
    last = max(first, min(s, tile.last))
    return slice(first, last), before[len(before) + first - s : len(before) + last - s]


def causal_conv_reference(x: Tensor, taps: Taps, runs: tuple[SegmentRun, ...], *, silu: bool = False) -> Tensor:
    """Compute the same y by torch's convolution, segment by segment, each with all tokens before it."""
    channels, width = taps.weight.shape
    outputs = [x[:0] * taps.weight.sum()]
    for (start, stop), before in segments(runs):
        own = torch.cat([x[before], x[start:stop]])
        padded = torch.nn.functional.pad(own.T[None], (width - 1, 0))
        c = torch.nn.functional.conv1d(padded, taps.weight[:, None], taps.bias, groups=channels)[0].T
        outputs.append(c[len(own) - (stop - start) :])
    y = torch.cat(outputs)
    return y / (1 + torch.exp(-y)) if silu else y
