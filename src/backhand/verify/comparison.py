"""Compare a gradient by hand with one by autograd: `backhand.compare`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from backhand.bounds import checked_arguments
from backhand.errors import UsageError, short_reason
from backhand.verify.measure import relative_error
from backhand.words import shown

RELATIVE_TOLERANCE = 1e-5
ABSOLUTE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`. `print(comparison)` prints `name | exact | approximate | largest difference`.

    Attributes:
        name: the name given to `compare`.
        exact: True if all elements are equal.
        approximate: True if every element is within 1e-5 relative or 1e-8 absolute (torch.allclose's tolerances).
        largest_difference: largest absolute difference, NaN if an element is NaN or the shapes differ.
        relative_error: ‖by_hand - autograd‖ / ‖autograd‖. Unlike `approximate`, it has the same meaning for gradients
            of any size. NaN or infinite if it is undefined.
        shape: shape of the gradient by hand.
        note: reason why the comparison is impossible or unusual (shapes, NaN), otherwise empty.
    """

    name: str
    exact: bool
    approximate: bool
    largest_difference: float
    relative_error: float
    shape: tuple[int, ...]
    note: str = ""

    def __str__(self) -> str:
        """Format the line that the sine experiment prints for each gradient."""
        line = (
            f"{self.name:<15} | exact: {self.exact!s:5} | approximate: {self.approximate!s:5} "
            f"| maxdiff: {self.largest_difference:.6g}"
        )
        return f"{line} | {self.note}" if self.note else line


@checked_arguments
def compare(name: str, by_hand: Tensor | ArrayLike | None, autograd: Tensor | ArrayLike | None) -> Comparison:
    """Compare a gradient computed by hand with autograd's gradient.

    Values are compared in float64 or complex128, so device and dtype may differ. Shapes must be equal, since
    broadcasting would hide a mistake. Tensors that cannot be compared raise no error; `note` gives the reason. A
    gradient of None, which autograd leaves for unused tensors, never agrees.

    Args:
        name: name for the printed line.
        by_hand: any tensor, or any argument of `torch.as_tensor`.
        autograd: the gradient to compare with, or a tensor with a `.grad`, which is then used. So
            `compare("dA", dA, A)` works after `loss.backward()`.

    Raises:
        UsageError: an argument is missing, or is neither a tensor nor an array.
    """
    if by_hand is None or autograd is None:
        side = "by hand" if by_hand is None else "autograd"
        return Comparison(name, False, False, math.nan, math.inf, (), f"{side} is None: there is no gradient")
    truth, measured = _values(_gradient_of(_tensor("autograd", autograd))), _values(_tensor("by_hand", by_hand))
    shape = tuple(measured.shape)
    if measured.shape != truth.shape:
        note = f"shapes differ: by hand {shape}, autograd {tuple(truth.shape)}"
        return Comparison(name, False, False, math.nan, math.inf, shape, note)
    if not measured.numel():
        return Comparison(name, True, True, 0.0, 0.0, shape, "empty")
    equal = measured == truth
    # Equal infinities have no difference, although subtracting them gives NaN.
    difference = torch.where(equal, 0.0, (measured - truth).abs())
    undefined = int((measured.isnan() | truth.isnan()).sum())
    near = torch.allclose(measured, truth, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)
    error, note = _relative(measured, truth), f"{undefined} NaN" if undefined else ""
    return Comparison(name, bool(equal.all()), near, float(difference.max()), error, shape, note)


def _tensor(name: str, value: Tensor | ArrayLike) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{name} {shown(value)} is no tensor",
            where=name,
            why=short_reason(error),
            next_step='give a name and two tensors: backhand.compare("dA", by_hand, autograd)',
        ) from None


def _gradient_of(tensor: Tensor) -> Tensor:
    """Return the tensor's `.grad` if it has one, otherwise the tensor."""
    if tensor.requires_grad and (tensor.is_leaf or tensor.retains_grad) and tensor.grad is not None:
        return tensor.grad
    return tensor


def _values(tensor: Tensor) -> Tensor:
    """Return the tensor's values on the CPU in float64 or complex128, dense and dequantized."""
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
