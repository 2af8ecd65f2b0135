"""Run the proofs: every case of an op in float64, float32 and bfloat16, and every mutant.

float64 proves the formula: the gradients by hand agree with autograd of the reference, and, since a reference can be
wrong too, with finite differences of the op's own forward. In float32 and bfloat16 both are measured against float64 on
the same rounded inputs, and the error by hand may be at most twice autograd's own, or four units of rounding.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.ops.registry import OPS
from backhand.verify.case import Case, Mutant, OpProof, Tensors
from backhand.verify.differentiate import autograd_gradients, difference_error
from backhand.verify.measure import WorstRow, norm, relative_error, worst_row

FLOAT64_BOUND = 1e-12
DIFFERENCES_BOUND = 1e-8
LOW_PRECISIONS = (torch.float32, torch.bfloat16)
TIMES_AUTOGRAD = 2.0
UNITS_OF_ROUNDING = 4.0
AUTOGRAD, DIFFERENCES = "autograd", "differences"


@dataclass(frozen=True)
class Row:
    """One proof: one tensor of one case in one dtype.

    Attributes:
        op, case: which input set of which op.
        dtype: `float64`, `float32` or `bfloat16`.
        check: `autograd`, or `differences` for finite differences.
        tensor: `y`, or `d_` and the name of the input whose gradient it is.
        error: relative norm error against the truth in float64.
        bound: the largest error that passes.
        worst: the row of the tensor that is furthest off, if it has rows.
    """

    op: str
    case: str
    dtype: str
    check: str
    tensor: str
    error: float
    bound: float
    worst: WorstRow | None

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Rejection:
    """What became of one mutant.

    Attributes:
        op, mutant, gradient: which mistake in which gradient of which op.
        error: the largest finite relative error over the cases in float64.
        case: where it was largest.
        bound: what a right gradient stays below.
    """

    op: str
    mutant: str
    gradient: str
    error: float
    case: str
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the mistake was noticed: a finite value above the bound, not an exception, a shape or a NaN."""
        return self.error > self.bound


def load_proofs(op: str | None = None) -> Iterator[OpProof]:
    """The proofs of one op, or of all, in the order of the registry.

    Raises:
        KeyError: for an op that is not registered.
    """
    for name in OPS if op is None else (op,):
        module = importlib.import_module(f"backhand.verify.cases.{OPS[name]}")
        yield from (proof for proof in module.PROOFS if proof.op == name)


def prove_op(proof: OpProof, device: torch.device | str = "cpu") -> Iterator[Row]:
    """Every proof of one op, case by case."""
    for case in proof.cases:
        yield from prove_case(proof, case, device)


def prove_case(proof: OpProof, case: Case, device: torch.device | str = "cpu") -> Iterator[Row]:
    """float64 against autograd and finite differences, then float32 and bfloat16 against float64."""
    exact = on_device(case.tensors, device)
    yield from _exact_rows(proof, case, exact)
    for dtype in LOW_PRECISIONS:
        yield from _low_precision_rows(proof, case, exact, dtype)


def _exact_rows(proof: OpProof, case: Case, tensors: Tensors) -> Iterator[Row]:
    with torch.no_grad():
        y, gradients = case.by_hand(tensors, proof.backward)
    truth_y, truth = autograd_gradients(case.reference, tensors, gradients)
    zero_scale = norm(tensors["d_y"])
    measured, expected = outputs(y, gradients), outputs(truth_y, truth)
    for name, tensor in measured.items():
        error = relative_error(tensor, expected[name], zero_scale)
        worst = worst_row(tensor, expected[name])
        yield Row(proof.op, case.name, "float64", AUTOGRAD, name, error, FLOAT64_BOUND, worst)

    @torch.no_grad()
    def forward(t: Tensors) -> Tensor:
        return case.by_hand(t, proof.backward).y

    for name, gradient in gradients.items():
        error = difference_error(forward, tensors, name, gradient)
        yield Row(proof.op, case.name, "float64", DIFFERENCES, f"d_{name}", error, DIFFERENCES_BOUND, None)


def _low_precision_rows(proof: OpProof, case: Case, exact: Tensors, dtype: torch.dtype) -> Iterator[Row]:
    rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in exact.items()}
    widened = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in rounded.items()}
    with torch.no_grad():
        y, gradients = case.by_hand(rounded, proof.backward)
    measured = outputs(y, gradients)
    truth = outputs(*autograd_gradients(case.reference, widened, gradients))
    usual = outputs(*autograd_gradients(case.usual or case.reference, rounded, gradients))
    zero_scale = norm(widened["d_y"])
    for name, tensor in measured.items():
        own = relative_error(usual[name], truth[name], zero_scale)
        bound = max(TIMES_AUTOGRAD * own, UNITS_OF_ROUNDING * torch.finfo(dtype).eps) if math.isfinite(own) else 0.0
        error = relative_error(tensor, truth[name], zero_scale)
        yield Row(proof.op, case.name, dtype_name(dtype), AUTOGRAD, name, error, bound, worst_row(tensor, truth[name]))


def reject_mutants(proof: OpProof, device: torch.device | str = "cpu") -> Iterator[Rejection]:
    """Run every mutant on every case in float64, against autograd of the reference."""
    prepared = []
    for case in proof.cases:
        tensors = on_device(case.tensors, device)
        with torch.no_grad():
            names = list(case.by_hand(tensors, proof.backward).gradients)
        prepared.append((case, tensors, autograd_gradients(case.reference, tensors, names)[1]))
    for mutant in proof.mutants:
        yield reject_mutant(proof, mutant, prepared)


def reject_mutant(proof: OpProof, mutant: Mutant, prepared: Iterable[tuple[Case, Tensors, Tensors]]) -> Rejection:
    """The largest error that the mutant makes in its gradient over (case, tensors, true gradients)."""
    wrong = mutant.spoil(proof.backward)
    worst, where = 0.0, ""
    for case, tensors, truth in prepared:
        with torch.no_grad():
            gradients = case.by_hand(tensors, wrong).gradients
        for name in gradients:
            if spoils(mutant, name) and gradients[name].shape == truth[name].shape:
                error = relative_error(gradients[name], truth[name], norm(tensors["d_y"]))
                if math.isfinite(error) and error > worst:
                    worst, where = error, case.name
    return Rejection(proof.op, mutant.name, mutant.gradient, worst, where, FLOAT64_BOUND)


def spoils(mutant: Mutant, name: str) -> bool:
    """Whether the mutant's gradient is that of the input `name`, or of a member of it (`lora_A 0`, `lora_A 1`, …)."""
    return mutant.gradient == f"d_{name.partition(' ')[0]}"


def outputs(y: Tensor, gradients: Tensors) -> Tensors:
    """y and the gradients by the names that the table shows."""
    return {"y": y} | {f"d_{name}": gradient for name, gradient in gradients.items()}


def on_device(tensors: Tensors, device: torch.device | str) -> Tensors:
    """The same tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
