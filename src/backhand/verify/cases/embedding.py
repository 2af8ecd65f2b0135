"""Embedding: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.kernels.pieces import piece_size
from backhand.ops.embedding import ROWS_AT_ONCE, EmbeddingSaved
from backhand.verify.mutants import scatter_overwrite, wrong
from backhand.verify.scaffold import Axis, Draw, Op


def token_ids(draw: Draw, vocab: int, lead: tuple[int, ...], only: int | None) -> Tensor:
    """Draw random tokens, or repeat a single one."""
    ids = draw.integers(vocab, *lead)
    return ids if only is None else torch.full_like(ids, only)


TOKENS = Axis((9,), (67,), (1,), (0,), (2, 9))
"""Tokens, some of which are equal."""

OP = Op(
    "embedding",
    {"ids": token_ids, "weight": "vocab hidden", "d_y": "*lead hidden"},
    {"lead": TOKENS, "vocab": Axis(6, 353), "hidden": Axis(5, 48), "scaling": 1.0, "only": None},
    baseline=lambda ids, weight, scaling: functional.embedding(ids, weight) * scaling,
)

CASES = (
    *OP.standard_cases(scaling=2.4),
    OP.case("not scaled"),
    OP.case("one token many times", (40,), only=2, scaling=1.7),
    OP.case("unseen tokens", (3,), vocab=11),
    OP.case("several pieces of rows", (11,), pieces=4),
)


def _first_piece(g: Tensor, s: EmbeddingSaved) -> Tensor:
    """Omit the rows of later pieces."""
    in_first = torch.arange(s.ids.numel()) < piece_size(ROWS_AT_ONCE)
    ids, rows = s.ids.reshape(-1), g.reshape(-1, g.shape[-1])
    return s.scaling * rows.new_zeros(s.vocab, rows.shape[1]).index_add_(0, ids[in_first], rows[in_first])


MUTANTS = (
    wrong("first piece of rows alone", "d_weight", _first_piece),
    wrong("scaling forgotten", "d_weight", lambda s, d: d / s.scaling),
    wrong("overwritten instead of summed", "d_weight", lambda g, s: scatter_overwrite(s.vocab, s.ids, s.scaling * g)),
    wrong(
        "mean for sum",
        "d_weight",
        lambda s, d: d / torch.bincount(s.ids.reshape(-1), minlength=s.vocab).clamp(min=1)[:, None],
    ),
    OP.perturb("tokens reversed", "d_weight", ids=lambda s: s.ids.reshape(-1).flip(0)),
    wrong("ids off by one", "d_weight", lambda d: d.roll(1, 0)),
)
