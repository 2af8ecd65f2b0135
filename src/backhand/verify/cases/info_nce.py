"""InfoNCE: cases of both forms, with excluded pairs and blocks of anchors, and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from backhand.ops.info_nce import InfoNCEGrads, InfoNCERule, InfoNCESaved, Labels, info_nce_backward
from backhand.verify.mutants import Mutant, wrong
from backhand.verify.scaffold import COUNT, Axis, Draw, Op


def _rows(draw: Draw, rows: int, width: int, unit: bool) -> Tensor:
    drawn = draw.normal(rows, width, size=0.7)
    return normalize(drawn, dim=1) if unit else drawn


def _positives(draw: Draw, rows: int, count: int) -> Tensor:
    """Draw a different positive for each anchor, not in the order of the anchors."""
    return torch.randperm(count, generator=draw.generator)[:rows]


def _excluded(draw: Draw, positives: Tensor, rows: int, count: int, share: float) -> Tensor:
    """Draw pairs that are no positives, in any order."""
    drawn = torch.rand(rows, count, generator=draw.generator) < share
    drawn[torch.arange(rows), positives] = False
    pairs = drawn.nonzero()
    return pairs[torch.randperm(len(pairs), generator=draw.generator)]


def _drawn_labels(draw: Draw, rows: int, count: int, kinds: int) -> dict[str, Tensor]:
    """Draw labels of so few kinds that many pairs have equal ones; none if `kinds` is 0."""
    sizes = {"anchor_labels": rows, "candidate_labels": count} if kinds else {}
    return {name: torch.randint(kinds, (size,), generator=draw.generator) for name, size in sizes.items()}


def _labels(anchor_labels: Tensor | None, candidate_labels: Tensor | None) -> Labels | None:
    return None if anchor_labels is None or candidate_labels is None else Labels(anchor_labels, candidate_labels)


ONE_WAY, SYMMETRIC = InfoNCERule(1.7), InfoNCERule(1.3, symmetric=True)
OP = Op(
    "info_nce",
    {
        "anchors": _rows,
        "candidates": lambda draw, count, width, unit: _rows(draw, count, width, unit),
        "positives": _positives,
        "excluded": _excluded,
        "drawn_labels": _drawn_labels,
        "d_y": "rows",
    },
    {"rule": ONE_WAY, "rows": COUNT, "others": 4, "width": Axis(7, 33), "share": 0.2, "unit": False, "kinds": 0},
    derived={"count": lambda rows, others: rows + others, "labels": _labels},
)

CASES = (
    *OP.standard_cases(),
    *OP.standard_cases("symmetric: ", rule=SYMMETRIC),
    OP.case("unit rows, scale 20", InfoNCERule(20.0), unit=True),
    OP.case("unit rows, scale 20, symmetric", InfoNCERule(20.0, symmetric=True), unit=True),
    OP.case("no hard negatives", ONE_WAY, 6, 0),
    OP.case("nothing excluded", SYMMETRIC, share=0.0),
    OP.case("most are excluded", SYMMETRIC, share=0.8),
    OP.case("blocks of two anchors", SYMMETRIC, 7, 2, pieces=18),
    OP.case("labels", ONE_WAY, kinds=3),
    OP.case("labels, symmetric, blocks of two anchors", SYMMETRIC, 7, 2, kinds=2, pieces=18),
)


def _under(g: Tensor, s: InfoNCESaved, **changes: Any) -> InfoNCEGrads:
    """Return the right gradients for changed saved values."""
    return info_nce_backward(g, s._replace(**changes))


def _weighted_by_rows(g: Tensor, s: InfoNCESaved, d: Tensor) -> Tensor:
    """Add the columns' softmax with the gradient of the anchor instead of that of the positive."""
    if not s.rule.symmetric:
        return d
    scores = s.rule.scale * (s.anchors @ s.candidates.T)
    scores[s.excluded[:, 0], s.excluded[:, 1]] = -torch.inf
    if s.labels is not None:
        alike = s.labels.anchors[:, None] == s.labels.candidates
        scores.masked_fill_(alike.scatter_(1, s.positives[:, None], False), -torch.inf)
    columns = (scores - s.column_sums.nan_to_num(neginf=0.0)).exp()
    return d + s.rule.scale / 2 * (g[:, None] * columns).T @ s.anchors


def _anchors_without(part: str) -> tuple[Mutant, ...]:
    """Return a mutant of d_anchors that lacks the pull of the positive, or the push of the negatives."""

    def mistake(g: Tensor, s: InfoNCESaved, d: Tensor) -> Tensor:
        pull = -s.rule.scale * g[:, None] * s.candidates[s.positives]
        return (d - pull if part == "pull" else pull).to(d.dtype)

    return wrong(f"{part} of the positive", "d_anchors", mistake)


MUTANTS = (
    wrong("scale forgotten", "d_anchors d_candidates", lambda s, d: d / s.rule.scale),
    _anchors_without("pull"),
    _anchors_without("push"),
    wrong("upstream gradient ignored", "d_anchors", lambda g, s: _under(torch.ones_like(g), s).d_anchors),
    wrong("upstream gradient ignored", "d_candidates", lambda g, s: _under(torch.ones_like(g), s).d_candidates),
    wrong("mean over anchors", "d_anchors d_candidates", lambda g, d: d / max(2, len(g))),
    wrong(
        "excluded pairs counted",
        "d_anchors d_candidates",
        lambda g, s, gradient: getattr(_under(g, s, excluded=s.excluded[:0]), gradient),
    ),
    wrong(
        "candidates with the same label counted",
        "d_anchors d_candidates",
        lambda g, s, gradient: getattr(_under(g, s, labels=None), gradient),
    ),
    wrong(
        "positives in order",
        "d_anchors d_candidates",
        lambda g, s, gradient: getattr(_under(g, s, positives=s.positives.sort().values), gradient),
    ),
    wrong(
        "columns forgotten",
        "d_anchors d_candidates",
        lambda g, s, gradient: getattr(_under(g, s, rule=s.rule._replace(symmetric=False)), gradient),
    ),
    wrong("columns weighted by the wrong gradient", "d_candidates", _weighted_by_rows),
    wrong("anchors in reverse", "d_anchors", lambda d: d.flip(0)),
    wrong("candidates in reverse", "d_candidates", lambda d: d.flip(0)),
)
