"""The clipped policy loss: cases of every form, and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.grpo import GRPORule
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Draw, Op


def _constants(draw: Draw, log_p: Tensor, lengths: tuple[int, ...], moved: float, rule: GRPORule) -> dict[str, Tensor]:
    """Draw the constants of the loss. Neighbouring tokens belong to different answers."""
    count, tokens = len(lengths), sum(lengths)
    owners = torch.arange(count).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    constants = {
        "old": log_p + draw.normal(tokens, size=moved),
        "advantages": draw.normal(count),
        "weights": draw.normal(count).abs() + 0.2,
        "owners": owners.roll(1),
    }
    return constants | ({"reference": log_p + draw.normal(tokens, size=0.3)} if rule.beta else {})


RULE = GRPORule("grpo", 0.2, 0.3, 0.13)
LENGTHS = Axis((3, 1, 5, 2), tuple(1 + number * 7 % 23 for number in range(64)), (1,), ())
OP = Op(
    "grpo",
    {"log_p": "0.7: tokens", "constants": _constants, "d_y": "count"},
    {"rule": RULE, "lengths": LENGTHS, "moved": 0.25},
    derived={"tokens": lambda lengths: sum(lengths), "count": lambda lengths: len(lengths)},
)

CASES = (
    *OP.standard_cases(),
    OP.case("without a reference", RULE._replace(beta=0.0)),
    OP.case("one update", moved=0.0),
    OP.case("rloo", GRPORule("rloo", 0.2, 0.3)),
    OP.case("rloo, one update", GRPORule("rloo"), moved=0.0),
    OP.case("far apart", RULE, (3, 4), 1.5),
)


MUTANTS = (
    wrong("weight forgotten", "d_log_p", lambda s, d: d / s.weights[s.owners]),
    wrong("upstream gradient ignored", "d_log_p", lambda g, s, d: d / g[s.owners]),
    wrong("never clipped", "d_log_p", lambda d: torch.where(d == 0, 0.1, d)),
    OP.perturb("divergence forgotten", "d_log_p", d_divergence=lambda: None),
    wrong(
        "divergence the other way", "d_log_p", lambda g, s, d: d + (0 if s.d_divergence is None else 2 * g[s.owners])
    ),
    wrong("tokens reversed", "d_log_p", lambda d: d.flip(0)),
)
