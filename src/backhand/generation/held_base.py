"""The choice between a dense base and one in the blocks of its file, by the free memory.

Training makes this choice together with its micro-batches (`engines.memory.plan`). Evaluation and answering many
prompts at once use dense weights if they fit, because a quantized matrix is unpacked in every pass. Answering one
prompt at a time does not: its products read blocks faster than dense numbers (`kernels.few_rows`), and loading is
faster.
"""

from __future__ import annotations

import math

import torch

from backhand.kernels.builds import library
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import BaseModelOptions
from backhand.system import available_bytes

_SHARE_OF_FREE = 0.9
"""Share of the free memory for dense weights. The rest is for keys, values and activations."""


def stays_quantized(
    options: BaseModelOptions,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    one_at_a_time: bool = False,
) -> bool:
    """Return True if the matrices of a model for generation stay quantized.

    Args:
        options: `base` and `quantize` as requested.
        one_at_a_time: it will answer one prompt after the other.
    """
    if options.base != "auto" or options.quantize is not None:
        return options.base == "quantized" or options.quantize is not None
    if not source.quantized or device.type != "cpu":
        return False
    if one_at_a_time and library() is not None:
        return True
    free = available_bytes()
    return free is not None and weight_bytes(source, dtype, quantized=False) > _SHARE_OF_FREE * free


def weight_bytes(source: ModelSource, dtype: torch.dtype, *, quantized: bool) -> int:
    """Return the bytes of all weights, in the compute dtype or as stored.

    Keys and values of a short answer and the adapter are small in comparison.
    """
    names = source.tensor_names()
    if quantized:
        return sum(source.stored_bytes(name) for name in names)
    return sum(math.prod(source.shape(name)) for name in names) * dtype.itemsize
