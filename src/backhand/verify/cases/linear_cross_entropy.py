"""The fused head: cases and mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.errors import not_none
from backhand.nn.batch import IGNORE_INDEX
from backhand.ops.head_factors import HeadFactors
from backhand.ops.linear_cross_entropy import (
    CHUNK_ROWS,
    LONG_CHUNK_ROWS,
    LONG_CHUNK_WIDTH,
    LinearCrossEntropyGrads,
    chunk_rows,
    linear_cross_entropy_backward,
    linear_cross_entropy_reference,
)
from backhand.ops.logits_rule import PLAIN, LogitsRule
from backhand.ops.lora_linear import Dropout
from backhand.ops.lora_linear import multiplier as dropout_multiplier
from backhand.verify.cases.lora_linear import next_seed
from backhand.verify.mutants import Backward, Mutant, wrong
from backhand.verify.scaffold import SCALING, Arguments, Axis, Draw, Op


class _Inputs(NamedTuple):
    """Arguments of the backward, since the op saves nothing."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    head: HeadFactors | None
    multiplier: float | Tensor
    rule: LogitsRule

    @property
    def mask(self) -> Tensor:
        """Dropout multiplier of the low-rank branch's input, (rows, hidden), ones without dropout."""
        mask = None if self.head is None else dropout_multiplier(self.x, self.head.dropout)
        return torch.ones_like(self.x) if mask is None else mask


def _backward(_d_y: Tensor, inputs: _Inputs) -> LinearCrossEntropyGrads:
    """Run the fused pass as a backward. The upstream gradient is the multiplier, one for all rows or one per row."""
    if inputs.head is not None:
        return linear_cross_entropy_backward(*inputs)[1]
    x = inputs.x.clone()  # as in the decoder, the gradient overwrites x
    return linear_cross_entropy_backward(x, *inputs[1:], out=x)[1]


def _labels(draw: Draw, vocab: int, rows: int, masked: bool) -> Tensor:
    labels = draw.integers(vocab, rows)
    if masked:
        labels[::2] = IGNORE_INDEX
    return labels


def _reference(s: _Inputs) -> Tensor:
    """Compute the losses. Under dropout each row has a different update, W + s B A diag(m)."""
    if s.head is None or s.head.dropout is None:
        return linear_cross_entropy_reference(*s[:4], s.rule)
    delta = s.head.scaling * torch.einsum("vr,rh,nh->nvh", s.head.lora_B, s.head.lora_A, s.mask)
    logits = torch.einsum("nh,nvh->nv", s.x, s.weight + delta)
    return functional.cross_entropy(_ruled(logits, s.rule), s.targets, reduction="none")


def _baseline(s: _Inputs) -> Tensor:
    logits = functional.linear(s.x, s.weight)
    if s.head is not None:
        h = functional.linear(s.x if s.head.dropout is None else s.x * s.mask, s.head.lora_A)
        logits = logits + functional.linear(h, s.head.lora_B) * s.head.scaling
    return functional.cross_entropy(_ruled(logits, s.rule).float(), s.targets, reduction="none")


def _ruled(logits: Tensor, rule: LogitsRule) -> Tensor:
    logits = logits * rule.scaling
    return logits if rule.cap is None else torch.tanh(logits / rule.cap) * rule.cap


def _fused(t: Arguments, backward: Backward) -> tuple[Tensor, LinearCrossEntropyGrads]:
    s: _Inputs = t["s"]
    losses: Tensor = OP.forward(*s[:4], s.rule)
    grads = backward(t["d_y"], s)
    return losses, grads._replace(d_x=torch.zeros_like(t["x"]).index_copy_(0, _supervised(t["labels"]), grads.d_x))


def _supervised(labels: Tensor) -> Tensor:
    return (labels != IGNORE_INDEX).nonzero().squeeze(1)


def _inputs(args: Arguments) -> _Inputs:
    labels, d_y = args["labels"], args["d_y"]
    places, head = _supervised(labels), None
    if "lora_A" in args:
        head = HeadFactors(args["lora_A"], args["lora_B"], SCALING, args["dropout"])
    multiplier = d_y if d_y.dim() else float(d_y)
    return _Inputs(args["x"][places], args["weight"], labels[places], head, multiplier, args["rule"])


def _d_y(draw: Draw, labels: Tensor, multiplier: float, weighted: bool) -> Tensor:
    """Return one multiplier for all rows, or one per row."""
    return draw.normal(len(_supervised(labels))) if weighted else torch.tensor(multiplier, dtype=torch.float64)


OP = Op(
    "linear_cross_entropy",
    dict(labels=_labels, x="size: rows hidden", weight="vocab hidden")
    | dict(d_y=_d_y, lora_A="rank hidden", lora_B="vocab rank"),
    dict(rows=Axis(6, 67, 1, 0), hidden=Axis(5, 48), vocab=Axis(7, 353), rank=None, multiplier=0.13, size=1.0)
    | dict(masked=False, dropout=None, rule=PLAIN, weighted=False),
    backward=_backward,
    reference=_reference,
    baseline=_baseline,
    derived={"s": _inputs},
    runner=_fused,
    compiled=True,
)

CASES = (
    *OP.standard_cases(),
    *OP.standard_cases("adapted head: ", rank=3),
    OP.case("masked labels", 9, masked=True),
    OP.case("masked labels, adapted head", 9, rank=2, masked=True),
    OP.case("several chunks", CHUNK_ROWS + 3, rank=3),
    OP.case("exactly one chunk", CHUNK_ROWS),
    OP.case("several chunks of a wide model", LONG_CHUNK_ROWS + 3, LONG_CHUNK_WIDTH, rank=3),
    OP.case("softmax of some rows at a time", 9, rank=3, pieces=28),
    OP.case("softmax of some rows at a time, capped logits", 9, rule=LogitsRule(0.6, 2.5), pieces=28),
    OP.case("many classes", 11, vocab=4133, rank=2, threads=3),
    OP.case("large logits", 6, size=300.0, rank=2),
    OP.case("square head", 6, 7, 7, 7),
    OP.case("one class", 4, vocab=1),
    OP.case("dropout", 9, rank=3, dropout=Dropout(0.4, 17)),
    OP.case("dropout, masked labels", 9, rank=2, masked=True, dropout=Dropout(0.25, 2**40)),
    OP.case("dropout, several chunks", CHUNK_ROWS + 5, rank=3, dropout=Dropout(0.4, 3)),
    OP.case("dropout, one row", 1, rank=3, dropout=Dropout(0.4, 5)),
    OP.case("dropout, no rows", 0, rank=3, dropout=Dropout(0.4, 7)),
    OP.case("scaled logits", 6, rank=3, rule=LogitsRule(0.6)),
    OP.case("capped logits", 6, rule=LogitsRule(cap=2.5)),
    OP.case("scaled and capped logits, adapted head", 9, rank=3, masked=True, rule=LogitsRule(0.6, 1.7)),
    OP.case(
        "scaled and capped logits, dropout", CHUNK_ROWS + 5, rank=3, dropout=Dropout(0.4, 3), rule=LogitsRule(1.4, 3.1)
    ),
    OP.case("logits far beyond the cap", 6, size=30.0, rank=2, rule=LogitsRule(cap=2.5)),
    OP.case("a weight for each row", 6, weighted=True),
    OP.case("weights, adapted head, masked labels", 9, rank=2, masked=True, weighted=True),
    OP.case("weights, several chunks", CHUNK_ROWS + 3, rank=3, weighted=True),
    OP.case("weights, several chunks of a wide model", LONG_CHUNK_ROWS + 3, LONG_CHUNK_WIDTH, weighted=True),
    OP.case("weights, dropout", CHUNK_ROWS + 5, rank=3, weighted=True, dropout=Dropout(0.4, 3)),
    OP.case("weights, scaled and capped logits", 9, rank=3, weighted=True, rule=LogitsRule(0.6, 1.7)),
    OP.case("weights, no rows", 0, rank=3, weighted=True),
)


def _worked(
    s: _Inputs, mask: Tensor, *, one_hot: bool = True, slope: bool = True, flip: bool = False
) -> LinearCrossEntropyGrads:
    """Return the gradients from full logits, optionally with a mistake after the logits.

    Args:
        mask: dropout mask for the gradients; the logits use the right one.
    """
    logits = s.x @ s.weight.T
    if s.head is not None:
        logits = logits + s.head.scaling * (s.x * s.mask) @ s.head.lora_A.T @ s.head.lora_B.T
    logits = _ruled(logits, s.rule)
    d = torch.softmax(logits, dim=-1)
    if one_hot:
        d = d - functional.one_hot(s.targets, s.weight.shape[0])
    if slope and s.rule.cap is not None:
        d = d * (1 - (logits / s.rule.cap) ** 2)
    d = d * (s.multiplier if isinstance(s.multiplier, float) else s.multiplier[:, None]) * s.rule.scaling
    if s.head is None:
        return LinearCrossEntropyGrads(d @ s.weight, None, None)
    x, d_h = s.x * mask, s.head.scaling * d @ s.head.lora_B
    x = x.flip(0) if flip else x
    d_x = d @ s.weight + mask * (d_h @ s.head.lora_A)
    return LinearCrossEntropyGrads(d_x, d_h.T @ x, s.head.scaling * d.T @ (x @ s.head.lora_A.T))


def _mistaken(name: str, gradients: str, **mistake: Any) -> tuple[Mutant, ...]:
    return wrong(name, gradients, lambda s, gradient: getattr(_worked(s, s.mask, **mistake), gradient))


def _masked(name: str, gradients: str, mask: Callable[[_Inputs], Tensor]) -> tuple[Mutant, ...]:
    """Return mutants with the right mask in the logits and a wrong one in a gradient."""
    return wrong(name, gradients, lambda s, gradient: getattr(_worked(s, mask(s)), gradient))


def _weighted(name: str, gradients: str, change: Callable[[Tensor], Tensor]) -> tuple[Mutant, ...]:
    """Return mutants with other multipliers, if each row has its own."""
    return OP.perturb(
        name, gradients, multiplier=lambda s: s.multiplier if isinstance(s.multiplier, float) else change(s.multiplier)
    )


def _plain_softmax(s: _Inputs) -> Tensor:
    return s.rule.scaling * not_none(_worked(s._replace(rule=s.rule._replace(scaling=1.0)), s.mask).d_lora_B)


def _first_chunks_mask(s: _Inputs) -> Tensor:
    """Mask every chunk like the first one."""
    return s.mask[torch.arange(len(s.x)) % chunk_rows(s.x.shape[1], s.x.dtype)]


def _last_chunk(s: _Inputs) -> _Inputs:
    step = chunk_rows(s.x.shape[1], s.x.dtype)
    start = (max(s.x.shape[0] - 1, 0) // step) * step
    multiplier = s.multiplier if isinstance(s.multiplier, float) else s.multiplier[start:]
    return s._replace(x=s.x[start:], targets=s.targets[start:], multiplier=multiplier)


def _next_seed(s: _Inputs) -> HeadFactors | None:
    return s.head and s.head._replace(dropout=next_seed(s.head))


MUTANTS = (
    _mistaken("target not subtracted", "d_x", one_hot=False),
    OP.perturb("targets shifted by one", "d_x", targets=lambda s: (s.targets + 1) % len(s.weight)),
    _masked("low-rank term missing", "d_x", lambda s: torch.zeros_like(s.x)),
    OP.perturb("multiplier forgotten", "d_x d_lora_A d_lora_B", multiplier=1.0),
    _mistaken("cap's slope missing", "d_x d_lora_A", slope=False),
    wrong("logits' multiplier forgotten", "d_x d_lora_A d_lora_B", lambda s, d: d / s.rule.scaling),
    wrong("logits' multiplier left out of the softmax", "d_lora_B", _plain_softmax),
    wrong("mean for sum", "d_x", lambda s, d: d / max(s.x.shape[0], 1)),
    wrong("scaling forgotten", "d_lora_A d_lora_B", lambda s, d: d / s.head.scaling),
    # Each chunk overwrites the factors' gradients instead of adding to them.
    OP.perturb("last chunk only", "d_lora_A d_lora_B", s=_last_chunk),
    _mistaken("rows reversed", "d_lora_A d_lora_B", flip=True),
    _weighted("weights averaged", "d_x", lambda w: w.mean().expand_as(w)),
    _weighted("weights of the first chunk", "d_x d_lora_A", lambda w: w[torch.arange(len(w)) % CHUNK_ROWS]),
    _weighted("weights reversed", "d_lora_A d_lora_B", lambda w: w.flip(0)),
    _weighted("weights squared", "d_lora_B", lambda w: w * w),
    _masked("mask ignored", "d_x d_lora_A d_lora_B", lambda s: torch.ones_like(s.x)),
    _masked("mask twice", "d_x", lambda s: s.mask * s.mask),
    _masked("mask not scaled up", "d_lora_A", lambda s: (s.mask != 0).to(s.x)),
    _masked("mask of the first chunk", "d_lora_A d_lora_B", _first_chunks_mask),
    OP.perturb("mask of another seed", "d_lora_B", head=_next_seed),
)
