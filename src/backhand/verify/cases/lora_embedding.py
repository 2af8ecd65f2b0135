"""LoRA embedding: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_embedding import LoRAEmbeddingSaved
from backhand.verify.cases.embedding import TOKENS, token_ids
from backhand.verify.mutants import flat_rows, scatter_overwrite, transpose_if_square, wrong
from backhand.verify.scaffold import SCALING, Axis, Op


def _baseline(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_id: int | None
) -> Tensor:
    low_rank = functional.embedding(ids, lora_A.T, padding_idx=padding_id) @ lora_B.T
    return functional.embedding(ids, weight) + scaling * low_rank


OP = Op(
    "lora_embedding",
    dict(ids=token_ids, weight="vocab hidden", lora_A="rank vocab", lora_B="hidden rank") | dict(d_y="*lead hidden"),
    dict(lead=TOKENS, vocab=Axis(6, 353), hidden=Axis(5, 48), rank=Axis(3, 8), padding_id=None, only=None)
    | dict(scaling=SCALING),
    baseline=_baseline,
)

CASES = (
    *OP.standard_cases(),
    # Finite differences would vary the padding column too, whose gradient is zero by definition.
    OP.case("padding token", (14,), padding_id=3, exempt=("lora_A",)),
    OP.case("one token many times", (40,), only=2),
    OP.case("unseen tokens", (4,), vocab=11),
    OP.case("square factors", (9,), 5, 5, 5),
    OP.case("several pieces of rows", (11,), pieces=4),
)


def _overwritten(g: Tensor, s: LoRAEmbeddingSaved) -> Tensor:
    """Return d_lora_A with each position of a token overwriting the previous one."""
    places = s.ids if s.padding_id is None else s.ids.masked_fill(s.ids == s.padding_id, -1)
    return scatter_overwrite(s.vocab, places, s.scaling * flat_rows(g) @ s.lora_B).T


MUTANTS = (
    OP.perturb("scaling forgotten", "d_lora_A d_lora_B", scaling=1.0),
    wrong("overwritten instead of summed", "d_lora_A", lambda g, s: _overwritten(g, s)),
    wrong("mean for sum", "d_lora_A", lambda s, d: d / torch.bincount(s.ids, minlength=s.vocab).clamp(min=1)),
    OP.perturb("padding token learns", "d_lora_A", padding_id=None),
    OP.perturb("tokens reversed", "d_lora_A", ids=lambda s: s.ids.flip(0)),
    OP.perturb("lora_B transposed", "d_lora_A", lora_B=lambda s: transpose_if_square(s.lora_B)),
    wrong("mean for sum", "d_lora_B", lambda s, d: d / max(len(s.ids), 1)),
    OP.perturb("rows reversed", "d_lora_B", h=lambda s: s.h.flip(0)),
    OP.perturb(
        "padding token left out",
        "d_lora_B",
        h=lambda s: s.h * (s.ids != s.padding_id)[:, None] if s.padding_id is not None else s.h,
    ),
    wrong("transposed", "d_lora_B", transpose_if_square),
)
