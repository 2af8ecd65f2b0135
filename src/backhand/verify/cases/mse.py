"""Mean squared error: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.mse import mse_backward, mse_forward, mse_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants


def _case(name: str, shape: tuple[int, ...], *, size: float = 1.0) -> Case:
    draw = Draw(f"mse: {name}")
    tensors = {
        "prediction": draw.normal(*shape, size=size),
        "target": draw.normal(*shape, size=size),
        "d_y": torch.tensor(1.3, dtype=torch.float64),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = mse_forward(t["prediction"], t["target"])
        grads = backward(t["d_y"], saved)
        return ByHand(y, {"prediction": grads.d_prediction, "target": grads.d_target})

    def usual(t: Tensors) -> Tensor:
        rows = t["prediction"].shape[:-1].numel()
        return functional.mse_loss(t["prediction"], t["target"], reduction="sum") / max(rows, 1)

    def reference(t: Tensors) -> Tensor:
        return mse_reference(t["prediction"], t["target"])

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("one feature", (6, 1)),
    _case("features", (6, 3)),
    _case("documents and rows", (2, 5, 3)),
    _case("small differences", (6, 3), size=1e-4),
    _case("one row", (1, 3)),
    _case("one number", (1,)),
    _case("no rows", (0, 3)),
    _case("training size", (67, 96)),
)

MUTANTS = (
    *standard_mutants("d_prediction", "d_target"),
    Mutant("factor 2 forgotten", "d_prediction", lambda _g, _s, right: right.d_prediction / 2),
    Mutant("sum for mean", "d_prediction", lambda _g, s, right: right.d_prediction * max(s.rows, 1)),
    Mutant("mean over features too", "d_prediction", lambda _g, s, right: right.d_prediction / s.difference.shape[-1]),
    Mutant("upstream gradient ignored", "d_prediction", lambda g, _s, right: right.d_prediction / g),
    Mutant("absolute value", "d_prediction", lambda _g, _s, right: right.d_prediction.abs()),
    Mutant("same sign as the other", "d_target", lambda _g, _s, right: right.d_prediction),
    Mutant("no gradient", "d_target", lambda _g, _s, right: torch.zeros_like(right.d_target)),
)

PROOFS = (OpProof("mse", mse_backward, CASES, MUTANTS),)
