"""The fused head: cases and mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.nn.batch import IGNORE_INDEX
from backhand.ops.linear_cross_entropy import (
    CHUNK_ROWS,
    LONG_CHUNK_ROWS,
    LONG_CHUNK_WIDTH,
    PLAIN,
    HeadFactors,
    LinearCrossEntropyGrads,
    LogitsRule,
    chunk_rows,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_reference,
)
from backhand.ops.lora_linear import Dropout
from backhand.ops.lora_linear import multiplier as dropout_multiplier
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

SCALING = 1.7


class _Inputs(NamedTuple):
    """What the op saves nothing of: it is given to the backward itself."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    head: HeadFactors | None
    multiplier: float | Tensor
    rule: LogitsRule

    @property
    def mask(self) -> Tensor:
        """The dropout multiplier of the low-rank branch's input, (rows, hidden); ones without dropout."""
        mask = None if self.head is None else dropout_multiplier(self.x, self.head.dropout)
        return torch.ones_like(self.x) if mask is None else mask


def _backward(_d_y: Tensor, inputs: _Inputs) -> LinearCrossEntropyGrads:
    """The fused pass as a backward like any other; the losses' gradient is the multiplier, one for all rows or each."""
    if inputs.head is not None:
        return linear_cross_entropy_backward(*inputs)[1]
    x = inputs.x.clone()  # as the decoder calls it: the gradient takes the rows' place
    return linear_cross_entropy_backward(x, *inputs[1:], out=x)[1]


def _case(
    name: str,
    rows: int,
    hidden: int = 5,
    vocab: int = 7,
    rank: int | None = None,
    *,
    multiplier: float = 0.13,
    size: float = 1.0,
    masked: bool = False,
    weighted: bool = False,
    dropout: Dropout | None = None,
    rule: LogitsRule = PLAIN,
) -> Case:
    draw = Draw(f"linear_cross_entropy: {name}")
    labels = draw.integers(vocab, rows)
    if masked:
        labels[::2] = IGNORE_INDEX
    supervised = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    tensors = {
        "x": draw.normal(rows, hidden, size=size),
        "weight": draw.normal(vocab, hidden),
        "d_y": draw.normal(len(supervised)) if weighted else torch.tensor(multiplier, dtype=torch.float64),
    }
    if rank is not None:
        tensors |= {"lora_A": draw.normal(rank, hidden), "lora_B": draw.normal(vocab, rank)}

    def inputs(t: Tensors) -> _Inputs:
        places, targets = supervised.to(t["x"].device), labels[supervised].to(t["x"].device)
        head = None if rank is None else HeadFactors(t["lora_A"], t["lora_B"], SCALING, dropout)
        multiplier = t["d_y"] if weighted else float(t["d_y"])
        return _Inputs(t["x"][places], t["weight"], targets, head, multiplier, rule)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        given = inputs(t)
        losses = linear_cross_entropy_forward(*given[:4], rule)
        grads = backward(t["d_y"], given)
        gradients = {"x": torch.zeros_like(t["x"]).index_copy_(0, supervised.to(t["x"].device), grads.d_x)}
        if rank is not None:
            gradients |= {"lora_A": grads.d_lora_A, "lora_B": grads.d_lora_B}
        return ByHand(losses, gradients)

    def reference(t: Tensors) -> Tensor:
        given = inputs(t)
        if dropout is None:
            return linear_cross_entropy_reference(*given[:4], rule)
        return functional.cross_entropy(_ruled(_reference_logits(given), rule), given.targets, reduction="none")

    def usual(t: Tensors) -> Tensor:
        given = inputs(t)
        logits = functional.linear(given.x, given.weight)
        if given.head is not None:
            h = functional.linear(given.x if dropout is None else given.x * given.mask, given.head.lora_A)
            logits = logits + functional.linear(h, given.head.lora_B) * SCALING
        return functional.cross_entropy(_ruled(logits, rule).float(), given.targets, reduction="none")

    return Case(name, tensors, by_hand, reference, usual)


def _reference_logits(given: _Inputs) -> Tensor:
    """Z under dropout, with a low-rank update of its own for each row: W + s B A diag(m)."""
    assert given.head is not None
    delta = given.head.scaling * torch.einsum("vr,rh,nh->nvh", given.head.lora_B, given.head.lora_A, given.mask)
    return torch.einsum("nh,nvh->nv", given.x, given.weight + delta)


def _ruled(logits: Tensor, rule: LogitsRule) -> Tensor:
    logits = logits * rule.scaling
    return logits if rule.cap is None else torch.tanh(logits / rule.cap) * rule.cap


CASES = (
    _case("rows", 6),
    _case("adapted head", 6, rank=3),
    _case("masked labels", 9, masked=True),
    _case("masked labels, adapted head", 9, rank=2, masked=True),
    _case("wide vocabulary", 3, vocab=4133),
    _case("several chunks", CHUNK_ROWS + 3, rank=3),
    _case("exactly one chunk", CHUNK_ROWS),
    _case("several chunks of a wide model", LONG_CHUNK_ROWS + 3, LONG_CHUNK_WIDTH, rank=3),
    _case("large logits", 6, size=300.0, rank=2),
    _case("square head", 6, 7, 7, 7),
    _case("one row", 1, rank=3),
    _case("one class", 4, vocab=1),
    _case("dropout", 9, rank=3, dropout=Dropout(0.4, 17)),
    _case("dropout, masked labels", 9, rank=2, masked=True, dropout=Dropout(0.25, 2**40)),
    _case("dropout, several chunks", CHUNK_ROWS + 5, rank=3, dropout=Dropout(0.4, 3)),
    _case("dropout, one row", 1, rank=3, dropout=Dropout(0.4, 5)),
    _case("dropout, no rows", 0, rank=3, dropout=Dropout(0.4, 7)),
    _case("no rows", 0, rank=3),
    _case("scaled logits", 6, rank=3, rule=LogitsRule(0.6)),
    _case("capped logits", 6, rule=LogitsRule(cap=2.5)),
    _case("scaled and capped logits, adapted head", 9, rank=3, masked=True, rule=LogitsRule(0.6, 1.7)),
    _case(
        "scaled and capped logits, dropout", CHUNK_ROWS + 5, rank=3, dropout=Dropout(0.4, 3), rule=LogitsRule(1.4, 3.1)
    ),
    _case("logits far beyond the cap", 6, size=30.0, rank=2, rule=LogitsRule(cap=2.5)),
    _case("training size", 67, 48, 353, 8),
    _case("a weight for each row", 6, weighted=True),
    _case("weights, adapted head, masked labels", 9, rank=2, masked=True, weighted=True),
    _case("weights, several chunks", CHUNK_ROWS + 3, rank=3, weighted=True),
    _case("weights, several chunks of a wide model", LONG_CHUNK_ROWS + 3, LONG_CHUNK_WIDTH, weighted=True),
    _case("weights, dropout", CHUNK_ROWS + 5, rank=3, weighted=True, dropout=Dropout(0.4, 3)),
    _case("weights, scaled and capped logits", 9, rank=3, weighted=True, rule=LogitsRule(0.6, 1.7)),
    _case("weights, no rows", 0, rank=3, weighted=True),
)


def _column(multiplier: float | Tensor) -> float | Tensor:
    return multiplier if isinstance(multiplier, float) else multiplier[:, None]


def _d_logits(s: _Inputs, *, one_hot: bool = True, shift: int = 0, slope: bool = True) -> Tensor:
    """D, (rows, vocab), from full logits."""
    logits = s.x @ s.weight.T
    if s.head is not None:
        logits = logits + s.head.scaling * (s.x * s.mask) @ s.head.lora_A.T @ s.head.lora_B.T
    logits = _ruled(logits, s.rule)
    d = torch.softmax(logits, dim=-1)
    if one_hot:
        d = d - functional.one_hot((s.targets + shift) % s.weight.shape[0], s.weight.shape[0])
    if slope and s.rule.cap is not None:
        d = d * (1 - (logits / s.rule.cap) ** 2)
    return _column(s.multiplier) * s.rule.scaling * d


def _d_h(s: _Inputs, *, slope: bool = True) -> Tensor:
    assert s.head is not None
    return s.head.scaling * _d_logits(s, slope=slope) @ s.head.lora_B


def _d_x(s: _Inputs, *, slope: bool = True) -> Tensor:
    d_x = _d_logits(s, slope=slope) @ s.weight
    return d_x if s.head is None else d_x + s.mask * (_d_h(s, slope=slope) @ s.head.lora_A)


def _low_rank_d_x(s: _Inputs) -> Tensor:
    """The low-rank branch's share of d_x before its mask; none where the head is not adapted."""
    return torch.zeros_like(s.x) if s.head is None else _d_h(s) @ s.head.lora_A


def _d_lora_B(s: _Inputs, mask: Tensor) -> Tensor:
    """s Dᵀ h with another mask in h than in the logits."""
    assert s.head is not None
    return s.head.scaling * _d_logits(s).T @ ((s.x * mask) @ s.head.lora_A.T)


def _plain_softmax(s: _Inputs) -> Any:
    right = _backward(s.x, s._replace(rule=s.rule._replace(scaling=1.0))).d_lora_B
    return None if right is None else s.rule.scaling * right


def _first_chunks_mask(s: _Inputs) -> Tensor:
    """Every chunk masked as the first one."""
    return s.mask[torch.arange(len(s.x)) % chunk_rows(s.x.shape[1], s.x.dtype)]


def _next_seed(s: _Inputs) -> _Inputs:
    if s.head is None or s.head.dropout is None:
        return s
    return s._replace(head=s.head._replace(dropout=s.head.dropout._replace(seed=s.head.dropout.seed + 1)))


def _unscaled(s: _Inputs) -> Any:
    """The right gradients for an input without the multiplier."""
    return _backward(s.x, s._replace(multiplier=1.0))


def _last_chunk(s: _Inputs) -> Any:
    """The factors' gradients overwritten by each chunk instead of added up."""
    step = chunk_rows(s.x.shape[1], s.x.dtype)
    start = (max(s.x.shape[0] - 1, 0) // step) * step
    multiplier = s.multiplier if isinstance(s.multiplier, float) else s.multiplier[start:]
    return _backward(s.x, s._replace(x=s.x[start:], targets=s.targets[start:], multiplier=multiplier))


def _weighted(s: _Inputs, change: Callable[[Tensor], Tensor]) -> Any:
    """The right gradients for other weights, where each row has its own."""
    return _backward(s.x, s if isinstance(s.multiplier, float) else s._replace(multiplier=change(s.multiplier)))


def _first_chunks_weights(w: Tensor) -> Tensor:
    """Every chunk weighted as the first one."""
    return w[torch.arange(len(w)) % CHUNK_ROWS]


def _head_scaling(s: _Inputs) -> float:
    return 1.0 if s.head is None else s.head.scaling


MUTANTS = (
    *standard_mutants("d_x", "d_lora_A", "d_lora_B"),
    Mutant("target not subtracted", "d_x", lambda _g, s, _right: _d_logits(s, one_hot=False) @ s.weight),
    Mutant("targets shifted by one", "d_x", lambda _g, s, _right: _d_logits(s, shift=1) @ s.weight),
    Mutant("low-rank term missing", "d_x", lambda _g, s, _right: _d_logits(s) @ s.weight),
    Mutant("multiplier forgotten", "d_x", lambda _g, s, _right: _unscaled(s).d_x),
    Mutant("multiplier forgotten", "d_lora_A", lambda _g, s, _right: _unscaled(s).d_lora_A),
    Mutant("multiplier forgotten", "d_lora_B", lambda _g, s, _right: _unscaled(s).d_lora_B),
    Mutant("cap's slope missing", "d_x", lambda _g, s, _right: _d_x(s, slope=False)),
    Mutant("cap's slope missing", "d_lora_A", lambda _g, s, _right: _d_h(s, slope=False).T @ (s.x * s.mask)),
    Mutant("logits' multiplier forgotten", "d_x", lambda _g, s, right: right.d_x / s.rule.scaling),
    Mutant("logits' multiplier forgotten", "d_lora_A", lambda _g, s, right: right.d_lora_A / s.rule.scaling),
    Mutant("logits' multiplier forgotten", "d_lora_B", lambda _g, s, right: right.d_lora_B / s.rule.scaling),
    Mutant("logits' multiplier left out of the softmax", "d_lora_B", lambda _g, s, _right: _plain_softmax(s)),
    Mutant("mean for sum", "d_x", lambda _g, s, right: right.d_x / max(s.x.shape[0], 1)),
    Mutant("scaling forgotten", "d_lora_A", lambda _g, s, right: right.d_lora_A / _head_scaling(s)),
    Mutant("scaling forgotten", "d_lora_B", lambda _g, s, right: right.d_lora_B / _head_scaling(s)),
    Mutant("last chunk only", "d_lora_A", lambda _g, s, _right: _last_chunk(s).d_lora_A),
    Mutant("last chunk only", "d_lora_B", lambda _g, s, _right: _last_chunk(s).d_lora_B),
    Mutant("rows reversed", "d_lora_A", lambda _g, s, _right: _d_h(s).T @ (s.x * s.mask).flip(0)),
    Mutant(
        "rows reversed",
        "d_lora_B",
        lambda _g, s, _right: _head_scaling(s) * _d_logits(s).T @ ((s.x * s.mask).flip(0) @ s.head.lora_A.T),
    ),
    Mutant("weights averaged", "d_x", lambda _g, s, _right: _weighted(s, lambda w: w.mean().expand_as(w)).d_x),
    Mutant("weights of the first chunk", "d_x", lambda _g, s, _right: _weighted(s, _first_chunks_weights).d_x),
    Mutant("weights reversed", "d_lora_A", lambda _g, s, _right: _weighted(s, lambda w: w.flip(0)).d_lora_A),
    Mutant(
        "weights of the first chunk", "d_lora_A", lambda _g, s, _right: _weighted(s, _first_chunks_weights).d_lora_A
    ),
    Mutant("weights reversed", "d_lora_B", lambda _g, s, _right: _weighted(s, lambda w: w.flip(0)).d_lora_B),
    Mutant("weights squared", "d_lora_B", lambda _g, s, _right: _weighted(s, lambda w: w * w).d_lora_B),
    # The mask is right in the logits, and forgotten or wrong in one gradient.
    Mutant("mask ignored", "d_x", lambda _g, s, right: right.d_x + (1 - s.mask) * _low_rank_d_x(s)),
    Mutant("mask twice", "d_x", lambda _g, s, right: right.d_x + (s.mask - 1) * s.mask * _low_rank_d_x(s)),
    Mutant("mask ignored", "d_lora_A", lambda _g, s, _right: _d_h(s).T @ s.x),
    Mutant("mask not scaled up", "d_lora_A", lambda _g, s, _right: _d_h(s).T @ (s.x * (s.mask != 0))),
    Mutant("mask of the first chunk", "d_lora_A", lambda _g, s, _right: _d_h(s).T @ (s.x * _first_chunks_mask(s))),
    Mutant("mask ignored", "d_lora_B", lambda _g, s, _right: _d_lora_B(s, torch.ones_like(s.x))),
    Mutant("mask of the first chunk", "d_lora_B", lambda _g, s, _right: _d_lora_B(s, _first_chunks_mask(s))),
    Mutant("mask of another seed", "d_lora_B", lambda _g, s, _right: _backward(s.x, _next_seed(s)).d_lora_B),
)

PROOFS = (OpProof("linear_cross_entropy", _backward, CASES, MUTANTS, loops=True),)
