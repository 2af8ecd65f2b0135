"""Embedding: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.embedding import EmbeddingSaved, embedding_backward, embedding_forward, embedding_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, overwritten, standard_mutants


def _case(
    name: str, lead: tuple[int, ...], vocab: int = 6, hidden: int = 5, *, scaling: float = 1.0, one_token: bool = False
) -> Case:
    draw = Draw(f"embedding: {name}")
    ids = draw.integers(vocab, *lead)
    if one_token:
        ids = torch.full_like(ids, 2)
    tensors = {"ids": ids, "weight": draw.normal(vocab, hidden), "d_y": draw.normal(*lead, hidden)}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = embedding_forward(t["ids"], t["weight"], scaling)
        return ByHand(y, {"weight": backward(t["d_y"], saved).d_weight})

    def reference(t: Tensors) -> Tensor:
        return embedding_reference(t["ids"], t["weight"], scaling)

    def usual(t: Tensors) -> Tensor:
        return functional.embedding(t["ids"], t["weight"]) * scaling

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("tokens, some of them twice", (9,)),
    _case("scaling", (9,), scaling=2.4),
    _case("documents and tokens", (2, 9), scaling=2.4),
    _case("one token many times", (40,), one_token=True, scaling=1.7),
    _case("unseen tokens", (3,), vocab=11),
    _case("one token", (1,)),
    _case("no tokens", (0,), scaling=2.4),
    _case("training size", (67,), 353, 48, scaling=6.9),
)


def _counts(s: EmbeddingSaved) -> Tensor:
    return torch.bincount(s.ids.reshape(-1), minlength=s.vocab).clamp(min=1)[:, None]


MUTANTS = (
    *standard_mutants("d_weight"),
    Mutant("scaling forgotten", "d_weight", lambda _g, s, right: right.d_weight / s.scaling),
    Mutant(
        "overwritten instead of summed",
        "d_weight",
        lambda g, s, _right: overwritten(s.vocab, s.ids, s.scaling * g),
    ),
    Mutant("mean for sum", "d_weight", lambda _g, s, right: right.d_weight / _counts(s)),
    Mutant(
        "tokens reversed",
        "d_weight",
        lambda g, s, _right: embedding_backward(g, s._replace(ids=s.ids.reshape(-1).flip(0))).d_weight,
    ),
    Mutant("ids off by one", "d_weight", lambda _g, _s, right: right.d_weight.roll(1, 0)),
)

PROOFS = (OpProof("embedding", embedding_backward, CASES, MUTANTS),)
