"""Trained rows of an embedding and of an output head: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.token_rows import (
    TokenLinearSaved,
    token_embedding_backward,
    token_embedding_forward,
    token_embedding_reference,
    token_linear_backward,
    token_linear_forward,
    token_linear_reference,
)
from backhand.verify.case import (
    Backward,
    ByHand,
    Case,
    Draw,
    Mutant,
    OpProof,
    Tensors,
    flat_rows,
    mean_mutants,
    overwritten,
    rows_reversed,
    standard_mutants,
)


def _token_ids(draw: Draw, vocab: int, count: int) -> Tensor:
    """Different ids in no order."""
    return torch.randperm(vocab, generator=draw.generator)[:count]


def _embedding_case(
    name: str,
    lead: tuple[int, ...],
    vocab: int = 6,
    hidden: int = 5,
    count: int = 3,
    *,
    only: bool = False,
) -> Case:
    draw = Draw(f"token_embedding: {name}")
    token_ids = _token_ids(draw, vocab, count)
    ids = draw.integers(vocab, *lead)
    if only:
        ids = torch.full_like(ids, int(token_ids[1]))
    tensors = {
        "ids": ids,
        "weight": draw.normal(vocab, hidden),
        "token_rows": draw.normal(count, hidden),
        "token_ids": token_ids,
        "d_y": draw.normal(*lead, hidden),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = token_embedding_forward(t["ids"], t["weight"], t["token_rows"], t["token_ids"])
        return ByHand(y, {"token_rows": backward(t["d_y"], saved).d_token_rows})

    def reference(t: Tensors) -> Tensor:
        return token_embedding_reference(t["ids"], t["weight"], t["token_rows"], t["token_ids"])

    def usual(t: Tensors) -> Tensor:
        table = t["weight"].index_copy(0, t["token_ids"], t["token_rows"])
        return functional.embedding(t["ids"], table)

    return Case(name, tensors, by_hand, reference, usual)


EMBEDDING_CASES = (
    _embedding_case("tokens, some of them twice", (19,)),
    _embedding_case("documents and tokens", (2, 9)),
    _embedding_case("one token many times", (40,), only=True),
    _embedding_case("unseen tokens", (4,), 23),
    _embedding_case("every token trained", (9,), 4, 5, 4),
    _embedding_case("one token", (1,), only=True),
    _embedding_case("no tokens", (0,)),
    _embedding_case("training size", (67,), 353, 48, 90),
)


def _untrained_too(g: Tensor, s: Any) -> Tensor:
    """Tokens that are not trained taken for the last trained one, as an index of -1 reads."""
    d_token_rows = g.new_zeros(s.trained, g.shape[-1])
    return d_token_rows.index_add_(0, s.places % s.trained, flat_rows(g))


EMBEDDING_MUTANTS = (
    *standard_mutants("d_token_rows"),
    Mutant("overwritten instead of summed", "d_token_rows", lambda g, s, _right: overwritten(s.trained, s.places, g)),
    Mutant("rows reversed", "d_token_rows", lambda g, s, _right: token_embedding_backward(rows_reversed(g), s)[0]),
    Mutant("places reversed", "d_token_rows", lambda _g, _s, right: right.d_token_rows.flip(0)),
    Mutant("untrained tokens too", "d_token_rows", lambda g, s, _right: _untrained_too(g, s)),
)


def _linear_case(
    name: str,
    lead: tuple[int, ...],
    vocab: int = 11,
    hidden: int = 7,
    count: int = 3,
    *,
    bias: bool = False,
    input_gradient: bool = True,
) -> Case:
    draw = Draw(f"token_linear: {name}")
    tensors = {
        "x": draw.normal(*lead, hidden),
        "weight": draw.normal(vocab, hidden),
        "token_rows": draw.normal(count, hidden),
        "token_ids": _token_ids(draw, vocab, count),
        "d_y": draw.normal(*lead, vocab),
    }
    if bias:
        tensors["bias"] = draw.normal(vocab)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = token_linear_forward(t["x"], t["weight"], t.get("bias"), t["token_rows"], t["token_ids"])
        grads = backward(t["d_y"], saved, input_gradient=input_gradient)
        gradients = {"token_rows": grads.d_token_rows}
        return ByHand(y, gradients | {"x": grads.d_x} if input_gradient else gradients)

    def reference(t: Tensors) -> Tensor:
        return token_linear_reference(t["x"], t["weight"], t.get("bias"), t["token_rows"], t["token_ids"])

    return Case(name, tensors, by_hand, reference)


LINEAR_CASES = (
    _linear_case("rows", (5,)),
    _linear_case("documents and rows", (2, 5)),
    _linear_case("bias", (5,), bias=True),
    _linear_case("every token trained", (5,), 4, 7, 4),
    _linear_case("no input gradient", (5,), input_gradient=False),
    _linear_case("one row", (1,)),
    _linear_case("no rows", (0,)),
    _linear_case("training size", (67,), 353, 48, 90),
)


def _order_lost(g: Tensor, s: TokenLinearSaved) -> Tensor:
    """The trained columns in the order of their ids, not in that of the rows."""
    return token_linear_backward(g, s._replace(token_ids=s.token_ids.sort().values)).d_token_rows


LINEAR_MUTANTS = (
    *standard_mutants("d_x", "d_token_rows"),
    Mutant("of the frozen table", "d_x", lambda g, s, _right: g @ s.weight),
    Mutant(
        "frozen rows kept beside", "d_x", lambda g, s, right: right.d_x + g[..., s.token_ids] @ s.weight[s.token_ids]
    ),
    Mutant("trained columns alone", "d_x", lambda g, s, _right: g[..., s.token_ids] @ s.token_rows),
    Mutant("order of the tokens lost", "d_token_rows", lambda g, s, _right: _order_lost(g, s)),
    Mutant(
        "rows reversed",
        "d_token_rows",
        lambda g, s, _right: token_linear_backward(rows_reversed(g), s._replace(x=flat_rows(s.x))).d_token_rows,
    ),
    *mean_mutants("d_token_rows"),
)

PROOFS = (
    OpProof("token_embedding", token_embedding_backward, EMBEDDING_CASES, EMBEDDING_MUTANTS),
    OpProof("token_linear", token_linear_backward, LINEAR_CASES, LINEAR_MUTANTS),
)
