"""Weighted biases of the chosen experts: cases and mutants."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.expert_bias import (
    ExpertBiasSaved,
    expert_bias_backward,
    expert_bias_forward,
    expert_bias_reference,
)
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

WIDTH = 5


def _case(name: str, tokens: int, experts: int = 4, k: int = 3) -> Case:
    draw = Draw(f"expert_bias: {name}")
    chosen = draw.normal(tokens, experts).argsort(dim=-1)[:, :k]
    tensors = {
        "weights": draw.normal(tokens, k),
        "biases": draw.normal(experts, WIDTH),
        "d_y": draw.normal(tokens, WIDTH),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = expert_bias_forward(t["weights"], chosen.to(t["biases"].device), t["biases"])
        return ByHand(y, {"weights": backward(t["d_y"], saved).d_weights})

    def reference(t: Tensors) -> Tensor:
        return expert_bias_reference(t["weights"], chosen.to(t["biases"].device), t["biases"])

    return Case(name, tensors, by_hand, reference)


CASES = (
    _case("tokens", 7),
    _case("one choice", 7, k=1),
    _case("every expert", 6, 3, 3),
    _case("more experts than choices", 2, 9, 2),
    _case("one token", 1),
    _case("no tokens", 0),
    _case("training size", 67, 8, 2),
)


def _of_next_expert(d_y: Tensor, s: ExpertBiasSaved) -> Tensor:
    return expert_bias_backward(d_y, s._replace(chosen=(s.chosen + 1) % len(s.biases))).d_weights


def _first_choice(d_y: Tensor, s: ExpertBiasSaved) -> Tensor:
    return expert_bias_backward(d_y, s._replace(chosen=s.chosen[:, :1].expand_as(s.chosen))).d_weights


MUTANTS = (
    *standard_mutants("d_weights"),
    Mutant("forgotten", "d_weights", lambda _g, _s, right: right.d_weights * 0),
    Mutant("the next expert's bias", "d_weights", lambda g, s, _right: _of_next_expert(g, s)),
    Mutant("the first choice's bias for all", "d_weights", lambda g, s, _right: _first_choice(g, s)),
    Mutant("choices reversed", "d_weights", lambda _g, _s, right: right.d_weights.flip(1)),
    Mutant("mean for sum", "d_weights", lambda _g, _s, right: right.d_weights / WIDTH),
    Mutant("tokens reversed", "d_weights", lambda g, s, _right: expert_bias_backward(g.flip(0), s).d_weights),
)

PROOFS = (OpProof("expert_bias", expert_bias_backward, CASES, MUTANTS),)
