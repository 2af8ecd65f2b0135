"""Arrays as views of marked memory: at odd addresses, gaps after rows, and a check of the memory outside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MARK = 7.25
"""The memory around a result that a loop writes."""

_drawn: dict[int, Tensor] = {}


def gapped(shape: Sequence[int], dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    """Numbers at an odd address, a gap of odd width after each row."""
    *leading, n = shape
    whole = torch.full((math.prod(leading) * (n + 3) + 1,), MARK, dtype=dtype)[1:].view(*leading, n + 3)
    part = whole[..., 1 : n + 1]
    part.copy_(size * _normal(part.numel(), seed).view(part.shape))
    return part


def _normal(count: int, seed: int) -> Tensor:
    """The first of the seed's numbers, float64; to draw them for each array took a quarter of the kernels' tests."""
    drawn = _drawn.get(seed)
    if drawn is None or len(drawn) < count:
        more = count if drawn is None else max(count, 2 * len(drawn))
        drawn = _drawn[seed] = torch.from_numpy(np.random.default_rng(seed).standard_normal(more))
    return drawn[:count]


def marks_intact(part: Tensor) -> bool:
    """Whether nothing but the part itself has been written to."""
    base = part._base if part._base is not None else part
    everything = base.as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0)
    outside = torch.ones_like(everything, dtype=torch.bool)
    outside.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(False)
    return bool((everything[outside] == MARK).all())
