"""How far a tensor is from the truth: relative norm error, and the row where it is worst."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
        measured: on trial.
        truth: to compare with.
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
