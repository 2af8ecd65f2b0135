"""Causal depthwise convolution: cases and mutants."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.causal_conv import CausalConvSaved, Taps, causal_conv_reference, convolved, tile_tokens
from backhand.ops.document_groups import SegmentRun, segments
from backhand.verify.mutants import wrong
from backhand.verify.packed_tokens import TokenRelations, token_relations
from backhand.verify.scaffold import DOCUMENTS, PACKED, Axis, Op


def _baseline(x: Tensor, taps: Taps, runs: tuple[SegmentRun, ...], silu: bool) -> Tensor:
    c = causal_conv_reference(x, taps, runs)
    return functional.silu(c) if silu else c


OP = Op(
    "causal_conv",
    {"x": "size: tokens channels", "d_y": "tokens channels", "weight": "channels width", "bias": "channels"},
    dict(documents=DOCUMENTS, channels=Axis(5, 48), width=4, parents=(), silu=True, bias=False, size=1.0),
    baseline=_baseline,
    derived={"taps": Taps, **PACKED},
    compiled=True,
)

CASES = (
    *OP.standard_cases(),
    OP.case("no activation", (6, 3, 7), silu=False),
    OP.case("bias", (6, 3, 7), bias=True),
    OP.case("three taps", (6, 3, 7), width=3, silu=False),
    OP.case("one tap", (6, 3), width=1),
    OP.case("documents shorter than the taps", (1, 2, 3, 1), width=6),
    OP.case("shared prefix", (7, 5, 5, 1, 2), parents=(-1, 0, 0, 0, 0)),
    OP.case("shared prefix shorter than the taps", (2, 5, 1, 6), parents=(-1, 0, 0, 0), bias=True),
    OP.case("shared prefix, no activation", (3, 4, 3), parents=(-1, 0, 0), silu=False),
    OP.case("trees of several levels", (3, 4, 2, 5, 5, 1, 2, 6, 3), parents=(-1, -1, 1, 2, 2, 1, -1, 6, 6), bias=True),
    OP.case("segments shorter than the taps", (1, 1, 1, 2, 1, 3), parents=(-1, 0, 1, 2, 1, 0), width=6),
    OP.case("large numbers", (5, 4), size=30.0),
    OP.case("several tiles after a shared prefix", (20, 33, 9), parents=(-1, 0, 0), bias=True, pieces=40),
    OP.case("tiles shorter than the taps", (5, 4, 7), width=6, parents=(-1, 0, 0), pieces=10),
    OP.case("tiles of several segments", (7, 3, 3, 3, 3, 3), parents=(-1, 0, 0, 0, 0, 0), pieces=40),
    OP.case("several blocks of channels", (9, 5, 6), channels=259, parents=(-1, 0, 0), threads=3),
)


Sight = Callable[[TokenRelations], Tensor] | None
"""Function that returns the visible pairs of tokens, (tokens, tokens), at any distance. None for all pairs."""
RIGHT: Sight = operator.attrgetter("held")
OTHERS: tuple[tuple[str, Sight], ...] = (
    ("documents see each other", None),
    ("prefix's share missing", lambda where: where.held & where.held.T),
    ("share of one taken for that of all", operator.attrgetter("once")),
    ("a segment sees its sibling", lambda where: where.held | where.siblings),
)
"""Wrong visibility, by the mutant's name."""


TILE_MISTAKES = ("a tile sees no other", "later tiles do not see the prefix")


def conv_matrices(saved: CausalConvSaved, seen_by: Sight = RIGHT, mistake: str = "") -> Tensor:
    """Return ∂c/∂x for each channel as a dense matrix, (channels, tokens, tokens), which the mutants change.

    mistake: one of `TILE_MISTAKES`, or "".
    """
    x, (weight, _), runs, _ = saved
    tokens, width = x.shape[0], weight.shape[1]
    where = token_relations(runs, torch.device("cpu"))
    place = where.position if seen_by is not None else torch.arange(tokens)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < width)
    if seen_by is not None:
        seen &= seen_by(where)
    if mistake:
        segment, tile = _places_in_tiles(runs, weight.shape[0])
        same = segment[:, None] == segment
        seen &= ~same | (tile[:, None] == tile) if mistake == TILE_MISTAKES[0] else same | (tile == 0)[:, None]
    columns = (width - 1 - distance).clamp(0, width - 1)
    return weight[:, columns.to(weight.device)] * seen.to(weight.device)


def _places_in_tiles(runs: tuple[SegmentRun, ...], channels: int) -> tuple[Tensor, Tensor]:
    """Return the segment of each token, and the tile within the segment, (tokens,) each."""
    spans = [span for span, _ in segments(runs)]
    lengths = torch.tensor([stop - start for start, stop in spans], dtype=torch.int64)
    places = torch.cat([torch.arange(0), *(torch.arange(stop - start) for start, stop in spans)])
    return torch.arange(len(spans)).repeat_interleave(lengths), places // tile_tokens(channels)


def _slope(saved: CausalConvSaved) -> Tensor:
    if not saved.silu:
        return torch.ones_like(saved.x)
    c = convolved(saved.x, saved.taps, saved.runs)
    sigmoid = torch.sigmoid(c)
    return sigmoid * (1 + c * (1 - sigmoid))


def _through(d_c: Tensor, matrices: Tensor) -> Tensor:
    return torch.einsum("tc,cts->sc", d_c, matrices)


def _seen_by(sight: Sight, g: Tensor, s: CausalConvSaved) -> Tensor:
    return _through(g * _slope(s), conv_matrices(s, sight))


def _tiled(mistake: str, g: Tensor, s: CausalConvSaved) -> Tensor:
    return _through(g * _slope(s), conv_matrices(s, mistake=mistake))


MUTANTS = (
    wrong("slope forgotten", "d_x", lambda g, s: _through(g, conv_matrices(s))),
    wrong("slope at x", "d_x", lambda g, s: _through(functional.silu(s.x) * g, conv_matrices(s))),
    *(wrong(name, "d_x", partial(_seen_by, sight)) for name, sight in OTHERS),
    *(wrong(mistake, "d_x", partial(_tiled, mistake)) for mistake in TILE_MISTAKES),
    wrong("taps not reversed", "d_x", lambda g, s: _through(g * _slope(s), conv_matrices(s).mT)),
    wrong("its own tap alone", "d_x", lambda g, s: g * _slope(s) * s.taps.weight[:, -1]),
)
