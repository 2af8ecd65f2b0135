"""The scaffold rejects wrong declarations, and calls functions with arguments by parameter names."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from backhand.verify.mutants import perturbed, wrong
from backhand.verify.runner import prove_case, reject_mutants
from backhand.verify.scaffold import BUFFER_START, ROWS, Arguments, Axis, Op, grad_buffer


class ScaledSaved(NamedTuple):
    x: Tensor
    scaling: float


class ScaledGrads(NamedTuple):
    d_x: Tensor | None
    d_weight: Tensor | None


class Added(NamedTuple):
    d_lora_A: Tensor


def forward(x, weight, scaling, bias=None):
    y = scaling * x * weight
    return (y if bias is None else y + bias), (ScaledSaved(x, scaling), weight)


def backward(d_y: Tensor, saved: object, *, input_gradient: bool = True) -> ScaledGrads:
    (x, scaling), weight = saved
    d_x = scaling * d_y * weight if input_gradient else None
    return ScaledGrads(d_x, scaling * (d_y * x).reshape(-1, x.shape[-1]).sum(0))


def op(**changes):
    given = {
        "inputs": {"x": "size: *lead n", "weight": "n", "d_y": "*lead n", "bias": "n"},
        "options": {"lead": ..., "n": 4, "size": 2.0, "bias": False, "scaling": 1.7, "input_gradient": True},
        "forward": forward,
        "backward": backward,
        "reference": lambda x, weight, scaling, bias: scaling * x * weight + (0 if bias is None else bias),
    }
    return Op("mse", **(given | changes))


def proved(one, case):
    return [row for row in prove_case(one.proof([case], ()), case) if not row.passed]


def test_the_standard_cases_follow_from_the_axes():
    one = op(
        options={"lead": ROWS, "n": Axis(4, 96), "size": 2.0, "bias": False, "scaling": 1.7, "input_gradient": True}
    )
    cases = {case.name: case.tensors for case in one.standard_cases("biased: ", bias=True)}
    shapes = {name.removeprefix("biased: "): tuple(tensors["x"].shape) for name, tensors in cases.items()}
    assert shapes == {
        "usual sizes": (5, 4),
        "documents and rows": (2, 5, 4),
        "one row": (1, 4),
        "no rows": (0, 4),
        "strided": (5, 4),
        "training size": (67, 96),
    }
    assert all("bias" in tensors for tensors in cases.values())
    assert {name: tensor.stride() for name, tensor in cases["biased: strided"].items()} == {
        "x": (8, 2),
        "weight": (2,),
        "d_y": (1, 5),
        "bias": (2,),
    }
    # An axis that the call gives is the same in all cases, and without axes there are no standard cases.
    assert {case.tensors["x"].shape[-1] for case in one.standard_cases(n=3)} == {3}
    assert op().standard_cases(lead=(5,)) == ()


def test_a_right_op_passes_with_and_without_what_may_be_left_out():
    one = op()
    for case in (one.case("plain", (5,)), one.case("bias", (2, 5), 3, bias=True), one.case("no rows", (0,))):
        assert not proved(one, case)
    assert set(one.case("plain", (5,)).tensors) == {"x", "weight", "d_y"}
    assert one.case("bias", (2, 5), 3, bias=True).tensors["bias"].shape == (3,)
    assert one.case("large", (50,), size=30.0).tensors["x"].std() > 20


def test_a_wrong_op_fails():
    def doubled(d_y: Tensor, saved: object, *, input_gradient: bool = True) -> ScaledGrads:
        right = backward(d_y, saved, input_gradient=input_gradient)
        return right._replace(d_weight=2 * right.d_weight)

    one = op(backward=doubled)
    assert {row.tensor for row in proved(one, one.case("plain", (5,)))} == {"d_weight"}


def test_a_gradient_that_never_comes_is_no_proof():
    def without(d_y: Tensor, saved: object, *, input_gradient: bool = True) -> ScaledGrads:
        return backward(d_y, saved, input_gradient=input_gradient)._replace(d_weight=None)

    one = op(backward=without)
    with pytest.raises(KeyError, match="weight"):
        proved(one, one.case("plain", (5,)))


def test_a_switched_off_gradient_is_not_asked_for():
    one = op()
    case = one.case("frozen", (5,), input_gradient=False)
    assert not proved(one, case)
    assert set(case.run_manual(case.tensors, backward).gradients) == {"weight"}


def test_an_option_that_is_none_of_the_ops_is_refused():
    with pytest.raises(TypeError, match=r"not an option.*: scale"):
        op().case("wrong name", (5,), scale=2.0)
    with pytest.raises(TypeError, match="lead"):
        op().case("without a size")


def test_additions_to_a_buffer_are_distinguished_from_its_earlier_contents():
    def add(d_y: Tensor, saved: Tensor, *, accumulate_into: Tensor | None = None) -> Added:
        found = d_y * saved
        return Added(found if accumulate_into is None else accumulate_into.add_(found))

    one = op(
        inputs={"x": "n", "lora_A": "n", "d_y": "n"},
        options={"n": 4, "added": False},
        forward=lambda x, lora_A: (x * lora_A, x),
        backward=add,
        reference=lambda x, lora_A: x * lora_A,
        derived={"accumulate_into": lambda lora_A, added: grad_buffer(lora_A) if added else None},
    )
    for case in (one.case("alone"), one.case("added", added=True)):
        assert not proved(one, case)
    case = one.case("added", added=True)
    assert not torch.equal(add(case.tensors["d_y"], case.tensors["x"]).d_lora_A, grad_buffer(case.tensors["lora_A"]))
    assert BUFFER_START != 0


def test_what_is_made_is_made_of_inputs_options_and_what_is_made():
    given = Arguments({"a": 2, "b": None}, {"c": lambda a: a + 1, "d": lambda c, a: c * a})
    assert given.call(lambda d, b, absent, fallback=5: (d, b, absent, fallback)) == (6, None, None, 5)
    assert given.call(lambda d, a: d + a, a=100) == 106


def test_mutants_of_several_gradients_are_rejected_each():
    one = op()
    cases = [one.case("plain", (5,)), one.case("square", (4,), 4)]
    mutants = (
        wrong("half", "d_x d_weight", lambda d: d / 2),
        wrong("of the other", "d_weight", lambda g, right: right.d_x.sum(0) + 0 * g.sum(0)),
        perturbed("rows reversed", "d_weight", backward, g=lambda g: g.flip(0)),
    )
    proof = one.proof(cases, mutants)
    rejections = list(reject_mutants(proof))
    assert [(one.mutant, one.tensor) for one in rejections][4:] == [
        ("half", "d_x"),
        ("half", "d_weight"),
        ("of the other", "d_weight"),
        ("rows reversed", "d_weight"),
    ]
    assert all(rejection.passed for rejection in rejections)


def test_a_tuple_of_gradients_is_spoiled_part_by_part_or_as_a_whole():
    class Both(NamedTuple):
        d_lora_A: tuple[Tensor | None, ...]

    right = Both((torch.ones(2), None, torch.zeros(3)))
    (each,), (whole,) = (
        wrong("more", "d_lora_A", lambda d: d + 1),
        wrong("reversed", "d_lora_A", lambda whole: whole[::-1]),
    )
    spoiled = each.spoil(lambda _d_y, _saved: right)(torch.zeros(1), None).d_lora_A
    assert spoiled[1] is None
    assert spoiled[0].tolist() == [2, 2]
    assert spoiled[2].tolist() == [1, 1, 1]
    assert whole.spoil(lambda _d_y, _saved: right)(torch.zeros(1), None).d_lora_A[0] is right.d_lora_A[2]
