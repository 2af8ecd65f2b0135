"""Arrays as views of marked memory: at odd addresses, gaps behind rows, and whether anything outside was written to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MARK = 7.25
"""What stands around a result that a loop writes."""


def gapped(shape: Sequence[int], dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    """Numbers at an odd address, a gap of odd width behind each row."""
    *leading, n = shape
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((*leading, n + 3), MARK, dtype=dtype).flatten()
    whole = torch.cat([buffer.new_full((1,), MARK), buffer])[1:].view(*leading, n + 3)
    part = whole[..., 1 : n + 1]
    part.copy_(size * torch.randn(shape, generator=generator, dtype=torch.float64))
    return part


def marks_intact(part: Tensor) -> bool:
    """Whether nothing but the part itself has been written to."""
    base = part._base if part._base is not None else part
    everything = base.as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0)
    outside = torch.ones_like(everything, dtype=torch.bool)
    outside.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(False)
    return bool((everything[outside] == MARK).all())
