"""The router: cases and mutants. Logits differ so much that no finite difference changes the choice."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.router import RouterSaved
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Draw, Op

APART = 1.5


def _logits(draw: Draw, tokens: int, experts: int) -> Tensor:
    order = draw.normal(tokens, experts).argsort(dim=-1).double()
    return APART * (order - experts / 2) + draw.normal(tokens, experts, size=0.1)


OP = Op(
    "router",
    {"logits": _logits, "d_y": "tokens k"},
    {"tokens": Axis(5, 67, 1, 0), "experts": Axis(7, 12), "k": Axis(3, 4), "of_all": False},
)

CASES = (
    *OP.standard_cases("shares among the chosen: "),
    *OP.standard_cases("shares among all: ", of_all=True),
    OP.case("every expert chosen", 5, 4, 4),
    OP.case("one expert chosen, shares among all", 5, 4, 1, of_all=True),
    OP.case("two experts", 6, 2, 1, of_all=True),
)


def _weights(s: RouterSaved) -> Tensor:
    return s.shares.gather(1, s.chosen) if s.of_all else s.shares


def _placed(chosen_alone: Tensor, s: RouterSaved) -> Tensor:
    return chosen_alone.new_zeros(len(s.chosen), s.experts).scatter_(1, s.chosen, chosen_alone)


def _among_chosen(g: Tensor, s: RouterSaved) -> Tensor:
    w = _weights(s)
    return _placed(w * (g - (w * g).sum(-1, keepdim=True)), s)


MUTANTS = (
    wrong("sum forgotten", "d_logits", lambda g, s: _placed(_weights(s) * g, s)),
    wrong("weights forgotten", "d_logits", lambda g, s: _placed(g - (_weights(s) * g).sum(-1, keepdim=True), s)),
    wrong("those not chosen left out", "d_logits", lambda g, s: _among_chosen(g, s)),
    wrong("choices reversed", "d_logits", lambda g, s: _among_chosen(g, s._replace(chosen=s.chosen.flip(1)))),
    wrong("experts in order", "d_logits", lambda d: d.sort(dim=-1).values),
)
