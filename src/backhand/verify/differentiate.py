"""Two ways to differentiate that know nothing of our backward passes: autograd, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from backhand.verify.case import Tensors
from backhand.verify.measure import norm

STEPS = (1.6e-2, 4e-3, 1e-3, 2.5e-4)
DIRECTIONS = 2
# Below this share of the upstream gradient a gradient counts as zero by nature: rounding is all that is left of it.
NOTHING = 1e-6


def autograd_gradients(
    function: Callable[[Tensors], Tensor], tensors: Tensors, names: Iterable[str]
) -> tuple[Tensor, Tensors]:
    """y = function(tensors), and ∂(Σ d_y ⊙ y)/∂tensor for each name by autograd; zeros where y does not depend on it.

    Args:
        function: differentiable by autograd.
        tensors: the inputs and `d_y`.
        names: the inputs to differentiate for.
    """
    names = tuple(names)
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        y = function({**tensors, **leaves})
    gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if y.requires_grad:
        d_y = tensors["d_y"].to(y.dtype).expand(y.shape)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(y, list(leaves.values()), d_y, allow_unused=True)
        gradients |= {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    return y.detach(), gradients


def difference_error(
    function: Callable[[Tensors], Tensor], tensors: Tensors, name: str, gradient: Tensor, seed: int = 0
) -> float:
    """How far a gradient is from finite differences of the function: the largest error over several directions.

    For a direction v the slope of f(h) = Σ d_y ⊙ y(tensor + h v) at 0 is ⟨gradient, v⟩; see `slope`. The first
    direction is the gradient itself, where a wrong size shows at its fullest; the others are random, where anything
    missing from the gradient shows. The error is relative to the slope that a random direction has on average,
    ‖gradient‖ ‖v‖ / √n, or to the slope itself if that is larger.

    Args:
        function: y from tensors, in float64 and smooth around them.
        tensors: the inputs and `d_y`.
        name: the input to vary.
        gradient: the gradient on trial, of the shape of that input.
        seed: of the random directions.

    Returns:
        0 for an input without elements; NaN if anything is not finite.
    """
    x = tensors[name]
    if not x.numel():
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for number in range(DIRECTIONS):
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        if number == 0 and norm(gradient) > 0:
            v = gradient / norm(gradient) * x.numel() ** 0.5
        measured, expected = slope(function, tensors, name, v), float((gradient * v).sum())
        average = norm(gradient) * norm(v) / x.numel() ** 0.5
        scale = max(abs(expected), abs(measured), average, NOTHING * norm(tensors["d_y"]))
        errors.append(abs(measured - expected) / scale if scale else 0.0)
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def slope(function: Callable[[Tensors], Tensor], tensors: Tensors, name: str, v: Tensor) -> float:
    """d/dh Σ d_y ⊙ y(tensor + h v) at h = 0, from differences alone.

        f′(0) ≈ (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h
    is off by O(h⁴) from the formula and by O(ε / h) from rounding. The best h depends on the function, so several are
    tried; where two neighbours agree best, both errors are small, and the finer of the two is taken.
    """
    x, d_y = tensors[name], tensors["d_y"]

    def at(h: float) -> Tensor:
        return function({**tensors, name: x + h * v})

    def estimate(h: float) -> float:
        # Differences come before the sum with d_y: what both sides share cancels exactly.
        near, far = at(h) - at(-h), at(2 * h) - at(-2 * h)
        return float((d_y * (8 * near - far)).sum()) / (12 * h)

    estimates = [estimate(h) for h in STEPS]
    return min(pairwise(estimates), key=lambda pair: abs(pair[1] - pair[0]))[1]
