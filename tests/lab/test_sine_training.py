"""The loops' gradients against autograd and finite differences, on networks in which all sizes differ."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.functional import relu

from backhand.errors import CheckError
from backhand.lab.sine.experiment import read_only
from backhand.lab.sine.network import Network, draw_start
from backhand.lab.sine.points import Points
from backhand.lab.sine.training import (
    Adam,
    AdapterTraining,
    BaseTraining,
    FlatParameters,
    FullUpdateTraining,
    GradientDescent,
    Trained,
    train,
)

WIDTHS = (9, 7, 5)
SCALING = 1.7


@pytest.fixture
def points() -> Points:
    rng = np.random.default_rng(0)
    return Points("noise", rng.standard_normal((23, 1)), rng.standard_normal((23, 1)))


def network() -> Network:
    drawn = draw_start(WIDTHS, 1, 4, "float64").network
    return Network(tuple(3 * weight for weight in drawn.weights), drawn.bias)


def trained(kind: str, points: Points) -> Trained:
    rng = np.random.default_rng(1)
    if kind == "base":
        return BaseTraining(network(), points)
    if kind.startswith("full"):
        full = FullUpdateTraining(network(), int(kind[-1]), points)
        full.delta_weight[:] = 0.3 * rng.standard_normal(full.delta_weight.shape)
        return full
    layer = int(kind[-1])
    outputs, inputs = network().weights[layer].shape
    lora_A, lora_B = rng.standard_normal((3, inputs)), rng.standard_normal((outputs, 3))
    return AdapterTraining(network(), layer, points, lora_A, lora_B, SCALING)


KINDS = ["base", "adapter 0", "adapter 1", "adapter 2", "full 0", "full 1", "full 2"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind: str, points: Points) -> None:
    part = trained(kind, points)
    part.forward()
    part.backward()
    by_hand = part.parameters.gradients.copy()
    values = part.parameters.values
    measured = np.empty_like(by_hand)
    for place in range(len(values)):
        kept = values[place]
        values[place] = kept + 1e-6
        above = part.forward()
        values[place] = kept - 1e-6
        below = part.forward()
        values[place] = kept
        measured[place] = (above - below) / 2e-6
    assert np.linalg.norm(by_hand) > 0.01
    assert np.linalg.norm(by_hand - measured) <= 1e-7 * np.linalg.norm(measured)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_adapter_gradients_by_autograd(layer: int, points: Points) -> None:
    part = trained(f"adapter {layer}", points)
    assert isinstance(part, AdapterTraining)
    loss = part.forward()
    part.backward()
    lora_A, lora_B = (torch.tensor(factor, requires_grad=True) for factor in (part.lora_A, part.lora_B))
    y = torch.tensor(points.x)
    for number, weight in enumerate(network().weights):
        effective = torch.tensor(weight) + (SCALING * lora_B @ lora_A if number == layer else 0)
        y = y @ effective.T + (torch.tensor(network().bias) if number == 0 else 0)
        y = relu(y) if number < len(WIDTHS) else y
    truth = ((y - torch.tensor(points.y)) ** 2).mean()
    truth.backward()
    assert loss == pytest.approx(truth.item(), rel=1e-14)
    for by_hand, factor in ((part.d_lora_A, lora_A), (part.d_lora_B, lora_B)):
        assert factor.grad is not None
        assert np.linalg.norm(by_hand - factor.grad.numpy()) <= 1e-13 * float(factor.grad.norm())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_merged_prediction_is_the_adapted_one(kind: str, points: Points) -> None:
    part = trained(kind, points)
    assert isinstance(part, AdapterTraining | FullUpdateTraining)
    loss = part.forward()
    prediction = network().predict(points.x, part.delta_weight, int(kind[-1]))
    assert loss == pytest.approx(float(np.mean((prediction - points.y) ** 2)), rel=1e-13)


def test_frozen_weights_cannot_be_written() -> None:
    base = network()
    before = base.digest()
    with read_only(base), pytest.raises(ValueError, match="read-only"):
        base.weights[1][0, 0] = 1
    base.weights[1][0, 0] = np.nextafter(base.weights[1][0, 0], 1)
    assert base.digest() != before


@pytest.mark.parametrize("make", [GradientDescent, lambda p, lr: Adam(p, lr, 50)], ids=["descent", "adam"])
def test_optimizers_take_torchs_steps(make: Callable[[FlatParameters, float], GradientDescent | Adam]) -> None:
    rng = np.random.default_rng(2)
    parameters = FlatParameters(np.zeros((3, 2)), np.zeros(5))
    parameters.values[:] = rng.standard_normal(11)
    theirs = torch.tensor(parameters.values, requires_grad=True)
    ours = make(parameters, 0.03)
    reference: torch.optim.Optimizer
    if isinstance(ours, Adam):
        reference = torch.optim.Adam([theirs], lr=0.03)
        schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 - step / 50)
    else:
        reference = torch.optim.SGD([theirs], lr=0.03)
        schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda _: 1.0)
    for _ in range(50):
        parameters.gradients[:] = rng.standard_normal(11)
        theirs.grad = torch.tensor(parameters.gradients)
        ours.step()
        reference.step()
        schedule.step()
    np.testing.assert_allclose(parameters.values, theirs.detach().numpy(), rtol=1e-12)


def test_views_of_the_flat_buffers() -> None:
    initial = np.arange(6, dtype=np.float32).reshape(3, 2)
    parameters = FlatParameters(initial, np.zeros(5, np.float32))
    parameters.arrays[1][:] = 7
    parameters.arrays[0][0, 1] = 9
    parameters.array_gradients[0][2, 1] = 3
    assert parameters.values.tolist() == [0, 9, 2, 3, 4, 5] + [7] * 5 and initial[0, 1] == 1
    assert parameters.gradients.tolist() == [0] * 5 + [3] + [0] * 5


def test_a_loss_that_is_not_finite_says_from_where_on(points: Points) -> None:
    part = BaseTraining(network(), points)
    with pytest.raises(CheckError, match=r"not finite from epoch \d+ on") as caught:
        train(part, GradientDescent(part.parameters, 1e4), 2000, where="part 1, base")
    assert caught.value.where == "part 1, base"
    assert "learning rate" in str(caught.value.next_step)


def test_observes_after_backward_and_before_the_update(points: Points) -> None:
    part = BaseTraining(network(), points)
    seen: list[tuple[int, float]] = []
    losses = train(
        part,
        GradientDescent(part.parameters, 0.01),
        6,
        observe=lambda epoch: seen.append((epoch, part.forward())),
        observe_epochs={0, 3, 5},
    )
    assert seen == [(epoch, losses[epoch]) for epoch in (0, 3, 5)]
