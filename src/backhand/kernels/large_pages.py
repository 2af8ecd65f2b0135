"""Working memory in large pages, where the system has such: small ones are looked up too often."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20


def in_large_pages(elements: int, dtype: torch.dtype) -> Tensor:
    """(elements,) in the processor's own memory, uninitialised."""
    size = elements * dtype.itemsize
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= _LARGE_PAGE:
        try:
            room = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            room.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a system without them, or without the memory: torch says which
            return torch.empty(elements, dtype=dtype)
        begin = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % _LARGE_PAGE
        return torch.frombuffer(room, dtype=dtype, count=elements, offset=begin)
    return torch.empty(elements, dtype=dtype)
