"""Triplet loss: cases with several negatives, and with none, and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from backhand.ops.triplet import TripletSaved
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import COUNT, Axis, Draw, Op


def _rows(draw: Draw, rows: int, width: int) -> Tensor:
    return normalize(draw.normal(rows, width), dim=1)


def _owners(draw: Draw, rows: int, each: int) -> Tensor:
    """Return the anchors of the negatives, in any order. The first anchor has one more than the others."""
    owners = torch.cat((torch.arange(rows).repeat(each), torch.zeros(min(rows, 1), dtype=torch.int64)))
    return owners[torch.randperm(len(owners), generator=draw.generator)]


OP = Op(
    "triplet",
    {
        "anchors": _rows,
        "positives": _rows,
        "owners": _owners,
        "negatives": lambda draw, owners, width: _rows(draw, len(owners), width),
        "d_y": "rows",
    },
    {"rows": COUNT, "width": Axis(7, 33), "each": 2, "margin": 0.31},
)

CASES = (
    *OP.standard_cases(),
    OP.case("one negative each", each=1),
    OP.case("most without negatives", each=0),
    OP.case("always above the margin", margin=2.5),
)


def _w(g: Tensor, s: TripletSaved) -> Tensor:
    return (g[s.owners] * s.shares)[:, None]


def _sum(s: TripletSaved, values: Tensor) -> Tensor:
    return values.new_zeros(len(s.anchors), values.shape[1]).index_add_(0, s.owners, values)


MUTANTS = (
    wrong("maximum ignored", "d_negatives", lambda g, s, d: torch.where(d == 0, g[s.owners][:, None], d)),
    wrong("sum for mean", "d_negatives", lambda g, s: (g[s.owners] * (s.shares > 0))[:, None] * s.anchors[s.owners]),
    wrong("anchors in order", "d_negatives", lambda g, s: _w(g, s) * s.anchors[s.owners.sort().values]),
    wrong("positive for anchor", "d_negatives", lambda g, s: _w(g, s) * s.positives[s.owners]),
    wrong("pushed away", "d_positives", lambda g, s: _sum(s, _w(g, s)) * s.anchors),
    wrong("its own row", "d_positives", lambda g, s: -_sum(s, _w(g, s)) * s.positives),
    wrong("negatives forgotten", "d_anchors", lambda g, s: -_sum(s, _w(g, s)) * s.positives),
    wrong("positive forgotten", "d_anchors", lambda g, s: _sum(s, _w(g, s) * s.negatives)),
    wrong("rows in reverse", "d_anchors d_positives d_negatives", lambda d: d.flip(0)),
)
