"""The experts' linear layer: cases and mutants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backhand.ops.expert_linear import ExpertFactors, ExpertLinearSaved, expert_linear_forward
from backhand.ops.lora_linear import Dropout
from backhand.ops.lora_linear import multiplier as dropout_multiplier
from backhand.verify.scaffold import SCALING, Given, Op, receiver, wrong


def _factors(lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, as_stored: bool) -> ExpertFactors | None:
    if lora_A is None or lora_B is None:
        return None
    # PEFT keeps lora_B of a tensor of experts as (out, rank, experts).
    return ExpertFactors(
        lora_A, lora_B.permute(1, 2, 0).contiguous().permute(2, 0, 1) if as_stored else lora_B, scaling
    )


def _receivers(factors: ExpertFactors | None, added: bool) -> tuple[Tensor, Tensor] | None:
    """In PEFT's form."""
    return (receiver(factors.lora_A), receiver(factors.lora_B)) if added and factors is not None else None


def _forward(given: Given) -> tuple[Tensor, ExpertLinearSaved]:
    weights = given["weights"] if given["as_stored"] else list(given["weights"])
    y, saved = given.call(expert_linear_forward, weights=weights)
    return y, saved


def _usual(given: Given) -> Tensor:
    x, weights, biases, mask = given["x"], given["weights"], given.get("biases"), given["mask"]
    factors: ExpertFactors | None = given["factors"]
    outputs = [x @ weights[0].T][:0]
    parts = (part.split(given["counts"]) for part in (x, x if mask is None else x * mask))
    for expert, (own, low) in enumerate(zip(*parts, strict=True)):
        y = own @ weights[expert].T
        if biases is not None:
            y = y + biases[expert]
        if factors is not None:
            y = y + (low @ factors.lora_A[expert].T) @ factors.lora_B[expert].T * factors.scaling
        outputs.append(y)
    return torch.cat(outputs)


OP = Op(
    "expert_linear",
    dict(x="rows width", weights="experts out width", d_y="rows out", lora_A="experts rank width")
    | dict(lora_B="experts out rank", biases="experts out"),
    dict(counts=..., width=5, out=6, rank=2, biases=False, dropout=None, scaling=SCALING, as_stored=False)
    | dict(input_gradient=True, added=False),
    forward=_forward,
    usual=_usual,
    made={
        "rows": lambda counts: sum(counts),
        "experts": lambda counts: len(counts),
        "mask": dropout_multiplier,
        "factors": _factors,
        "into": _receivers,
    },
    loops=True,
)

CASES = (
    OP.case("some experts without rows", (4, 0, 3)),
    OP.case("no adapter", (4, 0, 3), rank=None),
    OP.case("biases", (2, 3, 1, 0), biases=True),
    OP.case("as PEFT stores it", (4, 0, 3), as_stored=True),
    OP.case("dropout", (7, 2, 0, 4), dropout=Dropout(0.4, 11)),
    OP.case("added to what is there", (4, 0, 3), as_stored=True, added=True),
    OP.case("frozen below", (4, 3), input_gradient=False),
    OP.case("one expert", (6,)),
    OP.case("square", (4, 5), 6, 6, 3),
    OP.case("one row", (0, 1, 0)),
    OP.case("no rows", (0, 0)),
    OP.case("training size", (40, 17, 0, 10), 48, 40, 8),
)


def _by_expert(s: ExpertLinearSaved, one: Callable[[int, slice], Tensor], like: Tensor) -> Tensor:
    """one(expert, rows) for every expert with rows, stacked; zero for the others."""
    found, start = torch.zeros_like(like), 0
    for expert, count in enumerate(s.counts):
        if count:
            found[expert] = one(expert, slice(start, start + count))
        start += count
    return found


def _mask(s: ExpertLinearSaved) -> Tensor:
    mask = dropout_multiplier(s.x, s.dropout)
    return torch.ones_like(s.x) if mask is None else mask


def _frozen_alone(g: Tensor, s: ExpertLinearSaved) -> Tensor:
    parts = g.split(s.counts)
    return torch.cat([part @ weight for part, weight in zip(parts, s.weights, strict=True)])


def _unmasked(g: Tensor, s: ExpertLinearSaved, right: Tensor) -> Tensor:
    """The low-rank branch's share without its mask."""
    frozen, mask = _frozen_alone(g, s), _mask(s)
    if s.factors is None:
        return right
    low = [
        s.factors.scaling * part @ lora_B @ lora_A
        for part, lora_A, lora_B in zip(g.split(s.counts), s.factors.lora_A, s.factors.lora_B, strict=True)
    ]
    return frozen + torch.cat(low) if bool((mask != 1).any()) else right


def _d_lora_A(g: Tensor, s: ExpertLinearSaved, x: Tensor) -> Tensor:
    _, lora_B, scaling = _own(s)
    return _by_expert(s, lambda e, rows: (scaling * g[rows] @ lora_B[e]).T @ x[rows], _own(s).lora_A)


def _d_lora_B(g: Tensor, s: ExpertLinearSaved, x: Tensor) -> Tensor:
    lora_A, lora_B, scaling = _own(s)
    return _by_expert(s, lambda e, rows: scaling * g[rows].T @ (x[rows] @ lora_A[e].T), lora_B)


def _own(s: ExpertLinearSaved) -> ExpertFactors:
    assert s.factors is not None
    return s.factors


MUTANTS = (
    wrong("low-rank term missing", "d_x", lambda g, s: _frozen_alone(g, s)),
    OP.redo("another expert's weight", "d_x", weights=lambda s: [*s.weights[1:], s.weights[0]]),
    wrong("mask ignored", "d_x", lambda g, s, d: _unmasked(g, s, d)),
    wrong("mask ignored", "d_lora_A", lambda g, s: _d_lora_A(g, s, s.x)),
    wrong("mask ignored", "d_lora_B", lambda g, s: _d_lora_B(g, s, s.x)),
    wrong("scaling forgotten", "d_lora_A d_lora_B", lambda s, d: d / (1.0 if s.factors is None else s.factors.scaling)),
    wrong("experts exchanged", "d_lora_A d_lora_B", lambda d: d.roll(1, 0)),
    wrong("rows reversed", "d_lora_A", lambda g, s: _d_lora_A(g, s, (s.x * _mask(s)).flip(0))),
    wrong("rows reversed", "d_lora_B", lambda g, s: _d_lora_B(g, s, (s.x * _mask(s)).flip(0))),
    wrong("summed over experts", "d_lora_A", lambda d: d.sum(0, keepdim=True).expand_as(d)),
)
