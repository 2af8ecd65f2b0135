"""Cross-entropy from logits: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.cross_entropy import (
    CrossEntropySaved,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_reference,
)
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants


def _case(name: str, rows: int, vocab: int, *, size: float = 1.5, shift: float = 0.0) -> Case:
    draw = Draw(f"cross_entropy: {name}")
    tensors = {
        "logits": draw.normal(rows, vocab, size=size) + shift,
        "targets": draw.integers(vocab, rows),
        "d_y": draw.normal(rows),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = cross_entropy_forward(t["logits"], t["targets"])
        return ByHand(y, {"logits": backward(t["d_y"], saved).d_logits})

    def reference(t: Tensors) -> Tensor:
        return cross_entropy_reference(t["logits"], t["targets"])

    def usual(t: Tensors) -> Tensor:
        return functional.cross_entropy(t["logits"].to(torch.float32), t["targets"], reduction="none")

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("rows", 5, 7),
    _case("as many rows as words", 6, 6),
    _case("sure of itself", 5, 7, size=12.0),
    _case("far from zero", 5, 7, shift=-40.0),
    _case("two words", 5, 2),
    _case("one row", 1, 7),
    _case("no rows", 0, 7),
    _case("training size", 67, 353),
)


def _one_hot(saved: CrossEntropySaved) -> Tensor:
    return functional.one_hot(saved.targets, saved.probabilities.shape[1]).to(saved.probabilities.dtype)


MUTANTS = (
    *standard_mutants("d_logits"),
    Mutant("target not subtracted", "d_logits", lambda g, s, _right: g[:, None] * s.probabilities),
    Mutant("softmax left out", "d_logits", lambda g, s, _right: -g[:, None] * _one_hot(s)),
    Mutant("target subtracted twice", "d_logits", lambda g, s, right: right.d_logits - g[:, None] * _one_hot(s)),
    Mutant("mean for sum", "d_logits", lambda g, _s, right: right.d_logits / max(len(g), 1)),
    Mutant("upstream gradient of one", "d_logits", lambda _g, s, _right: s.probabilities - _one_hot(s)),
    Mutant(
        "upstream gradient of another row",
        "d_logits",
        lambda g, s, _right: g.flip(0)[:, None] * (s.probabilities - _one_hot(s)),
    ),
    Mutant(
        "target of another row",
        "d_logits",
        lambda g, s, _right: g[:, None] * (s.probabilities - _one_hot(s).flip(0)),
    ),
)

PROOFS = (OpProof("cross_entropy", cross_entropy_backward, CASES, MUTANTS),)
