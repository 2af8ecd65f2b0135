"""Two ways to differentiate that know nothing of our backward passes: autograd, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from backhand.verify.measure import norm
from backhand.verify.scaffold import Tensors

# Further out, a decoder's course is so bent that nothing is gained there: two wrong estimates once agreed by chance.
FIRST_STEP = 0.05 / 32  # times the inputs' own size where that is above 1
# Enough to come down to 2e-7: along its own gradient a whole decoder changes its course within 1e-5, and experts
# change places within 1e-4. What is straighter is done after a few.
LEVELS = 14
HIGHEST_ORDER = 5
# Estimated error at which to stop: far below what any mistake makes.
ACCURATE = 1e-10
DIRECTIONS = 2
# Below this share of the upstream gradient a gradient counts as zero by nature: rounding is all that is left of it.
NOTHING = 1e-6


def autograd_gradients(
    function: Callable[[Tensors], Tensor], tensors: Tensors, names: Iterable[str]
) -> tuple[Tensor, Tensors]:
    """y = function(tensors), and ∂(Σ d_y ⊙ y)/∂tensor for each name by autograd; zeros where y has none of it."""
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
    function: Callable[[Tensors], Tensor], tensors: Tensors, gradients: Tensors, seed: int = 0
) -> float:
    """How far gradients are from finite differences of the function: the largest error over several directions.

    For a direction v in the space of the inputs that have a gradient here, the slope of f(h) = Σ d_y ⊙ y(inputs + h v)
    at 0 is ⟨gradient, v⟩; see `slope`. The first direction is the gradient itself, where a wrong size shows at its
    fullest; the others are random, where anything missing from the gradient shows. The error is relative to the slope
    that a random direction has on average, ‖gradient‖ ‖v‖ / √n, or to the slope itself if that is larger.

    Args:
        function: y from tensors, in float64 and smooth around them.
        gradients: the gradients on trial, by the name of their input; all these inputs vary together.

    Returns:
        0 for inputs without elements; NaN if anything is not finite.
    """
    count = sum(gradient.numel() for gradient in gradients.values())
    if not count:
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    size = math.hypot(*(norm(gradient) for gradient in gradients.values()))
    errors = []
    for number in range(DIRECTIONS):
        v = {
            name: torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient.device)
            for name, gradient in gradients.items()
        }
        if number == 0 and size > 0:
            v = {name: gradient * (math.sqrt(count) / size) for name, gradient in gradients.items()}
        measured = slope(function, tensors, v)
        expected = sum(float((gradient * v[name]).sum()) for name, gradient in gradients.items())
        average = size * math.hypot(*(norm(part) for part in v.values())) / math.sqrt(count)
        scale = max(abs(expected), abs(measured), average, NOTHING * norm(tensors["d_y"]))
        errors.append(abs(measured - expected) / scale if scale else 0.0)
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def slope(function: Callable[[Tensors], Tensor], tensors: Tensors, v: Tensors) -> float:
    """d/dh Σ d_y ⊙ y(inputs + h v) at h = 0, from differences alone, by Ridders' method.

    D(h) = (f(h) - f(-h)) / 2h has an error of c₂h² + c₄h⁴ + …; from D(h) and D(h/2) the first term can be eliminated,
    (4 D(h/2) - D(h)) / 3, from two such results the next, and so on. Halving h costs accuracy by rounding, ε / h; each
    elimination gains some until the series stops helping; of all results the one is taken that differs least from the
    two that it was made of.      [C. Ridders, Adv. Eng. Software 4 (1982) 75]
    """

    def at(h: float) -> Tensor:
        return function(tensors | {name: tensors[name] + h * direction for name, direction in v.items()})

    def difference(h: float) -> float:
        # The difference comes before the sum with d_y: what both sides share cancels exactly.
        return float((tensors["d_y"] * (at(h) - at(-h))).sum()) / (2 * h)

    count = sum(tensors[name].numel() for name in v)
    first = FIRST_STEP * max(1.0, math.hypot(*(norm(tensors[name]) for name in v)) / math.sqrt(count))
    best, smallest = math.nan, math.inf
    above: list[float] = []
    for level in range(LEVELS):
        row = [difference(first / 2**level)]
        for order, coarser in enumerate(above[:HIGHEST_ORDER], start=1):
            row.append((4**order * row[-1] - coarser) / (4**order - 1))
            uncertainty = max(abs(row[-1] - row[-2]), abs(row[-1] - coarser))
            if uncertainty < smallest:
                best, smallest = row[-1], uncertainty
        if smallest <= ACCURATE * abs(best):
            break
        above = row
    return best
