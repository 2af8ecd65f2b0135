"""Buffers that every block's forward pass fills and leaves behind: the normed streams and the MLP's product.

If each block allocated its own, they would be freed between tensors that are kept for the backward pass, and their gaps
in the allocator's heap would rarely be filled: a freed gap does not even fit a tensor of its own size, since aligned
allocations ask for a little more. Over 30 blocks of SmolLM2 with 1,024 tokens in float32 the gaps come to 80 MB of 900.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """One buffer a name, for one pass; what a name held is lost as soon as it is asked for again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, of `like`'s dtype and device."""
        elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < elements:
            buffer = self._buffers[name] = torch.empty(elements, dtype=like.dtype, device=like.device)
        return buffer[:elements].view(*shape)
