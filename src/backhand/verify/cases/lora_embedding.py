"""LoRA embedding: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_embedding import (
    LoRAEmbeddingSaved,
    lora_embedding_backward,
    lora_embedding_forward,
    lora_embedding_reference,
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
    overwritten,
    standard_mutants,
    transposed_if_square,
    transposed_mutants,
)

SCALING = 1.7


def _case(
    name: str,
    lead: tuple[int, ...],
    vocab: int = 6,
    hidden: int = 5,
    rank: int = 3,
    *,
    padding_id: int | None = None,
    one_token: bool = False,
) -> Case:
    draw = Draw(f"lora_embedding: {name}")
    ids = draw.integers(vocab, *lead)
    if one_token:
        ids = torch.full_like(ids, 2)
    tensors = {
        "ids": ids,
        "weight": draw.normal(vocab, hidden),
        "lora_A": draw.normal(rank, vocab),
        "lora_B": draw.normal(hidden, rank),
        "d_y": draw.normal(*lead, hidden),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = lora_embedding_forward(t["ids"], t["weight"], t["lora_A"], t["lora_B"], SCALING, padding_id)
        grads = backward(t["d_y"], saved)
        return ByHand(y, {"lora_A": grads.d_lora_A, "lora_B": grads.d_lora_B})

    def reference(t: Tensors) -> Tensor:
        return lora_embedding_reference(t["ids"], t["weight"], t["lora_A"], t["lora_B"], SCALING, padding_id)

    def usual(t: Tensors) -> Tensor:
        low_rank = functional.embedding(t["ids"], t["lora_A"].T, padding_idx=padding_id) @ t["lora_B"].T
        return functional.embedding(t["ids"], t["weight"]) + SCALING * low_rank

    # Finite differences would vary the padding column too, whose gradient is held at zero by definition.
    return Case(name, tensors, by_hand, reference, usual, exempt=("lora_A",) if padding_id is not None else ())


CASES = (
    _case("tokens, some of them twice", (9,)),
    _case("documents and tokens", (2, 9)),
    _case("padding token", (14,), padding_id=3),
    _case("one token many times", (40,), one_token=True),
    _case("unseen tokens", (4,), vocab=11),
    _case("square factors", (9,), 5, 5, 5),
    _case("one token", (1,)),
    _case("no tokens", (0,)),
    _case("training size", (67,), 353, 48, 8),
)


def _redo(g: Tensor, s: LoRAEmbeddingSaved, **changes: Any) -> Any:
    return lora_embedding_backward(g, s._replace(**changes))


def _overwritten(g: Tensor, s: LoRAEmbeddingSaved) -> Tensor:
    """d_lora_A where each place of a token overwrites the last instead of adding to it."""
    places = s.ids if s.padding_id is None else s.ids.masked_fill(s.ids == s.padding_id, -1)
    return overwritten(s.vocab, places, s.scaling * flat_rows(g) @ s.lora_B).T


def _counts(s: LoRAEmbeddingSaved) -> Tensor:
    return torch.bincount(s.ids, minlength=s.vocab).clamp(min=1)


MUTANTS = (
    *standard_mutants("d_lora_A", "d_lora_B"),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, scaling=1.0).d_lora_A),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, scaling=1.0).d_lora_B),
    Mutant("overwritten instead of summed", "d_lora_A", lambda g, s, _right: _overwritten(g, s)),
    Mutant("mean for sum", "d_lora_A", lambda _g, s, right: right.d_lora_A / _counts(s)),
    Mutant("padding token learns", "d_lora_A", lambda g, s, _right: _redo(g, s, padding_id=None).d_lora_A),
    Mutant("tokens reversed", "d_lora_A", lambda g, s, _right: _redo(g, s, ids=s.ids.flip(0)).d_lora_A),
    Mutant(
        "lora_B transposed",
        "d_lora_A",
        lambda g, s, _right: _redo(g, s, lora_B=transposed_if_square(s.lora_B)).d_lora_A,
    ),
    Mutant("mean for sum", "d_lora_B", lambda _g, s, right: right.d_lora_B / max(len(s.ids), 1)),
    Mutant("rows reversed", "d_lora_B", lambda g, s, _right: _redo(g, s, h=s.h.flip(0)).d_lora_B),
    Mutant(
        "padding token left out",
        "d_lora_B",
        lambda g, s, _right: (
            _redo(g, s, h=s.h * (s.ids != s.padding_id)[:, None] if s.padding_id is not None else s.h).d_lora_B
        ),
    ),
    *transposed_mutants("d_lora_B"),
)

PROOFS = (OpProof("lora_embedding", lora_embedding_backward, CASES, MUTANTS),)
