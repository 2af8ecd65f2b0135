"""Trained rows of an embedding and of an output head: cases and mutants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.verify.mutants import flat_rows, mean_of_rows, rows_reversed, scatter_overwrite, wrong
from backhand.verify.scaffold import ROWS, Axis, Draw, Op


def _ids(draw: Draw, vocab: int, lead: tuple[int, ...], token_ids: Tensor, only: bool) -> Tensor:
    ids = draw.integers(vocab, *lead)
    return torch.full_like(ids, int(token_ids[1])) if only else ids


def _token_ids(draw: Draw, vocab: int, count: int) -> Tensor:
    """Draw distinct ids in random order."""
    return torch.randperm(vocab, generator=draw.generator)[:count]


EMBEDDING = Op(
    "token_embedding",
    dict(token_ids=_token_ids, ids=_ids, weight="vocab hidden", token_rows="count hidden") | dict(d_y="*lead hidden"),
    dict(lead=Axis((19,), (67,), (1,), (0,), (2, 9)), vocab=Axis(6, 353), hidden=Axis(5, 48), count=Axis(3, 90))
    | dict(only=False),
    baseline=lambda ids, weight, token_rows, token_ids: functional.embedding(
        ids, weight.index_copy(0, token_ids, token_rows)
    ),
)
LINEAR = Op(
    "token_linear",
    dict(x="*lead hidden", weight="vocab hidden", token_rows="count hidden", token_ids=_token_ids)
    | dict(d_y="*lead vocab", bias="vocab"),
    dict(lead=ROWS, vocab=Axis(11, 353), hidden=Axis(7, 48), count=Axis(3, 90), bias=False, input_gradient=True),
)

EMBEDDING_CASES = (
    *EMBEDDING.standard_cases(),
    EMBEDDING.case("one token many times", (40,), only=True),
    EMBEDDING.case("unseen tokens", (4,), 23),
    EMBEDDING.case("every token trained", (9,), 4, 5, 4),
    EMBEDDING.case("several pieces of rows", (23,), pieces=4),
    EMBEDDING.case("one trained token", (1,), only=True),
)


def _untrained_too(g: Tensor, s: Any) -> Tensor:
    """Treat untrained tokens as the last trained one, as an index of -1 would."""
    d_token_rows = g.new_zeros(s.trained, g.shape[-1])
    return d_token_rows.index_add_(0, s.places % s.trained, flat_rows(g))


EMBEDDING_MUTANTS = (
    wrong("overwritten instead of summed", "d_token_rows", lambda g, s: scatter_overwrite(s.trained, s.places, g)),
    EMBEDDING.perturb("rows reversed", "d_token_rows", g=rows_reversed),
    wrong("places reversed", "d_token_rows", lambda d: d.flip(0)),
    wrong("untrained tokens too", "d_token_rows", lambda g, s: _untrained_too(g, s)),
)


LINEAR_CASES = (
    *LINEAR.standard_cases(bias=True),
    LINEAR.case("no bias"),
    LINEAR.case("every token trained", (5,), 4, 7, 4),
    LINEAR.case("no input gradient", (5,), input_gradient=False),
)

LINEAR_MUTANTS = (
    wrong("of the frozen table", "d_x", lambda g, s: g @ s.weight),
    wrong("frozen rows still added", "d_x", lambda g, s, d: d + g[..., s.token_ids] @ s.weight[s.token_ids]),
    wrong("trained columns alone", "d_x", lambda g, s: g[..., s.token_ids] @ s.token_rows),
    # Trained columns in the order of their ids instead of the order of rows.
    LINEAR.perturb("order of the tokens lost", "d_token_rows", token_ids=lambda s: s.token_ids.sort().values),
    LINEAR.perturb("rows reversed", "d_token_rows", g=rows_reversed, x=lambda s: flat_rows(s.x)),
    wrong("mean for sum", "d_token_rows", mean_of_rows),
)
PROOFS = (EMBEDDING.proof(EMBEDDING_CASES, EMBEDDING_MUTANTS), LINEAR.proof(LINEAR_CASES, LINEAR_MUTANTS))
