"""Embedding: cases and mutants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.embedding import EmbeddingSaved
from backhand.verify.case import Case, Draw, overwritten, wrong
from backhand.verify.scaffold import Op

OP = Op("embedding", usual=lambda ids, weight, scaling: functional.embedding(ids, weight) * scaling)


def token_ids(vocab: int, lead: tuple[int, ...], only: int | None = None) -> Callable[[Draw], Tensor]:
    """Random tokens, or one alone."""

    def drawn(draw: Draw) -> Tensor:
        ids = draw.integers(vocab, *lead)
        return ids if only is None else torch.full_like(ids, only)

    return drawn


def _case(
    name: str, lead: tuple[int, ...], vocab: int = 6, hidden: int = 5, *, scaling: float = 1.0, only: int | None = None
) -> Case:
    inputs = {"ids": token_ids(vocab, lead, only), "weight": (vocab, hidden), "d_y": (*lead, hidden)}
    return OP.case(name, inputs, scaling=scaling)


CASES = (
    _case("tokens, some of them twice", (9,)),
    _case("scaling", (9,), scaling=2.4),
    _case("documents and tokens", (2, 9), scaling=2.4),
    _case("one token many times", (40,), only=2, scaling=1.7),
    _case("unseen tokens", (3,), vocab=11),
    _case("one token", (1,)),
    _case("no tokens", (0,), scaling=2.4),
    _case("training size", (67,), 353, 48, scaling=6.9),
)


def _counts(s: EmbeddingSaved) -> Tensor:
    return torch.bincount(s.ids.reshape(-1), minlength=s.vocab).clamp(min=1)[:, None]


MUTANTS = (
    wrong("scaling forgotten", "d_weight", lambda s, d: d / s.scaling),
    wrong("overwritten instead of summed", "d_weight", lambda g, s: overwritten(s.vocab, s.ids, s.scaling * g)),
    wrong("mean for sum", "d_weight", lambda s, d: d / _counts(s)),
    OP.redo("tokens reversed", "d_weight", ids=lambda s: s.ids.reshape(-1).flip(0)),
    wrong("ids off by one", "d_weight", lambda d: d.roll(1, 0)),
)


PROOFS = (OP.proof(CASES, MUTANTS),)
