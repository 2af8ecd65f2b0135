"""Whether a base is held dense in the memory that is free, or stays in its file's own blocks.

Training plans this with its micro-batches (`training.memory.plan`). What measures or answers many prompts at once
takes dense weights where they fit, since a quantized matrix is unpacked for every pass. What answers a prompt at a time
does not: its products read blocks faster than the dense numbers (`kernels.few_rows`), and there is nothing to load.
"""

from __future__ import annotations

import math

import torch

from backhand.kernels.builds import library
from backhand.nn.available_memory import available_bytes
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import BaseModelOptions

_SHARE_OF_FREE = 0.9
"""Of the free memory, for dense weights; the rest is for keys, values and what is at work."""


def stays_quantized(
    options: BaseModelOptions,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    one_at_a_time: bool = False,
) -> bool:
    """Whether the matrices of a model that answers stay as they are stored.

    Args:
        options: `base` and `quantize` as asked for.
        one_at_a_time: whether it will answer one prompt after the other.
    """
    if options.base != "auto" or options.quantize is not None:
        return options.base == "quantized" or options.quantize is not None
    if not source.quantized or device.type != "cpu":
        return False
    if one_at_a_time and library() is not None:
        return True
    free = available_bytes()
    return free is not None and held_bytes(source, dtype, quantized=False) > _SHARE_OF_FREE * free


def held_bytes(source: ModelSource, dtype: torch.dtype, *, quantized: bool) -> int:
    """Bytes of all weights, in the compute dtype or as they are stored.

    Keys and values of a short answer and its adapter are small beside it.
    """
    names = source.tensor_names()
    if quantized:
        return sum(source.stored_bytes(name) for name in names)
    return sum(math.prod(source.shape(name)) for name in names) * dtype.itemsize
