"""Weighted biases of the chosen experts: cases and mutants."""

from __future__ import annotations

from backhand.verify.case import Case, wrong
from backhand.verify.scaffold import Op

WIDTH = 5
OP = Op("expert_bias")


def _case(name: str, tokens: int, experts: int = 4, k: int = 3) -> Case:
    inputs = {
        "chosen": lambda draw: draw.normal(tokens, experts).argsort(dim=-1)[:, :k],
        "weights": (tokens, k),
        "biases": (experts, WIDTH),
        "d_y": (tokens, WIDTH),
    }
    return OP.case(name, inputs)


CASES = (
    _case("tokens", 7),
    _case("one choice", 7, k=1),
    _case("every expert", 6, 3, 3),
    _case("more experts than choices", 2, 9, 2),
    _case("one token", 1),
    _case("no tokens", 0),
    _case("training size", 67, 8, 2),
)


MUTANTS = (
    wrong("forgotten", "d_weights", lambda d: d * 0),
    OP.redo("the next expert's bias", "d_weights", chosen=lambda s: (s.chosen + 1) % len(s.biases)),
    OP.redo("the first choice's bias for all", "d_weights", chosen=lambda s: s.chosen[:, :1].expand_as(s.chosen)),
    wrong("choices reversed", "d_weights", lambda d: d.flip(1)),
    wrong("mean for sum", "d_weights", lambda d: d / WIDTH),
    OP.redo("tokens reversed", "d_weights", g=lambda g: g.flip(0)),
)


PROOFS = (OP.proof(CASES, MUTANTS),)
