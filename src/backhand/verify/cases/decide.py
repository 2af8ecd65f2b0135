"""Decisions: cases with hard and soft targets, and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Draw, Op


def _options(counts: tuple[int, ...]) -> int:
    return sum(counts)


def _owner(counts: tuple[int, ...], scores: Tensor) -> Tensor:
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    return owner.to(scores.device)


def _targets(draw: Draw, counts: tuple[int, ...], soft: bool) -> Tensor:
    """Draw targets of every question: probabilities, or one option."""
    parts = [draw.normal(count) for count in counts]
    if soft:
        return torch.cat([part.softmax(0) for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
    return torch.cat([(part == part.max()).double() for part in parts])


OP = Op(
    "decide",
    {"scores": "size: options", "d_y": "questions", "targets": _targets},
    {"counts": Axis((2, 5, 3), (26, 2, 10) * 9, (4,), ()), "soft": True, "size": 2.0},
    derived={"owner": _owner, "options": _options, "questions": lambda counts: len(counts)},
)

CASES = (
    *OP.standard_cases(),
    OP.case("hard targets", soft=False),
    OP.case("one option", (1, 3)),
    OP.case("far apart", size=60.0),
    OP.case("nearly equal", size=1e-3),
)

MUTANTS = (
    wrong("targets forgotten", "d_scores", lambda g, s: g[s.owner] * s.p),
    wrong("softmax over all questions", "d_scores", lambda g, s: g[s.owner] * (s.p / len(g) - s.targets)),
    wrong("upstream gradient ignored", "d_scores", lambda g, s, d: d / g[s.owner]),
    wrong("gradient of the probability", "d_scores", lambda s, d: d * s.p),
    wrong("hard for soft targets", "d_scores", lambda g, s: g[s.owner] * (s.p - (s.targets > 0.5).to(s.p.dtype))),
    wrong("questions in reverse", "d_scores", lambda g, s: g.flip(0)[s.owner] * (s.p - s.targets)),
    wrong("options in reverse", "d_scores", lambda d: d.flip(0)),
)
