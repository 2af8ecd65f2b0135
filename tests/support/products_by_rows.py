"""A library of products as one with AMX is: the number of rows decides in which order a sum is added up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor


def by_library(patch: pytest.MonkeyPatch) -> None:
    """Until it is undone, no product of a frozen matrix goes by a loop of ours, as where there are no tiles."""
    for module in ("backhand.kernels.dense_product", "backhand.ops.frozen_matrix"):
        patch.setattr(f"{module}.amx_available", lambda dtype: False)


class ProductsByRows:
    """Replaces `ops.frozen_matrix.library_product`, with classes of numbers of rows.

    Args:
        bounds: numbers of rows at which another class begins.

    Attributes:
        sizes: the number of rows of each product so far.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.sizes: list[int] = []

    def kind(self, rows: int) -> int:
        """The class of so many rows."""
        return sum(rows >= bound for bound in self.bounds)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """residual + x Wᵀ + bias; inputs are added up from both sides of a bound that is the class's own."""
        self.sizes.append(x.shape[0])
        cut = x.shape[1] // (2 + self.kind(x.shape[0]))
        wide = torch.float32
        # Input by input, so that torch's own library has no say in it; along an axis of its own numpy adds in order.
        columns, outputs = x.to(wide).T.contiguous(), weight.to(wide).T.contiguous()
        terms = (columns[:, :, None] * outputs[:, None, :]).numpy()
        y = torch.from_numpy(np.add.reduce(terms[:cut]) + np.add.reduce(terms[cut:]))
        for more in (residual, bias):
            y = y if more is None else y + more.to(wide)
        return y.to(x.dtype) if out is None else out.copy_(y)
