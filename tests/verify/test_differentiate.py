from __future__ import annotations

import math

import pytest
import torch

from backhand.verify.measure import autograd_gradients, difference_error


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "d_y": torch.randn(5, 3, generator=generator, dtype=torch.float64),
    }


def smooth(t):
    return torch.sin(2 * t["x"]) * t["x"]


def gradient(t):
    return t["d_y"] * (2 * torch.cos(2 * t["x"]) * t["x"] + torch.sin(2 * t["x"]))


def test_differences_agree_with_a_right_gradient():
    t = tensors()
    assert difference_error(smooth, t, {"x": gradient(t)}) < 1e-10


@pytest.mark.parametrize(
    "mistake",
    [
        lambda g: g * (1 + 1e-6),
        lambda g: -g,
        lambda g: g.flip(0),
        lambda g: torch.zeros_like(g),
        lambda g: g + 1e-5 * torch.eye(5, 3, dtype=torch.float64),
    ],
    ids=["factor 1 + 1e-6", "sign", "rows reversed", "zero", "a small term too many"],
)
def test_differences_find_a_wrong_gradient(mistake):
    t = tensors()
    assert difference_error(smooth, t, {"x": mistake(gradient(t))}) > 5e-7


def test_a_wrong_size_shows_in_full_whatever_the_random_directions_are():
    """Along the gradient itself the slope is as large as it can be; a random direction may see little of it."""
    t = tensors()
    for seed in range(12):
        error = difference_error(smooth, t, {"x": 1.001 * gradient(t)}, seed)
        assert error == pytest.approx(0.001 / 1.001, rel=1e-5)


@pytest.mark.parametrize(("rate", "bound"), [(30, 1e-8), (1, 1e-10), (1e-3, 1e-8)])
def test_differences_choose_their_step_for_steep_and_for_flat_functions(rate, bound):
    t = tensors()
    right = rate * torch.cos(rate * t["x"]) * t["d_y"]
    assert difference_error(lambda t: torch.sin(rate * t["x"]), t, {"x": right}) < bound


def test_differences_of_what_is_not_finite_are_nan():
    t = tensors()
    assert math.isnan(difference_error(lambda t: t["x"] * math.nan, t, {"x": gradient(t)}))
    assert math.isnan(difference_error(smooth, t, {"x": gradient(t) * math.nan}))


def test_differences_of_an_empty_input_are_zero():
    empty = torch.zeros(0, 3)
    assert difference_error(lambda t: t["x"], {"x": empty, "d_y": empty}, {"x": empty}) == 0


def test_autograd_gives_zeros_where_nothing_depends():
    t = tensors() | {"unused": torch.ones(2, dtype=torch.float64)}
    y, found = autograd_gradients(smooth, t, ["x", "unused"])
    assert torch.equal(y, smooth(t))
    assert torch.allclose(found["x"], gradient(t), rtol=1e-14)
    assert torch.equal(found["unused"], torch.zeros(2, dtype=torch.float64))
