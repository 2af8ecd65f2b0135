"""Binary cross-entropy: cases with hard and soft targets, and mutants."""

from __future__ import annotations

from torch import Tensor

from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Draw, Op


def _targets(draw: Draw, shape: tuple[int, ...], soft: bool) -> Tensor:
    """Draw targets: probabilities, or 0 and 1."""
    drawn = draw.normal(*shape)
    return drawn.sigmoid() if soft else (drawn > 0).double()


OP = Op(
    "binary_cross_entropy",
    {"scores": "size: *shape", "targets": _targets, "d_y": "*shape"},
    {"shape": Axis((7,), (67, 3), (1,), (0,), (2, 5, 3)), "soft": True, "size": 2.0, "positive_weight": 1.7},
)

CASES = (
    *OP.standard_cases(),
    OP.case("hard targets", soft=False),
    OP.case("no weight", positive_weight=1.0),
    OP.case("large scores", size=300.0, soft=False),
    OP.case("scores near 0", size=1e-4),
)

MUTANTS = (
    wrong("targets forgotten", "d_scores", lambda g, s: g * s.scores.sigmoid()),
    wrong("weight forgotten", "d_scores", lambda g, s: g * (s.scores.sigmoid() - s.targets)),
    wrong(
        "weight of no",
        "d_scores",
        lambda g, s: g * (s.positive_weight * (1 - s.targets) * s.scores.sigmoid() - s.targets * (-s.scores).sigmoid()),
    ),
    wrong("upstream gradient ignored", "d_scores", lambda g, d: d / g),
    wrong("derivative of σ", "d_scores", lambda s, d: d * s.scores.sigmoid() * (-s.scores).sigmoid()),
    wrong(
        "hard for soft targets",
        "d_scores",
        lambda g, s: (
            g * ((s.targets < 0.5) * s.scores.sigmoid() - s.positive_weight * (s.targets > 0.5) * (-s.scores).sigmoid())
        ),
    ),
    wrong("scores in reverse", "d_scores", lambda d: d.flip(0)),
)
