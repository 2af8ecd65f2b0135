"""Tokens to experts and back: cases and mutants of both ways and of the weights between."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.expert_rows import (
    CombineSaved,
    DispatchSaved,
    Routing,
    WeighSaved,
    combine_backward,
    combine_forward,
    combine_reference,
    dispatch_backward,
    dispatch_forward,
    dispatch_reference,
    route,
    weigh_backward,
    weigh_forward,
    weigh_reference,
)
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

HIDDEN = 5


def _routing(draw: Draw, tokens: int, experts: int, k: int) -> Routing:
    chosen = draw.normal(tokens, experts).argsort(dim=-1)[:, :k]
    return route(chosen, experts)


def _dispatch_case(name: str, tokens: int, experts: int = 4, k: int = 3) -> Case:
    draw = Draw(f"dispatch: {name}")
    routing = _routing(draw, tokens, experts, k)
    tensors = {"x": draw.normal(tokens, HIDDEN), "d_y": draw.normal(tokens * k, HIDDEN)}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = dispatch_forward(t["x"], _on(routing, t["x"]))
        return ByHand(y, {"x": backward(t["d_y"], saved).d_x})

    return Case(name, tensors, by_hand, lambda t: dispatch_reference(t["x"], _on(routing, t["x"])))


def _weigh_case(name: str, tokens: int, experts: int = 4, k: int = 3) -> Case:
    draw = Draw(f"weigh: {name}")
    routing = _routing(draw, tokens, experts, k)
    tensors = {
        "p": draw.normal(tokens * k, HIDDEN),
        "weights": draw.normal(tokens, k),
        "d_y": draw.normal(tokens * k, HIDDEN),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = weigh_forward(t["p"], t["weights"], _on(routing, t["p"]))
        grads = backward(t["d_y"], saved)
        return ByHand(y, {"p": grads.d_p, "weights": grads.d_weights})

    def reference(t: Tensors) -> Tensor:
        return weigh_reference(t["p"], t["weights"], _on(routing, t["p"]))

    return Case(name, tensors, by_hand, reference)


def _combine_case(name: str, tokens: int, experts: int = 4, k: int = 3) -> Case:
    draw = Draw(f"combine: {name}")
    routing = _routing(draw, tokens, experts, k)
    tensors = {"z": draw.normal(tokens * k, HIDDEN), "d_y": draw.normal(tokens, HIDDEN)}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = combine_forward(t["z"], _on(routing, t["z"]))
        return ByHand(y, {"z": backward(t["d_y"], saved).d_z})

    return Case(name, tensors, by_hand, lambda t: combine_reference(t["z"], _on(routing, t["z"])))


def _on(routing: Routing, like: Tensor) -> Routing:
    return routing._replace(tokens=routing.tokens.to(like.device), places=routing.places.to(like.device))


SIZES = (
    ("tokens", 7, 4, 3),
    ("one choice", 7, 4, 1),
    ("every expert", 6, 3, 3),
    ("more experts than rows", 2, 9, 2),
    ("one token", 1, 4, 3),
    ("no tokens", 0, 4, 3),
    ("training size", 67, 8, 2),
)


def _first_choice(d_y: Tensor, s: DispatchSaved) -> Tensor:
    return d_y[s.routing.places[:, 0]]


def _in_order(d_y: Tensor, s: DispatchSaved) -> Tensor:
    """As if the rows were still in the order of the tokens."""
    return d_y.view(*s.routing.places.shape, HIDDEN).sum(1)


def _overwritten(d_y: Tensor, s: DispatchSaved) -> Tensor:
    found = d_y.new_zeros(len(s.routing.places), HIDDEN)
    for row, token in enumerate(s.routing.tokens.tolist()):
        found[token] = d_y[row]
    return found


def _weights_unsorted(d_y: Tensor, s: WeighSaved) -> Tensor:
    return d_y * s.weights.reshape(-1, 1)


def _rows_unsorted(d_y: Tensor, s: WeighSaved) -> Tensor:
    return (s.p * d_y).sum(-1).view(s.weights.shape)


def _repeated(d_y: Tensor, s: CombineSaved) -> Tensor:
    """As if the rows lay in the order of the tokens."""
    return d_y.repeat_interleave(s.routing.places.shape[1], dim=0)


DISPATCH_MUTANTS = (
    *standard_mutants("d_x"),
    Mutant("first choice alone", "d_x", lambda g, s, _right: _first_choice(g, s)),
    Mutant("mean over the choices", "d_x", lambda _g, s, right: right.d_x / s.routing.places.shape[1]),
    Mutant("rows not put back in order", "d_x", lambda g, s, _right: _in_order(g, s)),
    Mutant("overwritten instead of added", "d_x", lambda g, s, _right: _overwritten(g, s)),
)
WEIGH_MUTANTS = (
    *standard_mutants("d_p", "d_weights"),
    Mutant("weights forgotten", "d_p", lambda g, _s, _right: g),
    Mutant("weights of other rows", "d_p", lambda g, s, _right: _weights_unsorted(g, s)),
    Mutant("rows reversed", "d_p", lambda _g, _s, right: right.d_p.flip(0)),
    Mutant("rows of other experts", "d_weights", lambda g, s, _right: _rows_unsorted(g, s)),
    Mutant("choices reversed", "d_weights", lambda _g, _s, right: right.d_weights.flip(1)),
    Mutant("of the weighted rows", "d_weights", lambda _g, s, right: right.d_weights * s.weights),
)
COMBINE_MUTANTS = (
    *standard_mutants("d_z"),
    Mutant("mean over the choices", "d_z", lambda _g, s, right: right.d_z / s.routing.places.shape[1]),
    Mutant("rows in the order of the tokens", "d_z", lambda g, s, _right: _repeated(g, s)),
    Mutant("tokens reversed", "d_z", lambda g, s, _right: g.flip(0)[s.routing.tokens]),
)

PROOFS = (
    OpProof("dispatch", dispatch_backward, tuple(_dispatch_case(*size) for size in SIZES), DISPATCH_MUTANTS),
    OpProof("weigh", weigh_backward, tuple(_weigh_case(*size) for size in SIZES), WEIGH_MUTANTS),
    OpProof("combine", combine_backward, tuple(_combine_case(*size) for size in SIZES), COMBINE_MUTANTS),
)
