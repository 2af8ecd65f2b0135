"""Weighted biases of the chosen experts: cases and mutants."""

from __future__ import annotations

from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Op

WIDTH = 5
OP = Op(
    "expert_bias",
    dict(chosen=lambda draw, tokens, experts, k: draw.normal(tokens, experts).argsort(dim=-1)[:, :k])
    | dict(weights="tokens k", biases="experts width", d_y="tokens width"),
    {"tokens": Axis(7, 67, 1, 0), "experts": Axis(4, 8), "k": Axis(3, 2), "width": WIDTH},
)

CASES = (
    *OP.standard_cases(),
    OP.case("one choice", 7, k=1),
    OP.case("every expert", 6, 3, 3),
    OP.case("more experts than choices", 2, 9, 2),
)


MUTANTS = (
    wrong("forgotten", "d_weights", lambda d: d * 0),
    OP.perturb("the next expert's bias", "d_weights", chosen=lambda s: (s.chosen + 1) % len(s.biases)),
    OP.perturb("the first choice's bias for all", "d_weights", chosen=lambda s: s.chosen[:, :1].expand_as(s.chosen)),
    wrong("choices reversed", "d_weights", lambda d: d.flip(1)),
    wrong("mean for sum", "d_weights", lambda d: d / WIDTH),
    OP.perturb("tokens reversed", "d_weights", g=lambda g: g.flip(0)),
)
