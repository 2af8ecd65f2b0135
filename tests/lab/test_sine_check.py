"""Every named intermediate is compared with autograd, and a wrong one is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from backhand.errors import CheckError
from backhand.lab.sine import check as sine_check
from backhand.lab.sine.check import check_gradients
from backhand.lab.sine.command import sine_command
from backhand.lab.sine.experiment import run_sine
from backhand.lab.sine.network import draw_start
from backhand.lab.sine.options import ShiftedTargetOptions, SineOptions
from backhand.lab.sine.points import Points, make_points
from backhand.lab.sine.training import AdapterTraining, BaseTraining
from backhand.lab.sine.walk import Formula

CHAIN = ["dL", "do_seven", "dsquared_diff", "ddiff", "doutputs", "do3", "do2", "do1"]
BASE_NAMES = [*CHAIN, "dl2w", "dl0bias", "dl0w"]
LORA_NAMES = [*CHAIN, "dh", "dlora_o1", "dlora_w", "dA", "dB"]
ONLY_PARTS = ShiftedTargetOptions(shifted=False)


def points() -> Points:
    return make_points("cos2", 31, "float64")


def base_training(widths: tuple[int, ...] = (7,)) -> BaseTraining:
    training = BaseTraining(draw_start(widths, 3, 1, "float64").network, points())
    training.forward()
    training.backward()
    return training


def adapter_training(widths: tuple[int, ...] = (7,)) -> AdapterTraining:
    network = draw_start(widths, 3, 1, "float64").network
    rng = np.random.default_rng(5)
    lora_A, lora_B = rng.standard_normal((3, 1)), rng.standard_normal((widths[0], 3))
    training = AdapterTraining(network, 0, points(), lora_A, lora_B, 1.7)
    training.forward()
    training.backward()
    return training


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_name_of_both_parts_at_the_chosen_epochs(dtype: str) -> None:
    options = SineOptions(dtype=dtype, base_epochs=300, lora_epochs=300, check=True, second=ONLY_PARTS)
    result = run_sine(options)
    for part, names in (("base", BASE_NAMES), ("lora", LORA_NAMES)):
        for epoch in (0, 1, 100, 299):
            found = [row.name for row in result.check if (row.part, row.epoch) == (part, epoch)]
            assert sorted(found) == sorted(names)
    assert not result.failed_checks
    if dtype == "float64":
        assert max(row.relative_error for row in result.check) < 1e-11
        assert all(row.approximate for row in result.check)


def test_shapes_are_those_of_the_arithmetic() -> None:
    shapes = {row.name: row.shape for row in check_gradients(base_training(), points(), "base", 0)}
    assert shapes["dl0w"] == (7, 1) and shapes["dl2w"] == (1, 7) and shapes["dl0bias"] == (7,)
    assert shapes["do2"] == (31, 7) and shapes["doutputs"] == (31, 1)
    shapes = {row.name: row.shape for row in check_gradients(adapter_training(), points(), "lora", 0)}
    assert shapes["dlora_w"] == (1, 7) and shapes["dA"] == (3, 7) and shapes["dB"] == (1, 3)


def test_more_layers_add_their_names() -> None:
    rows = check_gradients(base_training((7, 5, 3)), points(), "base", 0)
    assert {row.name for row in rows} == {*BASE_NAMES, "do4", "do5", "do6", "do7", "dl4w", "dl6w"}
    assert all(row.passed for row in rows)
    rows = check_gradients(adapter_training((7, 5)), points(), "lora", 0)
    assert {row.name for row in rows} == {*LORA_NAMES, "do4", "do5"}
    assert all(row.passed for row in rows)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, wrong)
        for name in BASE_NAMES + [f"lora {name}" for name in LORA_NAMES]
        for wrong in ("factor", "sign", "rows")
        if not (name.endswith("dsquared_diff") and wrong == "rows")  # the same number in every row
    ],
)
def test_a_wrong_gradient_is_found(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, _, name = name.rpartition(" ")
    original = sine_check.backward_by_hand

    def spoiled(value: np.ndarray) -> np.ndarray:
        reversed_rows = value[::-1] if value.shape[0] > 1 else value[:, ::-1] if value.ndim > 1 else -value
        return {"factor": value * (1 + 1e-6), "sign": -value, "rows": reversed_rows}[wrong].copy()

    def mutant(training: AdapterTraining | BaseTraining, points: Points) -> list[Formula]:
        return [
            dataclasses.replace(gradient, value=spoiled(gradient.value)) if gradient.name == name else gradient
            for gradient in original(training, points)
        ]

    monkeypatch.setattr(sine_check, "backward_by_hand", mutant)
    rows = check_gradients(adapter_training() if part else base_training(), points(), part or "base", 0)
    assert [row.name for row in rows if not row.passed] == [name]


def test_a_forgotten_scaling_in_the_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = AdapterTraining.backward

    def backward(self: AdapterTraining) -> None:
        original(self)
        self.d_lora_A /= self.scaling

    monkeypatch.setattr(AdapterTraining, "backward", backward)
    with pytest.raises(CheckError, match="dB"):
        sine_command(SineOptions(check=True, base_epochs=10, lora_epochs=10, second=ONLY_PARTS))
