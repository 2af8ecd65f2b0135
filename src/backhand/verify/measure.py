"""Errors of tensors, and gradients by autograd and finite differences, which use no backward pass of ours.

Errors are relative norm errors, with the row of the largest difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# With larger steps a decoder is too nonlinear for an estimate: two wrong estimates once agreed by chance.
FIRST_STEP = 0.0016  # multiplied by the inputs' size if that is above 1
# Enough levels for steps down to 1e-7. Along its gradient a whole decoder changes its slope within 1e-5, and the choice
# of experts changes within 1e-4. Smoother functions stop after a few levels.
LEVELS = 8
STEP_RATIO = 4
HIGHEST_ORDER = 5
# Estimated error at which to stop, far below the effect of any mistake.
STOP_ERROR = 1e-10
DIRECTIONS = 2
# A gradient below this share of the upstream gradient counts as zero, since only rounding errors are left of it.
ZERO_SHARE = 1e-6


class WorstRow(NamedTuple):
    """The row with the largest difference."""

    position: tuple[int, ...]  # index of the row, over all axes but the last
    error: float  # norm of the row's difference

    def __str__(self) -> str:
        """Format the row, e.g. `row 2, 1: off by 3.1e-07`."""
        where = ", ".join(str(i) for i in self.position)
        return f"row {where}: off by {self.error:.1e}" if where else f"off by {self.error:.1e}"


def relative_error(measured: Tensor, truth: Tensor, zero_scale: float = 0.0) -> float:
    """Return ‖measured - truth‖ / ‖truth‖ in float64.

    The result is 0 for two empty or two zero tensors. It is infinite if only the truth is zero, or if the shapes
    differ. It is NaN if any element is NaN or infinite, so that no bound accepts it.

    Args:
        zero_scale: replaces ‖truth‖ if that is exactly zero. Some gradients are zero by definition, such as that of the
            query of a one-token document. They are computed as sums that cancel up to rounding errors, which are small
            only in comparison with this scale.
    """
    if measured.shape != truth.shape:
        return math.inf
    difference = norm(measured.double() - truth.double())
    size = norm(truth) or zero_scale
    if not math.isfinite(difference) or not math.isfinite(size):
        return math.nan
    if difference == 0.0:
        return 0.0
    return difference / size if size else math.inf


def geometric_mean(errors: Sequence[float]) -> float:
    """Return the geometric mean of errors, NaN if one of them is NaN."""
    if any(math.isnan(error) for error in errors):
        return math.nan
    return statistics.geometric_mean(max(error, 1e-300) for error in errors)


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm over all elements, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))


def worst_row(measured: Tensor, truth: Tensor) -> WorstRow | None:
    """Return the row with the largest difference, or the first row with a difference that is not finite.

    A row is indexed by all axes but the last. Each element of a vector is a row, and a scalar is the row (). The
    result is None for empty tensors and for tensors of different shapes.
    """
    if measured.shape != truth.shape or not measured.numel():
        return None
    difference = measured.double() - truth.double()
    if difference.ndim < 2:
        errors = difference.abs()
    else:
        errors = torch.linalg.vector_norm(difference, dim=-1)
    flat = torch.where(errors.isfinite(), errors, math.inf).reshape(-1)
    largest = flat.argmax()
    position = tuple(int(i) for i in torch.unravel_index(largest, errors.shape))
    return WorstRow(position, float(flat[largest]))


def autograd_gradients(
    function: Callable[[Tensors], Tensor], tensors: Tensors, names: Iterable[str]
) -> tuple[Tensor, Tensors]:
    """Return y = function(tensors), and ∂(Σ d_y ⊙ y)/∂tensor for each name by autograd.

    A gradient is zero if y does not depend on the tensor.
    """
    names = tuple(names)
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        y = function({**tensors, **leaves})
    gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if y.requires_grad:
        d_y = tensors["d_y"].to(y.dtype).expand(y.shape)
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(y, list(leaves.values()), d_y, allow_unused=True)
        gradients |= {name: gradient for name, gradient in zip(names, grads, strict=True) if gradient is not None}
    return y.detach(), gradients


def difference_error(
    function: Callable[[Tensors], Tensor], tensors: Tensors, gradients: Tensors, seed: int = 0
) -> float:
    """Return the largest error of gradients against finite differences of the function, over several directions.

    For a direction v in the space of all inputs with a gradient, the slope of f(h) = Σ d_y ⊙ y(inputs + h v) at 0 is
    ⟨gradient, v⟩, see `slope`. The first direction is the gradient itself, which reveals a wrong size best. The others
    are random, which reveals missing parts. The error is relative to the average slope in a random direction,
    ‖gradient‖ ‖v‖ / √n, or to the slope itself if that is larger.

    Args:
        function: y from tensors, in float64 and smooth around them.
        gradients: the gradients to check, by the name of their input. All these inputs vary together.

    Returns:
        The error, 0 for inputs without elements, NaN if any value is not finite.
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
        scale = max(abs(expected), abs(measured), average, ZERO_SHARE * norm(tensors["d_y"]))
        errors.append(abs(measured - expected) / scale if scale else 0.0)
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def slope(function: Callable[[Tensors], Tensor], tensors: Tensors, v: Tensors) -> float:
    """Compute d/dh Σ d_y ⊙ y(inputs + h v) at h = 0 from finite differences, by Ridders' method.

    D(h) = (f(h) - f(-h)) / 2h has an error of c₂h² + c₄h⁴ + …. The first term is eliminated from D(h) and D(h/4) by
    (16 D(h/4) - D(h)) / 15, the next term from two such results, and so on. A smaller h loses accuracy to rounding,
    ε / h, and each elimination gains accuracy until the series stops converging. The result is the estimate that
    differs least from the two that it was computed from.      [C. Ridders, Adv. Eng. Software 4 (1982) 75]
    """

    def at(h: float) -> Tensor:
        return function(tensors | {name: tensors[name] + h * direction for name, direction in v.items()})

    def difference(h: float) -> float:
        # Subtracting before the sum with d_y cancels everything that both sides share exactly.
        return float((tensors["d_y"] * (at(h) - at(-h))).sum()) / (2 * h)

    count = sum(tensors[name].numel() for name in v)
    first = FIRST_STEP * max(1.0, math.hypot(*(norm(tensors[name]) for name in v)) / math.sqrt(count))
    best, smallest = math.nan, math.inf
    above: list[float] = []
    for level in range(LEVELS):
        row = [difference(first / STEP_RATIO**level)]
        for order, coarser in enumerate(above[:HIGHEST_ORDER], start=1):
            factor = STEP_RATIO ** (2 * order)
            row.append((factor * row[-1] - coarser) / (factor - 1))
            uncertainty = max(abs(row[-1] - row[-2]), abs(row[-1] - coarser))
            if uncertainty < smallest:
                best, smallest = row[-1], uncertainty
        if smallest <= STOP_ERROR * abs(best):
            break
        above = row
    return best
