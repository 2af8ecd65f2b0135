"""Every op on every case in every dtype, and every mutant: the same code as `backhand verify`."""

from __future__ import annotations

import functools

import pytest

from backhand.ops.registry import OPS
from backhand.verify.differentiate import autograd_gradients
from backhand.verify.runner import load_proofs, prove_case, reject_mutant

PROOFS = [proof for op in OPS for proof in load_proofs(op)]
CASES = [pytest.param(proof, case, id=f"{proof.op}-{case.name}") for proof in PROOFS for case in proof.cases]
MUTANTS = [
    pytest.param(proof, mutant, id=f"{proof.op}-{mutant.gradient}-{mutant.name}")
    for proof in PROOFS
    for mutant in proof.mutants
]


@pytest.mark.parametrize(("proof", "case"), CASES)
def test_gradients_by_hand_are_right(proof, case):
    rows = list(prove_case(proof, case))
    assert {row.dtype for row in rows} == {"float64", "float32", "bfloat16"}
    assert {row.check for row in rows if row.tensor != "y"} == {"autograd", "differences"}
    assert not [row for row in rows if not row.passed]


@functools.cache
def prepared(op):
    """The truth in every case of an op, for all its mutants."""
    (proof,) = (one for one in PROOFS if one.op == op)
    found = []
    for case in proof.cases:
        names = case.by_hand(case.tensors, proof.backward).gradients
        found.append((case, case.tensors, autograd_gradients(case.reference, case.tensors, names)[1]))
    return found


@pytest.mark.parametrize(("proof", "mutant"), MUTANTS)
def test_a_wrong_backward_is_rejected_by_value(proof, mutant):
    rejection = reject_mutant(proof, mutant, prepared(proof.op))
    assert rejection.passed
    assert rejection.error > 1e-7, "far above what rounding could explain"


@pytest.mark.parametrize(
    ("proof", "case"),
    [parameter for parameter in CASES if parameter.values[1].tensors["d_y"].numel() == 0],
)
def test_nothing_in_gives_zero_gradients(proof, case):
    _, gradients = case.by_hand(case.tensors, proof.backward)
    for name, gradient in gradients.items():
        assert gradient.shape == case.tensors[name].shape
        assert gradient.eq(0).all(), name
