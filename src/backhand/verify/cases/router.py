"""The router: cases and mutants. Logits lie so far apart that no finite difference changes the choice."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.router import RouterSaved
from backhand.verify.case import Case, Draw, wrong
from backhand.verify.scaffold import Op

APART = 1.5
OP = Op("router")


def _case(name: str, tokens: int, experts: int = 7, k: int = 3, *, of_all: bool = False) -> Case:
    def logits(draw: Draw) -> Tensor:
        order = draw.normal(tokens, experts).argsort(dim=-1).double()
        return APART * (order - experts / 2) + draw.normal(tokens, experts, size=0.1)

    return OP.case(name, {"logits": logits, "d_y": (tokens, k)}, k=k, of_all=of_all)


CASES = (
    _case("shares among the chosen", 5),
    _case("shares among all", 5, of_all=True),
    _case("every expert chosen", 5, 4, 4),
    _case("one expert chosen, shares among all", 5, 4, 1, of_all=True),
    _case("two experts", 6, 2, 1, of_all=True),
    _case("one token", 1),
    _case("one token, shares among all", 1, of_all=True),
    _case("no tokens", 0),
    _case("training size", 67, 12, 4),
)


def _weights(s: RouterSaved) -> Tensor:
    return s.shares.gather(1, s.chosen) if s.of_all else s.shares


def _placed(chosen_alone: Tensor, s: RouterSaved) -> Tensor:
    return chosen_alone.new_zeros(len(s.chosen), s.experts).scatter_(1, s.chosen, chosen_alone)


def _among_chosen(g: Tensor, s: RouterSaved) -> Tensor:
    w = _weights(s)
    return _placed(w * (g - (w * g).sum(-1, keepdim=True)), s)


def _unweighted(g: Tensor, s: RouterSaved) -> Tensor:
    return _placed(g - (_weights(s) * g).sum(-1, keepdim=True), s)


MUTANTS = (
    wrong("sum forgotten", "d_logits", lambda g, s: _placed(_weights(s) * g, s)),
    wrong("weights forgotten", "d_logits", lambda g, s: _unweighted(g, s)),
    wrong("those not chosen left out", "d_logits", lambda g, s: _among_chosen(g, s)),
    wrong("choices reversed", "d_logits", lambda g, s: _among_chosen(g, s._replace(chosen=s.chosen.flip(1)))),
    wrong("experts in order", "d_logits", lambda d: d.sort(dim=-1).values),
)


PROOFS = (OP.proof(CASES, MUTANTS),)
