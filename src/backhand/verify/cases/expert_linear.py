"""The experts' linear layer: cases and mutants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backhand.ops.expert_linear import (
    ExpertFactors,
    ExpertLinearSaved,
    expert_linear_backward,
    expert_linear_forward,
    expert_linear_reference,
)
from backhand.ops.lora_linear import Dropout
from backhand.ops.lora_linear import multiplier as dropout_multiplier
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

SCALING = 1.7


def _case(
    name: str,
    counts: tuple[int, ...],
    width: int = 5,
    out: int = 6,
    rank: int | None = 2,
    *,
    biased: bool = False,
    dropout: Dropout | None = None,
    as_stored: bool = False,
    input_gradient: bool = True,
    added: bool = False,
) -> Case:
    draw = Draw(f"expert_linear: {name}")
    rows, experts = sum(counts), len(counts)
    tensors = {
        "x": draw.normal(rows, width),
        "weight": draw.normal(experts, out, width),
        "d_y": draw.normal(rows, out),
    }
    if rank is not None:
        tensors |= {"lora_A": draw.normal(experts, rank, width), "lora_B": draw.normal(experts, out, rank)}
    if biased:
        tensors["bias"] = draw.normal(experts, out)

    def factors(t: Tensors) -> ExpertFactors | None:
        if rank is None:
            return None
        # PEFT keeps lora_B of a tensor of experts as (out, rank, experts).
        lora_B = t["lora_B"].permute(1, 2, 0).contiguous().permute(2, 0, 1) if as_stored else t["lora_B"]
        return ExpertFactors(t["lora_A"], lora_B, SCALING)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        weights = t["weight"] if as_stored else list(t["weight"])
        y, saved = expert_linear_forward(t["x"], weights, counts, factors(t), t.get("bias"), dropout)
        # Receivers in PEFT's form, wider than the factors in low precision, with something in them.
        own = factors(t)
        wide = [torch.ones_like(one, dtype=_wide(one)) for one in own[:2]] if own is not None and added else []
        into = (wide[0], wide[1]) if wide else None
        grads = backward(t["d_y"], saved, input_gradient=input_gradient, into=into)
        gradients = {"x": grads.d_x} if input_gradient else {}
        if rank is not None:
            found = {"lora_A": grads.d_lora_A, "lora_B": grads.d_lora_B}
            gradients |= {name: d - 1 if added else d for name, d in found.items()}
        return ByHand(y, gradients)

    def reference(t: Tensors) -> Tensor:
        mask = dropout_multiplier(t["x"], dropout)
        return expert_linear_reference(t["x"], t["weight"], counts, factors(t), t.get("bias"), mask)

    def usual(t: Tensors) -> Tensor:
        mask, outputs = dropout_multiplier(t["x"], dropout), [t["x"] @ t["weight"][0].T][:0]
        dropped = t["x"] if mask is None else t["x"] * mask
        for expert, (own, low) in enumerate(zip(t["x"].split(counts), dropped.split(counts), strict=True)):
            y = own @ t["weight"][expert].T
            if biased:
                y = y + t["bias"][expert]
            if rank is not None:
                y = y + (low @ t["lora_A"][expert].T) @ t["lora_B"][expert].T * SCALING
            outputs.append(y)
        return torch.cat(outputs)

    return Case(name, tensors, by_hand, reference, usual)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


CASES = (
    _case("some experts without rows", (4, 0, 3)),
    _case("no adapter", (4, 0, 3), rank=None),
    _case("biases", (2, 3, 1, 0), biased=True),
    _case("as PEFT stores it", (4, 0, 3), as_stored=True),
    _case("dropout", (7, 2, 0, 4), dropout=Dropout(0.4, 11)),
    _case("added to what is there", (4, 0, 3), as_stored=True, added=True),
    _case("frozen below", (4, 3), input_gradient=False),
    _case("one expert", (6,)),
    _case("square", (4, 5), 6, 6, 3),
    _case("one row", (0, 1, 0)),
    _case("no rows", (0, 0)),
    _case("training size", (40, 17, 0, 10), 48, 40, 8),
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
    factors = s.factors
    assert factors is not None
    return _by_expert(s, lambda e, rows: (factors.scaling * g[rows] @ factors.lora_B[e]).T @ x[rows], factors.lora_A)


def _d_lora_B(g: Tensor, s: ExpertLinearSaved, x: Tensor) -> Tensor:
    factors = s.factors
    assert factors is not None
    return _by_expert(s, lambda e, rows: factors.scaling * g[rows].T @ (x[rows] @ factors.lora_A[e].T), factors.lora_B)


def _other_weights(g: Tensor, s: ExpertLinearSaved) -> Tensor:
    d_x = expert_linear_backward(g, s._replace(weights=[*s.weights[1:], s.weights[0]])).d_x
    assert d_x is not None
    return d_x


def _scaling(s: ExpertLinearSaved) -> float:
    return 1.0 if s.factors is None else s.factors.scaling


def _summed(gradient: Tensor) -> Tensor:
    return gradient.sum(0, keepdim=True).expand_as(gradient)


MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B"),
    Mutant("low-rank term missing", "d_x", lambda g, s, _right: _frozen_alone(g, s)),
    Mutant("another expert's weight", "d_x", lambda g, s, _right: _other_weights(g, s)),
    Mutant("mask ignored", "d_x", lambda g, s, right: _unmasked(g, s, right.d_x)),
    Mutant("mask ignored", "d_lora_A", lambda g, s, _right: _d_lora_A(g, s, s.x)),
    Mutant("mask ignored", "d_lora_B", lambda g, s, _right: _d_lora_B(g, s, s.x)),
    Mutant("scaling forgotten", "d_lora_A", lambda _g, s, right: right.d_lora_A / _scaling(s)),
    Mutant("scaling forgotten", "d_lora_B", lambda _g, s, right: right.d_lora_B / _scaling(s)),
    Mutant("experts exchanged", "d_lora_A", lambda _g, _s, right: right.d_lora_A.roll(1, 0)),
    Mutant("experts exchanged", "d_lora_B", lambda _g, _s, right: right.d_lora_B.roll(1, 0)),
    Mutant("rows reversed", "d_lora_A", lambda g, s, _right: _d_lora_A(g, s, (s.x * _mask(s)).flip(0))),
    Mutant("rows reversed", "d_lora_B", lambda g, s, _right: _d_lora_B(g, s, (s.x * _mask(s)).flip(0))),
    Mutant("summed over experts", "d_lora_A", lambda _g, _s, right: _summed(right.d_lora_A)),
)

PROOFS = (OpProof("expert_linear", expert_linear_backward, CASES, MUTANTS, loops=True),)
