"""How far a tensor is from the truth, and two ways to the truth of gradients that know nothing of our backward passes.

The measures are the relative norm error, and the row where it is worst; the ways autograd, and finite differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

Tensors = dict[str, Tensor]

# Further out, a decoder's course is so bent that nothing is gained there: two wrong estimates once agreed by chance.
FIRST_STEP = 0.0016  # times the inputs' own size where that is above 1
# Enough to come down to 1e-7: along its own gradient a whole decoder changes its course within 1e-5, and experts
# change places within 1e-4. What is straighter is done after a few.
LEVELS = 8
STEP_RATIO = 4
HIGHEST_ORDER = 5
# Estimated error at which to stop: far below what any mistake makes.
ACCURATE = 1e-10
DIRECTIONS = 2
# Below this share of the upstream gradient a gradient counts as zero by nature: rounding is all that is left of it.
NOTHING = 1e-6


class WorstRow(NamedTuple):
    """position: of the row, over all axes but the last; error: the norm of its difference."""

    position: tuple[int, ...]
    error: float

    def __str__(self) -> str:
        """E.g. `row 2, 1: off by 3.1e-07`."""
        where = ", ".join(str(i) for i in self.position)
        return f"row {where}: off by {self.error:.1e}" if where else f"off by {self.error:.1e}"


def relative_error(measured: Tensor, truth: Tensor, zero_scale: float = 0.0) -> float:
    """‖measured - truth‖ / ‖truth‖ in float64.

    0 for two empty or two zero tensors; infinite where only the truth is zero, or the shapes differ; NaN as soon as
    one element of either is NaN or infinite, so that no bound accepts it.

    Args:
        zero_scale: what stands for ‖truth‖ where that is exactly zero. A gradient that is zero by nature (of the query
            of a one-token document, say) comes out as a sum that cancels to rounding, which is small against this only.
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


def typical(errors: Sequence[float]) -> float:
    """The geometric mean of errors of near inputs; NaN where one of them is."""
    if any(math.isnan(error) for error in errors):
        return math.nan
    return statistics.geometric_mean(max(error, 1e-300) for error in errors)


def norm(tensor: Tensor) -> float:
    """The Euclidean norm over all elements, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))


def worst_row(measured: Tensor, truth: Tensor) -> WorstRow | None:
    """The row with the largest difference, or the first not finite one; None for empty or differently shaped tensors.

    A row is what all axes but the last index; a vector has one element a row, a single number the row ().
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

    D(h) = (f(h) - f(-h)) / 2h has an error of c₂h² + c₄h⁴ + …; from D(h) and D(h/4) the first term can be eliminated,
    (16 D(h/4) - D(h)) / 15, from two such results the next, and so on. A smaller h costs accuracy by rounding, ε / h;
    each elimination gains some until the series stops helping; of all results the one is taken that differs least from
    the two that it was made of.      [C. Ridders, Adv. Eng. Software 4 (1982) 75]
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
        row = [difference(first / STEP_RATIO**level)]
        for order, coarser in enumerate(above[:HIGHEST_ORDER], start=1):
            factor = STEP_RATIO ** (2 * order)
            row.append((factor * row[-1] - coarser) / (factor - 1))
            uncertainty = max(abs(row[-1] - row[-2]), abs(row[-1] - coarser))
            if uncertainty < smallest:
                best, smallest = row[-1], uncertainty
        if smallest <= ACCURATE * abs(best):
            break
        above = row
    return best


# ---------------------------------------------------------------------------------------------------------------------
# One gradient by hand against one by autograd: exact | approximate | largest difference.


RELATIVE_TOLERANCE = 1e-5
ABSOLUTE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `print(comparison)` gives the line `name | exact | approximate | largest difference`.

    Attributes:
        name: what was compared.
        exact: every element equal.
        approximate: every element within 1e-5 relative or 1e-8 absolute (torch.allclose's own tolerances).
        largest_difference: over all elements; NaN where one is NaN or the shapes differ.
        relative_error: ‖by_hand - autograd‖ / ‖autograd‖, which, unlike `approximate`, means the same for gradients of
            any size; NaN or infinite where it is undefined.
        shape: of the gradient by hand.
        note: what makes a comparison impossible or unusual (shapes, NaN), else empty.
    """

    name: str
    exact: bool
    approximate: bool
    largest_difference: float
    relative_error: float
    shape: tuple[int, ...]
    note: str = ""

    def __str__(self) -> str:
        """The line that the experiment prints for each gradient."""
        line = (
            f"{self.name:<15} | exact: {self.exact!s:5} | approximate: {self.approximate!s:5} "
            f"| maxdiff: {self.largest_difference:.6g}"
        )
        return f"{line} | {self.note}" if self.note else line


def compare(name: str, by_hand: Tensor | ArrayLike | None, autograd: Tensor | ArrayLike | None) -> Comparison:
    """Compare a gradient worked out by hand with autograd's.

    Args:
        name: for the printed line.
        by_hand: any tensor, or what `torch.as_tensor` makes one of.
        autograd: the gradient to compare with, or the tensor that autograd differentiated for: one that requires a
            gradient and has received it stands for its `.grad`, so that `compare("dA", dA, A)` works after
            `loss.backward()`.

    Neither device nor dtype need agree (numbers are compared by value, in float64 or complex128); shapes must, since
    broadcasting would hide a mistake. Nothing is raised for tensors that cannot agree: the result says why in `note`.
    A gradient that is None, as autograd leaves it where nothing was differentiated, agrees with nothing.
    """
    if by_hand is None or autograd is None:
        side = "by hand" if by_hand is None else "autograd"
        return Comparison(name, False, False, math.nan, math.inf, (), f"{side} is None: there is no gradient")
    truth, measured = _values(_gradient_of(torch.as_tensor(autograd))), _values(torch.as_tensor(by_hand))
    shape = tuple(measured.shape)
    if measured.shape != truth.shape:
        note = f"shapes differ: by hand {shape}, autograd {tuple(truth.shape)}"
        return Comparison(name, False, False, math.nan, math.inf, shape, note)
    if not measured.numel():
        return Comparison(name, True, True, 0.0, 0.0, shape, "empty")
    equal = measured == truth
    # Equal infinities differ by nothing, though their difference is NaN.
    difference = torch.where(equal, 0.0, (measured - truth).abs())
    undefined = int((measured.isnan() | truth.isnan()).sum())
    near = torch.allclose(measured, truth, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)
    error, note = _relative(measured, truth), f"{undefined} NaN" if undefined else ""
    return Comparison(name, bool(equal.all()), near, float(difference.max()), error, shape, note)


def _gradient_of(tensor: Tensor) -> Tensor:
    """The tensor's own gradient where it has received one, else the tensor."""
    if tensor.requires_grad and (tensor.is_leaf or tensor.retains_grad) and tensor.grad is not None:
        return tensor.grad
    return tensor


def _values(tensor: Tensor) -> Tensor:
    """The tensor's numbers on the CPU in a dtype that holds those of every narrower one."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.to(device="cpu", dtype=torch.complex128 if tensor.is_complex() else torch.float64)


def _relative(measured: Tensor, truth: Tensor) -> float:
    if not measured.is_complex() and not truth.is_complex():
        return relative_error(measured, truth)
    return relative_error(
        torch.view_as_real(measured.to(torch.complex128)), torch.view_as_real(truth.to(torch.complex128))
    )
