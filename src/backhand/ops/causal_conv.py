"""Causal depthwise convolution over packed documents, with SiLU behind it where a family has one.

    c_t = Σ_s w_s ⊙ x_{t-s} + b,   s = 0 … J-1,   y = c, or y = c σ(c)          [arXiv:2312.00752, §3.4]

for every channel on its own, w_s the tap for the token s places back. (Stored weights, (channels, 1, J), have the tap
of the token itself last: w_s is column J-1-s.) Nothing reaches across documents: x_{t-s} is zero before a document's
begin, or the shared prefix's where there is one, since every document continues it.

Backward, w and b being frozen. With G = ∂L/∂y and C = G, or C = G ⊙ φ'(c), φ'(c) = σ + c σ (1 - σ):
    dc_t = Σ_s w_s ⊙ dx_{t-s},   hence   ∂L/∂x_t = Σ_s w_s ⊙ C_{t+s}     (tokens, channels)
where C_{t+s} is zero behind the document's end: the same taps, read forward in time. A token near the prefix's end is
read by the first tokens of every document, and its gradient is the sum over all of them.

Saved: x; c is made again where SiLU's slope needs it, for J multiplications an element. All passes go over tiles of so
many tokens that what lies between two of them stays in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.document_groups import Run, spans
from backhand.ops.elementwise import SiLUSaved, silu_backward

# Input and output of a tile stay in the second-level cache.
TILE_ELEMENTS = 1 << 16


class Taps(NamedTuple):
    """The frozen convolution: weight (channels, J), column J-1 the token itself, and bias (channels,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class CausalConvSaved(NamedTuple):
    """x (tokens, channels), the taps, the documents, the shared prefix's tokens, and whether SiLU follows."""

    x: Tensor
    taps: Taps
    runs: tuple[Run, ...]
    shared: int
    silu: bool


class CausalConvGrads(NamedTuple):
    """d_x (tokens, channels)."""

    d_x: Tensor


def causal_conv_forward(
    x: Tensor, taps: Taps, runs: tuple[Run, ...], shared: int = 0, *, silu: bool = False
) -> tuple[Tensor, CausalConvSaved]:
    """Convolve within each document.

    Args:
        x: (tokens, channels).
        taps: weight and bias.
        runs: neighbouring documents of equal length, covering all tokens behind the shared prefix.
        shared: tokens at the front with which every document begins.
        silu: whether y = c σ(c), else y = c.

    Returns:
        y (tokens, channels) in x's dtype, and what backward needs.
    """
    c = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for tile in _tiles(x, runs, shared):
        part = _convolve(x, taps, tile, shared, tile.of(c))
        if silu:
            torch.nn.functional.silu(part, inplace=True)
    return c, CausalConvSaved(x, taps, runs, shared, silu)


def causal_conv_backward(d_y: Tensor, saved: CausalConvSaved) -> CausalConvGrads:
    """Map d_y, (tokens, channels), to the gradient derived in the module docstring."""
    x, taps, runs, shared, silu = saved
    d_c = d_y
    if silu:
        d_c = torch.empty(x.shape, dtype=d_y.dtype, device=d_y.device)
        for tile in _tiles(x, runs, shared):
            c = _convolve(x, taps, tile, shared, torch.empty_like(tile.of(x)))
            tile.of(d_c).copy_(silu_backward(tile.of(d_y), SiLUSaved(c)).d_x)
    return CausalConvGrads(convolved_back(d_c, taps, runs, shared))


def causal_conv_continued(x: Tensor, taps: Taps, seen: Tensor, *, silu: bool = False) -> Tensor:
    """y of tokens that come behind others, for generation; what has been seen goes on with them.

    Args:
        x: (documents, new tokens, channels).
        taps: weight and bias.
        seen: (documents, J-1, channels), x of each document's last tokens, zeros where it has fewer; overwritten by
            those of the new end.
        silu: whether y = c σ(c), else y = c.

    Returns:
        y (documents, new tokens, channels), perhaps a view.
    """
    documents, before = seen.shape[:2]
    # The last tokens and the new ones are a document, of which the new ones' part is wanted.
    own = torch.cat([seen, x], dim=1)
    whole = convolved(own.flatten(0, 1), taps, ((0, documents, own.shape[1]),), 0)
    c = whole.unflatten(0, (documents, own.shape[1]))[:, before:]
    seen.copy_(own[:, x.shape[1] :])
    return torch.nn.functional.silu(c) if silu else c


def convolved(x: Tensor, taps: Taps, runs: tuple[Run, ...], shared: int) -> Tensor:
    """c, (tokens, channels), a fresh tensor."""
    c = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for tile in _tiles(x, runs, shared):
        _convolve(x, taps, tile, shared, tile.of(c))
    return c


def convolved_back(d_c: Tensor, taps: Taps, runs: tuple[Run, ...], shared: int) -> Tensor:
    """∂L/∂x from ∂L/∂c, (tokens, channels), a fresh tensor."""
    weight, d_x = taps.weight, torch.empty(d_c.shape, dtype=d_c.dtype, device=d_c.device)
    # What the documents add to the prefix's gradient; rounded once.
    d_prefix = torch.zeros(shared, d_c.shape[1], dtype=torch.promote_types(d_c.dtype, torch.float32), device=d_c.device)
    for tile in _tiles(d_c, runs, shared):
        gradients, part = tile.documents(d_c), torch.mul(tile.of(d_c), _tap(weight, 0), out=tile.of(d_x))
        for s in range(1, weight.shape[1]):
            last = min(tile.last, tile.length - s)
            if last > tile.first:
                part[:, : last - tile.first].addcmul_(gradients[:, tile.first + s : last + s], _tap(weight, s))
            own, before = _in_prefix(s, tile, shared)
            if tile.prefixed:
                d_prefix[before].addcmul_(gradients[:, own].sum(0, dtype=d_prefix.dtype), _tap(weight, s))
    d_x[:shared] += d_prefix
    return d_x


class _Tile(NamedTuple):
    """Some tokens of some neighbouring documents of one length.

    start: the first document's first token. number: of documents. length: of each. first, last: which tokens of each.
    prefixed: whether the shared prefix stands before them.
    """

    start: int
    number: int
    length: int
    first: int
    last: int
    prefixed: bool

    def documents(self, x: Tensor) -> Tensor:
        """x (tokens, channels) of the documents: (number, length, channels)."""
        tokens = slice(self.start, self.start + self.number * self.length)
        by_document: Tensor = x[tokens].unflatten(0, (self.number, self.length))
        return by_document

    def of(self, x: Tensor) -> Tensor:
        """x of the tile: (number, last - first, channels)."""
        return self.documents(x)[:, self.first : self.last]


def _tiles(x: Tensor, runs: tuple[Run, ...], shared: int) -> Iterator[_Tile]:
    """All tokens of x (tokens, channels), the shared prefix first: several documents at a time, or a part of one."""
    most = max(1, TILE_ELEMENTS // max(x.shape[1], 1)) if x.device.type == "cpu" else max(1, x.shape[0])
    for start, count, length in ((0, 1, shared), *runs):
        prefixed = start > 0 and shared > 0
        at_once = max(1, most // max(length, 1))
        for document in range(0, count, at_once):
            there = start + document * length, min(at_once, count - document)
            for first in range(0, length, most):
                yield _Tile(*there, length, first, min(first + most, length), prefixed)


def _convolve(x: Tensor, taps: Taps, tile: _Tile, shared: int, out: Tensor) -> Tensor:
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
        own, before = _in_prefix(s, tile, shared)
        if tile.prefixed:
            out[:, own.start - tile.first : own.stop - tile.first].addcmul_(x[before], _tap(weight, s))
    return out


def _tap(weight: Tensor, s: int) -> Tensor:
    """w_s, (channels,)."""
    return weight[:, weight.shape[1] - 1 - s]


def _in_prefix(s: int, tile: _Tile, shared: int) -> tuple[slice, slice]:
    """Which of a document's tokens in the tile have the token s places back in the prefix, and where that stands."""
    first = max(tile.first, s - shared)
    last = max(first, min(s, tile.last))
    return slice(first, last), slice(shared + first - s, shared + last - s)


def causal_conv_reference(
    x: Tensor, taps: Taps, runs: tuple[Run, ...], shared: int = 0, *, silu: bool = False
) -> Tensor:
    """The same y by torch's convolution, document by document, each with the prefix before it."""
    channels, width = taps.weight.shape
    outputs = [x[:0] * taps.weight.sum()]
    for start, stop in spans(runs, shared):
        if start == stop:
            continue
        own = x[start:stop] if start < shared else torch.cat([x[:shared], x[start:stop]])
        padded = torch.nn.functional.pad(own.T[None], (width - 1, 0))
        c = torch.nn.functional.conv1d(padded, taps.weight[:, None], taps.bias, groups=channels)[0].T
        outputs.append(c[len(own) - (stop - start) :])
    y = torch.cat(outputs)
    return y / (1 + torch.exp(-y)) if silu else y
