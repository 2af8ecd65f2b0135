"""Causal depthwise convolution: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.causal_conv import CausalConvSaved, Taps, causal_conv_reference, convolved
from backhand.ops.document_groups import Run
from backhand.verify.case import wrong
from backhand.verify.scaffold import PACKED, Op


def _usual(x: Tensor, taps: Taps, runs: tuple[Run, ...], shared: int, silu: bool) -> Tensor:
    c = causal_conv_reference(x, taps, runs, shared)
    return functional.silu(c) if silu else c


OP = Op(
    "causal_conv",
    {"x": "size: tokens channels", "d_y": "tokens channels", "weight": "channels width", "bias": "channels"},
    {"documents": ..., "channels": 5, "width": 4, "shared": 0, "silu": True, "bias": False, "size": 1.0},
    usual=_usual,
    made={"taps": Taps, **PACKED},
)

CASES = (
    OP.case("packed documents", (6, 6, 3, 1, 2)),
    OP.case("no activation", (6, 3, 7), silu=False),
    OP.case("bias", (6, 3, 7), bias=True),
    OP.case("three taps", (6, 3, 7), width=3, silu=False),
    OP.case("one tap", (6, 3), width=1),
    OP.case("documents shorter than the taps", (1, 2, 3, 1), width=6),
    OP.case("shared prefix", (5, 5, 1, 2), shared=7),
    OP.case("shared prefix shorter than the taps", (5, 1, 6), shared=2, bias=True),
    OP.case("shared prefix, no activation", (4, 3), shared=3, silu=False),
    OP.case("nothing but a prefix", (), shared=4),
    OP.case("large numbers", (5, 4), size=30.0),
    OP.case("one token", (1,)),
    OP.case("no tokens", ()),
    OP.case("training size", (40, 40, 17), channels=48),
)


def documents_of(tokens: int, runs: tuple[tuple[int, int, int], ...], shared: int) -> Tensor:
    """For each token its document's number, (tokens,); the prefix is 0."""
    lengths = [shared] + [n for _, count, n in runs for _ in range(count)]
    assert sum(lengths) == tokens
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def conv_matrices(saved: CausalConvSaved, *, apart: bool = True, prefix: bool = True) -> Tensor:
    """∂c/∂x for each channel, (channels, tokens, tokens): what the mutants get wrong stands here in the open."""
    x, (weight, _), runs, shared, _ = saved
    tokens, width = x.shape[0], weight.shape[1]
    document = documents_of(tokens, runs, shared)
    starts = [0] + [shared] * int(document.max() if tokens else 0)
    place = torch.cat([start + torch.arange(int((document == d).sum())) for d, start in enumerate(starts)])
    if not apart:
        place = torch.arange(tokens)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < width)
    if apart:
        same = document[:, None] == document[None, :]
        seen &= same | (document[None, :] == 0) if prefix else same
    columns = (width - 1 - distance).clamp(0, width - 1)
    return weight[:, columns.to(weight.device)] * seen.to(weight.device)


def _slope(saved: CausalConvSaved) -> Tensor:
    if not saved.silu:
        return torch.ones_like(saved.x)
    c = convolved(saved.x, saved.taps, saved.runs, saved.shared)
    sigmoid = torch.sigmoid(c)
    return sigmoid * (1 + c * (1 - sigmoid))


def _through(d_c: Tensor, matrices: Tensor) -> Tensor:
    return torch.einsum("tc,cts->sc", d_c, matrices)


MUTANTS = (
    wrong("slope forgotten", "d_x", lambda g, s: _through(g, conv_matrices(s))),
    wrong("slope at x", "d_x", lambda g, s: _through(functional.silu(s.x) * g, conv_matrices(s))),
    wrong("documents see each other", "d_x", lambda g, s: _through(g * _slope(s), conv_matrices(s, apart=False))),
    wrong("taps not turned round", "d_x", lambda g, s: _through(g * _slope(s), conv_matrices(s).mT)),
    wrong("prefix's share missing", "d_x", lambda g, s: _through(g * _slope(s), conv_matrices(s, prefix=False))),
    wrong("its own tap alone", "d_x", lambda g, s: g * _slope(s) * s.taps.weight[:, -1]),
)


PROOFS = (OP.proof(CASES, MUTANTS, loops=True),)
