"""Dropout: cases and mutants."""

from __future__ import annotations

from torch import Tensor

from backhand.ops.dropout import DropoutSaved, dropout_backward, dropout_forward, dropout_mask, dropout_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants


def _case(name: str, shape: tuple[int, ...], probability: float, seed: int) -> Case:
    draw = Draw(f"dropout: {name}")
    tensors = {"x": draw.normal(*shape), "d_y": draw.normal(*shape)}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = dropout_forward(t["x"], probability, seed)
        return ByHand(y, {"x": backward(t["d_y"], saved).d_x})

    def reference(t: Tensors) -> Tensor:
        return dropout_reference(t["x"], dropout_mask(shape, probability, seed, t["x"].device), probability)

    return Case(name, tensors, by_hand, reference)


CASES = (
    _case("rows", (5, 7), 0.3, 11),
    _case("documents and rows", (2, 5, 7), 0.1, 2**40),
    _case("probability 0", (5, 7), 0.0, 11),
    _case("probability 0.95", (11, 13), 0.95, 5),
    _case("one row", (1, 7), 0.4, 3),
    _case("one number", (), 0.4, 3),
    _case("no rows", (0, 7), 0.3, 11),
    _case("training size", (67, 96), 0.05, 1),
)


def _kept(s: DropoutSaved, g: Tensor) -> Tensor:
    return dropout_mask(s.shape, s.probability, s.seed, g.device)


MUTANTS = (
    *standard_mutants("d_x"),
    Mutant("mask ignored", "d_x", lambda g, _s, _right: g.clone()),
    Mutant("mask ignored but scaled", "d_x", lambda g, s, _right: g / (1 - s.probability)),
    Mutant("not scaled up", "d_x", lambda g, s, _right: g * _kept(s, g)),
    Mutant("scaled by the wrong share", "d_x", lambda g, s, _right: g * _kept(s, g) / max(s.probability, 1e-3)),
    Mutant("mask of another seed", "d_x", lambda g, s, _right: dropout_backward(g, s._replace(seed=s.seed + 1)).d_x),
    Mutant("mask inverted", "d_x", lambda g, s, _right: g * ~_kept(s, g) / (1 - s.probability)),
)

PROOFS = (OpProof("dropout", dropout_backward, CASES, MUTANTS),)
