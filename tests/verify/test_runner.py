"""The checker itself fails where it should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from backhand.ops.registry import OPS
from backhand.verify.case import Mutant
from backhand.verify.cases.lora_linear import CASES
from backhand.verify.runner import forms, load_proofs, prove_case, reject_mutants

(LORA_LINEAR,) = load_proofs("lora_linear")
FIRST = CASES[0]


def with_mistake(gradient, value):
    """The op with a wrong backward in the place of its own."""
    return replace(LORA_LINEAR, backward=Mutant("mistake", gradient, value).spoil(LORA_LINEAR.backward))


def failed(proof, case=FIRST):
    return [row for row in prove_case(proof, case) if not row.passed]


def test_the_right_op_passes():
    assert not failed(LORA_LINEAR)


def test_a_factor_1_plus_1e_6_fails_against_autograd_and_against_differences():
    rows = failed(with_mistake("d_lora_B", lambda _g, _s, right: right.d_lora_B * (1 + 1e-6)))
    assert {(row.tensor, row.check) for row in rows if row.dtype == "float64"} == {
        ("d_lora_B", "autograd"),
        ("d_lora_B", "differences"),
    }


def test_a_mistake_in_one_row_is_found_there():
    def spoiled(_g, _s, right):
        d_x = right.d_x.clone()
        d_x[3] *= 1.001
        return d_x

    rows = failed(with_mistake("d_x", spoiled))
    assert {row.tensor for row in rows} == {"d_x"}
    assert "row 3: off by" in next(row.worst for row in rows if row.check == "autograd")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needless_loss_of_precision_fails(dtype):
    """A backward whose result has many fewer digits than its dtype is not excused as rounding."""
    coarse = {"float32": torch.bfloat16, "bfloat16": torch.float8_e5m2}[dtype]

    def rounded(_g, _s, right):
        return right.d_x.to(coarse).to(right.d_x.dtype) if right.d_x.dtype != torch.float64 else right.d_x

    case = replace(FIRST, tensors={name: 0.5 * tensor for name, tensor in FIRST.tensors.items()})
    assert dtype in {row.dtype for row in failed(with_mistake("d_x", rounded), case)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails(bad):
    rows = failed(with_mistake("d_lora_A", lambda _g, _s, right: right.d_lora_A.index_fill(0, torch.tensor(1), bad)))
    assert {row.dtype for row in rows} == {"float64", "float32", "bfloat16"}
    assert all("row 1" in row.worst for row in rows if row.check == "autograd")


def test_a_gradient_of_the_wrong_shape_fails():
    rows = failed(
        with_mistake("d_lora_A", lambda _g, _s, right: right.d_lora_A[:, :-1]), case=replace(FIRST, exempt=("lora_A",))
    )
    assert math.inf in {row.error for row in rows}


def test_nonzero_gradients_of_nothing_fail():
    empty = next(case for case in CASES if case.name == "no rows")
    rows = failed(with_mistake("d_lora_A", lambda _g, _s, right: right.d_lora_A + 1e-30), empty)
    assert {row.tensor for row in rows} == {"d_lora_A"}


def test_a_wrong_forward_fails():
    wrong = replace(FIRST, by_hand=lambda t, backward: FIRST.by_hand(t | {"x": t["x"] * (1 + 1e-9)}, backward))
    assert "y" in {row.tensor for row in failed(LORA_LINEAR, wrong)}


def test_a_mutant_that_changes_nothing_survives():
    proof = replace(LORA_LINEAR, mutants=(Mutant("none", "d_x", lambda _g, _s, right: right.d_x),))
    rejections = list(reject_mutants(proof))
    assert len(rejections) == len(forms(LORA_LINEAR))
    assert not any(rejection.passed or rejection.error >= 1e-15 for rejection in rejections)


def test_a_mutant_must_be_rejected_in_the_gradient_that_it_spoils():
    proof = replace(LORA_LINEAR, mutants=(Mutant("elsewhere", "d_x", lambda _g, _s, right: right.d_x),))
    spoiled = with_mistake("d_lora_A", lambda _g, _s, right: 2 * right.d_lora_A)
    rejections = list(reject_mutants(replace(proof, backward=spoiled.backward)))
    assert len(rejections) == len(forms(LORA_LINEAR))
    assert not any(rejection.passed for rejection in rejections)


def test_nan_and_shapes_are_no_rejection_by_value():
    proof = replace(
        LORA_LINEAR,
        mutants=(
            Mutant("nan", "d_x", lambda _g, _s, right: right.d_x * math.nan),
            Mutant("shape", "d_lora_A", lambda _g, _s, right: right.d_lora_A[..., :-1]),
        ),
    )
    rejections = list(reject_mutants(proof))
    assert len(rejections) == 2 * len(forms(LORA_LINEAR))
    assert not any(rejection.passed for rejection in rejections)


def test_all_ops_together_have_their_proofs_and_unique_mutants():
    for op in OPS:
        (proof,) = load_proofs(op)
        names = [(mutant.name, mutant.gradient) for mutant in proof.mutants]
        assert len(set(names)) == len(names), op
    with pytest.raises(KeyError):
        list(load_proofs("no such op"))
