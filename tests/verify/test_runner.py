"""The checker fails on wrong backward passes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from backhand.ops.registry import OPS
from backhand.verify.cases.lora_linear import CASES
from backhand.verify.mutants import Mutant
from backhand.verify.report import Result
from backhand.verify.runner import (
    Errors,
    Trial,
    _forward_of,
    forms,
    load_proofs,
    prove_case,
    reject_mutants,
)

(LORA_LINEAR,) = load_proofs("lora_linear")
FIRST = CASES[0]


def with_mistake(gradient, value):
    """Return the op with a wrong backward."""
    return replace(LORA_LINEAR, backward=Mutant("mistake", gradient, value).spoil(LORA_LINEAR.backward))


def failed(proof, case=FIRST):
    return [row for row in prove_case(proof, case) if not row.passed]


def test_the_right_op_passes():
    rows = list(prove_case(LORA_LINEAR, FIRST))
    assert all(row.passed for row in rows)
    assert {row.form for row in rows} == set(forms(LORA_LINEAR))
    for form in forms(LORA_LINEAR):
        found = {(row.dtype, row.check, row.tensor) for row in rows if row.form == form}
        tensors = {"y", "d_x", "d_lora_A", "d_lora_B"}
        every = {(dtype, "autograd", tensor) for dtype in ("float64", "float32", "bfloat16") for tensor in tensors}
        assert found == every | {("float64", "differences", tensor) for tensor in tensors - {"y"}}


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
    assert "row 3: off by" in next(row.detail for row in rows if row.check == "autograd")


@pytest.mark.parametrize(
    ("ours", "tried", "passes"),
    [
        ([1.0], 1, True),
        ([3.0] + [1.0] * 7, 8, True),
        ([4.0] * 8, 8, False),
    ],
)
def test_rounding_above_its_bound_is_judged_over_eight_inputs(ours, tried, passes, monkeypatch):
    asked = []

    def errors(_trial, _tensors, _dtype, number):
        asked.append(number)
        return {"y": Errors(ours[number], 1.0, "")}  # autograd's own is 1, the bound 2

    monkeypatch.setattr(Trial, "_rounding_errors", errors)
    trial = Trial(LORA_LINEAR, FIRST, FIRST.tensors)
    (row,) = trial.low_precision_rows(partial(Result, "lora_linear", FIRST.name), torch.float32)
    assert asked == list(range(tried))
    assert row.passed == passes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needless_loss_of_precision_fails(dtype):
    """A result with much lower precision than its dtype fails."""
    coarse = {"float32": torch.bfloat16, "bfloat16": torch.float8_e5m2}[dtype]

    def rounded(_g, _s, right):
        return right.d_x.to(coarse).to(right.d_x.dtype) if right.d_x.dtype != torch.float64 else right.d_x

    case = replace(FIRST, tensors={name: 0.5 * tensor for name, tensor in FIRST.tensors.items()})
    assert dtype in {row.dtype for row in failed(with_mistake("d_x", rounded), case)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails(bad):
    rows = failed(with_mistake("d_lora_A", lambda _g, _s, right: right.d_lora_A.index_fill(0, torch.tensor(1), bad)))
    assert {row.dtype for row in rows} == {"float64", "float32", "bfloat16"}
    assert all("row 1" in row.detail for row in rows if row.check == "autograd")


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
    wrong = replace(FIRST, run_manual=lambda t, backward: FIRST.run_manual(t | {"x": t["x"] * (1 + 1e-9)}, backward))
    assert "y" in {row.tensor for row in failed(LORA_LINEAR, wrong)}


@pytest.mark.parametrize(
    ("op", "word", "alone"),
    [
        *((op, "", True) for op in ("lora_linear", "block", "decoder")),
        # With the step's dropout in blocks, in the head, and in what makes the inputs of layers.
        *(("decoder", word, True) for word in ("dropout, recompute mlp", "head adapted, dropout", "what makes them")),
        ("decoder", "no tokens", False),  # nothing tells whether its loss comes from the backward
    ],
)
def test_differences_leave_a_backward_out_where_the_output_does_not_come_from_it(op, word, alone):
    """A decoder's step returns loss and gradients together. The loss computed alone has the same bits."""
    (proof,) = load_proofs(op)
    called = []

    def backward(*args, **kwargs):
        called.append(1)
        return proof.backward(*args, **kwargs)

    case = next(case for case in proof.cases if word in case.name)
    given = []
    with torch.no_grad():
        here = case.run_manual(case.tensors, lambda *a, **k: given.append(proof.backward(*a, **k)) or given[-1]).y
    forward = _forward_of(replace(proof, backward=backward), case, case.tensors, here, given[0])
    called.clear()
    moved = {name: tensor * 0.9 if tensor.is_floating_point() else tensor for name, tensor in case.tensors.items()}
    y = forward(moved)
    assert bool(called) is not alone
    with torch.no_grad():
        assert torch.equal(y, case.run_manual(moved, proof.backward).y)


def test_an_output_that_comes_from_the_backward_is_not_computed_without_it():
    def run_manual(tensors, backward):
        found = FIRST.run_manual(tensors, backward)
        return found._replace(y=found.y + sum(gradient.sum() for gradient in found.gradients.values()))

    case, called = replace(FIRST, run_manual=run_manual), []

    def backward(*args, **kwargs):
        called.append(LORA_LINEAR.backward(*args, **kwargs))
        return called[-1]

    here = run_manual(case.tensors, backward).y
    forward = _forward_of(replace(LORA_LINEAR, backward=backward), case, case.tensors, here, called[0])
    called.clear()
    forward({name: tensor * 0.9 for name, tensor in case.tensors.items()})
    assert called


def test_the_case_that_rejected_a_mistake_is_tried_first():
    (proof,) = load_proofs("lora_group")
    mistakes = [mutant for mutant in proof.mutants if mutant.name == "scaling forgotten"]
    assert len(mistakes) > 1
    by_hand = []

    def recording(case):
        def run(tensors, backward):
            by_hand.append(case.name)
            return case.run_manual(tensors, backward)

        return replace(case, run_manual=run)

    recorded = replace(proof, cases=tuple(map(recording, proof.cases)), mutants=tuple(mistakes))
    rejections = list(reject_mutants(recorded))
    assert all(rejection.passed for rejection in rejections)
    first = rejections[0].case
    assert by_hand[-(len(rejections) - 1) :] == [first] * (len(rejections) - 1)


def test_a_mistake_that_rounding_could_explain_is_no_rejection():
    slight = Mutant("slight", "d_x", lambda _g, _s, right: right.d_x * (1 + 1e-8))
    (rejection, *_) = reject_mutants(replace(LORA_LINEAR, mutants=(slight,)))
    assert not rejection.passed and 1e-9 < rejection.error < 1e-7


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
