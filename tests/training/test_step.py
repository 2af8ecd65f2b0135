"""What moves the adapter, on one long buffer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from backhand.errors import not_none
from backhand.loop.evaluator import Evaluator
from backhand.loop.forgetting import Forgetting
from backhand.loop.measuring import HeldOut
from backhand.loop.state import STATE_FILE, Progress, RunState
from backhand.loop.step import AdapterOptimizer, flat_norm
from backhand.loop.value_average import saved_values
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.options.config import OptimizationOptions
from backhand.runs.checkpoint import Checkpoint
from backhand.runs.row_changes import MOST_RECORDED, ROW_NATS, ROW_REWARDS, row_scores


@pytest.mark.parametrize("elements", [0, 1, 16_384, 16_385, 20_000_003])
def test_the_norm_of_a_long_buffer_is_that_of_float64(elements: int) -> None:
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert flat_norm(values) == pytest.approx(float(values.double().norm()), rel=1e-6)


@pytest.mark.parametrize("place", [3, 70_000])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_of_what_is_not_finite_is_not_finite(value: float, place: int) -> None:
    values = torch.ones(70_001)
    values[place] = value
    assert not torch.isfinite(torch.tensor(flat_norm(values)))


def test_a_long_buffer_is_clipped_to_the_norm_that_was_asked_for() -> None:
    lora = LoRAParameters([LoRASlot("layers.0.proj", 500_000, 500_000, 9, 1.7)])
    lora.gradients.copy_(torch.randn(lora.gradients.shape, generator=torch.Generator().manual_seed(1)))
    AdapterOptimizer(lora, OptimizationOptions(max_grad_norm=0.7)).clip()
    assert _norm(lora.gradients) == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize(
    ("share", "weights"), [(1.0, [1.0] * 6), (0.4, [float(i * (i + 1) * (i + 2)) for i in range(1, 7)])]
)
def test_the_saved_values_are_an_average_in_which_later_steps_have_more_weight(
    share: float, weights: list[float]
) -> None:
    lora = LoRAParameters([LoRASlot("layers.0.proj", 30, 20, 4, 1.7)])
    lora.refresh_compute(torch.bfloat16)
    optimizer = AdapterOptimizer(lora, OptimizationOptions(average_share=share))
    draw, steps = torch.Generator().manual_seed(0), list[Tensor]()
    for _ in weights:
        lora.gradients.copy_(torch.randn(lora.gradients.shape, generator=draw))
        optimizer.step(0.1)
        steps.append(lora.values.double())
    expected = sum(weight * values for weight, values in zip(weights, steps, strict=True)) / sum(weights)
    lora.refresh_compute(torch.bfloat16)
    with saved_values(optimizer.average):
        torch.testing.assert_close(lora.values.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lora.compute_values, lora.values.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(lora.values.double(), steps[-1], rtol=0, atol=0)
    torch.testing.assert_close(lora.compute_values, lora.values.bfloat16(), rtol=0, atol=0)


class _Sum(HeldOut):
    """A held-out loss that is a multiple of the sum of the values."""

    def __init__(self, lora: LoRAParameters, sign: float) -> None:
        super().__init__((), 1)
        self._lora, self._sign = lora, sign

    def loss(self, *_: Any, **__: Any) -> float:
        loss = self._sign * float(self._lora.values.sum())
        self.measured = {"eval_measured": loss}
        return loss


@pytest.mark.parametrize(("sign", "newest_is_better"), [(1.0, True), (-1.0, False)])
def test_the_better_of_average_and_newest_values_is_saved(sign: float, newest_is_better: bool) -> None:
    lora = LoRAParameters([LoRASlot("layers.0.proj", 30, 20, 4, 1.7)])
    optimizer = AdapterOptimizer(lora, OptimizationOptions(average_share=1.0))
    held_out, plan = _Sum(lora, sign), SimpleNamespace(run=SimpleNamespace(max_forgetting=None))
    evaluator = Evaluator(Mock(), RunState(lora, optimizer, Progress(step=2)), cast("Any", plan), held_out=held_out)
    for _ in range(2):
        lora.gradients.fill_(1.0)
        optimizer.step(0.1)  # the sum falls
    average, newest = not_none(optimizer.average), lora.values.clone()
    assert evaluator.evaluate()
    assert not torch.equal(average.values, newest) and torch.equal(lora.values, newest)
    with saved_values(average):
        assert torch.equal(lora.values, newest if newest_is_better else average.values)
        better = evaluator.state.progress.eval_loss
        assert better == held_out.measured["eval_measured"] == held_out.loss()
    contents = evaluator.state.contents(lambda: {"values": bytes(lora.values.numpy())})
    resumed = RunState(lora, AdapterOptimizer(lora, OptimizationOptions(average_share=1.0)), Progress())
    resumed.restore(Checkpoint(2, contents, {}), torch.float32)
    assert resumed.contents(lambda: {"values": bytes(lora.values.numpy())}) == contents
    tensors = load(contents[STATE_FILE])
    del tensors["average_is_saved"]
    resumed.restore(Checkpoint(2, {**contents, STATE_FILE: save(tensors)}, {}), torch.float32)
    assert not_none(resumed.optimizer.average).is_saved, "an earlier checkpoint does not state it"
    optimizer.step(0.1)
    assert average.is_saved, "an evaluation says nothing about later values"


def test_a_rise_on_neutral_texts_is_noted_once() -> None:
    lora = LoRAParameters([LoRASlot("layers.0.proj", 30, 20, 4, 1.7)])
    state = RunState(lora, AdapterOptimizer(lora, OptimizationOptions()), Progress(step=1))
    meter, observer = Mock(), Mock()
    observer.evaluated.return_value = None
    plan = cast("Any", SimpleNamespace(run=SimpleNamespace(max_forgetting=None)))
    evaluator = Evaluator(Mock(), state, plan, meter=meter, observer=observer)
    for rise in (0.4, 0.67, 0.9):
        meter.measure.return_value = Forgetting(rise, 0.1)
        evaluator.evaluate()
    (note,) = (call.args[0] for call in observer.noted.call_args_list)
    assert note.startswith("step 1: it forgot: on neutral texts the loss rose by 0.67 nats per token. A lower")


@pytest.mark.parametrize(("rows", "recorded"), [(MOST_RECORDED, True), (MOST_RECORDED + 1, False)])
def test_the_values_of_few_held_out_rows_are_recorded(rows: int, recorded: bool) -> None:
    """The rewards of all rows are, since a gain in reward has no other figures."""
    lora = LoRAParameters([LoRASlot("layers.0.proj", 30, 20, 4, 1.7)])
    state = RunState(lora, AdapterOptimizer(lora, OptimizationOptions()), Progress(step=1))
    held_out, observer = _Sum(lora, 1.0), Mock()
    observer.evaluated.return_value = None
    held_out.by_row = {ROW_NATS: [0.5] * rows, ROW_REWARDS: [0.5] * rows}
    plan = cast("Any", SimpleNamespace(run=SimpleNamespace(max_forgetting=None)))
    Evaluator(Mock(), state, plan, held_out=held_out, observer=observer).evaluate()
    ((line,), _) = observer.evaluated.call_args
    assert (ROW_NATS in line) is recorded and len(line[ROW_REWARDS]) == rows
    assert len(row_scores([0.5] * rows)) == rows * recorded


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
