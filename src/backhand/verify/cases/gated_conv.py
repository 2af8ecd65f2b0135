"""The gated short convolution: cases and mutants."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from backhand.ops.causal_conv import CausalConvSaved, Taps, causal_conv_reference
from backhand.ops.document_groups import SegmentRun
from backhand.ops.gated_conv import GatedConvSaved
from backhand.verify.cases.causal_conv import OTHERS, RIGHT, TILE_MISTAKES, Sight, conv_matrices
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import DOCUMENTS, PACKED, Axis, Op


def _baseline(bcx: Tensor, taps: Taps, runs: tuple[SegmentRun, ...]) -> Tensor:
    b, c, x = bcx.chunk(3, dim=-1)
    return c * causal_conv_reference(b * x, taps, runs)


OP = Op(
    "gated_conv",
    {"bcx": "tokens wide", "d_y": "tokens channels", "weight": "channels width", "bias": "channels"},
    {"documents": DOCUMENTS, "channels": Axis(5, 48), "width": 3, "parents": (), "bias": False, "into_buffer": False},
    baseline=_baseline,
    derived={
        "taps": Taps,
        **PACKED,
        "wide": lambda channels: 3 * channels,
        "out": lambda bcx, into_buffer: torch.full_like(bcx, torch.nan) if into_buffer else None,
    },
    compiled=True,
)

CASES = (
    *OP.standard_cases(),
    OP.case("bias", (6, 4), bias=True),
    OP.case("four taps", (6, 7), width=4),
    OP.case("one tap", (6, 3), width=1),
    OP.case("documents shorter than the taps", (1, 2, 3, 1), width=6),
    OP.case("shared prefix", (7, 5, 5, 1, 2), parents=(-1, 0, 0, 0, 0)),
    OP.case("shared prefix shorter than the taps", (1, 5, 1, 6), parents=(-1, 0, 0, 0), bias=True),
    OP.case("trees of several levels", (3, 4, 2, 5, 5, 1, 2, 6, 3), parents=(-1, -1, 1, 2, 2, 1, -1, 6, 6), bias=True),
    OP.case("segments shorter than the taps", (1, 1, 1, 2, 1, 3), parents=(-1, 0, 1, 2, 1, 0), width=6),
    OP.case("into a used buffer", (5, 3), into_buffer=True),
    OP.case("several tiles after a shared prefix", (20, 33, 9), parents=(-1, 0, 0), bias=True, pieces=40),
    OP.case("tiles shorter than the taps", (5, 4, 7), width=6, parents=(-1, 0, 0), pieces=10),
    OP.case("several blocks of channels", (9, 5, 6), channels=259, parents=(-1, 0, 0), threads=3),
)


def _parts(s: GatedConvSaved) -> tuple[Tensor, Tensor, Tensor]:
    b, c, x = s.bcx.chunk(3, dim=-1)
    return b, c, x


def _matrices(s: GatedConvSaved, sight: Sight = RIGHT, mistake: str = "") -> Tensor:
    b, _, x = _parts(s)
    return conv_matrices(CausalConvSaved(b * x, s.taps, s.runs, False), sight, mistake)


def _seen_by(sight: Sight, g: Tensor, s: GatedConvSaved) -> Tensor:
    return _gradient(g, s, _matrices(s, sight))


def _tiled(mistake: str, g: Tensor, s: GatedConvSaved) -> Tensor:
    return _gradient(g, s, _matrices(s, mistake=mistake))


def _gradient(g: Tensor, s: GatedConvSaved, matrices: Tensor, *, gated: bool = True) -> Tensor:
    """Return [d_B | d_C | d_x] for the given matrices of the convolution."""
    b, c, x = _parts(s)
    convolved = torch.einsum("cts,sc->tc", matrices, b * x)
    if s.taps.bias is not None:
        convolved = convolved + s.taps.bias
    d_z = torch.einsum("tc,cts->sc", g * c if gated else g, matrices)
    return torch.cat([d_z * x, g * convolved, d_z * b], dim=-1)


def _input_gate_alone(d: Tensor) -> Tensor:
    d_b, d_c, d_x = d.chunk(3, dim=-1)
    return torch.cat([d_b, torch.zeros_like(d_c), d_x], dim=-1)


MUTANTS = (
    wrong("output gate not in d_z", "d_bcx", lambda g, s: _gradient(g, s, _matrices(s), gated=False)),
    *(wrong(name, "d_bcx", partial(_seen_by, sight)) for name, sight in OTHERS),
    *(wrong(mistake, "d_bcx", partial(_tiled, mistake)) for mistake in TILE_MISTAKES),
    wrong("taps not reversed", "d_bcx", lambda g, s: _gradient(g, s, _matrices(s).mT)),
    wrong("gate and input exchanged", "d_bcx", lambda d: torch.cat(d.chunk(3, dim=-1)[::-1], dim=-1)),
    wrong("output gate's gradient missing", "d_bcx", _input_gate_alone),
)
