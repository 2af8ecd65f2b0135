"""Allocations of torch that end before marked bytes, so that a kernel which writes past its buffer is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MARK = 0xA5
_FEWEST_BYTES = 4096


@contextmanager
def guarded_allocations() -> Iterator[Callable[[], list[tuple[int, ...]]]]:
    """Inside, `torch.empty` marks the memory after what it gives, at least three times as much.

    Yields:
        a function that returns the shapes of the tensors after which something was written.
    """
    plain, guards = torch.empty, []

    def guarded(*size: Any, **options: Any) -> Tensor:
        shaped = plain(*size, **{**options, "device": "meta"})
        if torch.device(options.get("device") or "cpu").type != "cpu" or options.get("out") is not None:
            return plain(*size, **options)
        count = shaped.numel() * shaped.element_size()
        memory = plain(4 * count + _FEWEST_BYTES, dtype=torch.uint8)
        memory[count:] = MARK
        guards.append((tuple(shaped.shape), memory[count:]))
        return memory[:count].view(shaped.dtype).view(shaped.shape)

    torch.empty = guarded
    try:
        yield lambda: [shape for shape, guard in guards if not guard.eq(MARK).all()]
    finally:
        torch.empty = plain
