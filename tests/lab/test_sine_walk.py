"""The printed numbers are consistent: every `a = b = c` line is evaluated again from its text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from backhand.lab.sine.experiment import run_sine
from backhand.lab.sine.options import ShiftedTargetOptions, SineOptions
from backhand.lab.sine.walk import Formula, number, products, summed

ONLY_PARTS = ShiftedTargetOptions(shifted=False)


def walk(**options: object) -> dict[str, list[Formula]]:
    few = SineOptions(points=3, widths=(2,), rank=2, base_epochs=6, lora_epochs=6, seed=4, second=ONLY_PARTS)
    result = run_sine(replace(few, **({"step": True, "step_epoch": 2} | options)))  # type: ignore[arg-type]
    return {"base": result.base.walk, "lora": result.lora.walk}


def evaluate(text: str) -> float:
    for sign, python in (("·", "*"), ("−", "-")):
        text = text.replace(sign, python)
    return float(eval(text, {"max": max}))


@pytest.mark.parametrize("part", ["base", "lora"])
@pytest.mark.parametrize("widths", [(2,), (3, 2)])
def test_every_line_works_out(part: str, widths: tuple[int, ...]) -> None:
    evaluated = 0
    for line in walk(widths=widths)[part]:
        assert "…" not in line.worked
        *_, calculation, value = line.worked.split(" = ")
        if line.worked.count(" = ") > 1:  # `do1[0,1] = number` gives a number and no calculation
            assert evaluate(calculation) == pytest.approx(evaluate(value), rel=2e-5, abs=1e-12), line
            evaluated += 1
    assert evaluated >= 12


def test_update_leads_to_the_next_epoch() -> None:
    """The new bias that epoch 2 works out is the one that epoch 3 adds."""
    now, following = walk()["base"], walk(step_epoch=3)["base"]
    updated = next(line.worked for line in now if (line.section, line.name) == ("update", "l0bias"))
    added = next(line.worked for line in following if line.name == "o2")
    assert updated.partition("]")[0].partition("[")[2] == added.partition("]")[0].partition(",")[2]  # the same unit
    new_bias = updated.rpartition(" = ")[2]
    bias_there = added.split(" = ")[1].rpartition(" + ")[2]
    assert evaluate(new_bias) == pytest.approx(evaluate(bias_there), rel=1e-5)


def test_names_and_order() -> None:
    lines = walk()
    names = [line.name for line in lines["base"] if line.section == "backward"]
    assert names[:5] == ["dL", "do_seven", "dsquared_diff", "ddiff", "doutputs"]
    assert names[5:] == ["do3", "dl2w", "do2", "dl0bias", "do1", "dl0w"]
    names = [line.name for line in lines["lora"] if line.section == "forward"]
    assert names == ["o1", "z", "lora_o1", "h", "o2", "o3", "outputs", "diff", "squared_diff", "o_seven", "loss"]
    assert [line.name for line in lines["lora"] if line.section == "update"] == ["A", "B"]


def test_long_sums_say_how_many_terms() -> None:
    assert summed(np.array([1.0, 0.0, 2.0])) == "1 + 2"
    assert summed(np.arange(1.0, 8.0)) == "1 + 2 + 3 + … (7 terms)"
    assert products([1.0, 0.0, -2.0], [3.0, 5.0, 0.5]) == "1·3 + (−2)·0.5"
    assert products([0.0], [1.0]) == "0"
    assert number(-1.5e-7) == "(−1.5e-7)"
