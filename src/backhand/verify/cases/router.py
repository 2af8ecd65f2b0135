"""The router: cases and mutants. Logits lie so far apart that no finite difference changes the choice."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.router import RouterSaved, router_backward, router_forward, router_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

APART = 1.5


def _case(name: str, tokens: int, experts: int = 7, k: int = 3, *, of_all: bool = False) -> Case:
    draw = Draw(f"router: {name}")
    order = draw.normal(tokens, experts).argsort(dim=-1).double()
    tensors = {
        "logits": APART * (order - experts / 2) + draw.normal(tokens, experts, size=0.1),
        "d_y": draw.normal(tokens, k),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = router_forward(t["logits"], k, of_all=of_all)
        return ByHand(y, {"logits": backward(t["d_y"], saved).d_logits})

    def reference(t: Tensors) -> Tensor:
        return router_reference(t["logits"], k, of_all=of_all)

    return Case(name, tensors, by_hand, reference)


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
    *standard_mutants("d_logits"),
    Mutant("sum forgotten", "d_logits", lambda g, s, _right: _placed(_weights(s) * g, s)),
    Mutant("weights forgotten", "d_logits", lambda g, s, _right: _unweighted(g, s)),
    Mutant("those not chosen left out", "d_logits", lambda g, s, _right: _among_chosen(g, s)),
    Mutant("choices reversed", "d_logits", lambda g, s, _right: _among_chosen(g, s._replace(chosen=s.chosen.flip(1)))),
    Mutant("experts in order", "d_logits", lambda _g, _s, right: right.d_logits.sort(dim=-1).values),
)

PROOFS = (OpProof("router", router_backward, CASES, MUTANTS),)
