"""The process's own resident memory, measured after everything that a training step loads has been loaded."""

from __future__ import annotations

import torch

from backhand.loop.step import AdapterOptimizer
from backhand.nn.compute import release_freed_memory
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.options.config import OptimizationOptions
from backhand.system import rss_bytes

_SIZE = 8


def settled_rss_bytes(dtype: torch.dtype) -> int:
    """Return the resident memory in bytes once the code of a training step is loaded.

    The optimizer and matrix libraries load code at their first call. This function calls them, so that their memory is
    measured instead of guessed. It first returns the freed memory of an earlier model of this process to the system: a
    step will use that memory, and it would be counted twice.

    Args:
        dtype: the compute dtype of the run.
    """
    lora = LoRAParameters([LoRASlot("warm_up", _SIZE, _SIZE, 1, 1.0)])
    AdapterOptimizer(lora, OptimizationOptions()).step(0.0)
    x = torch.ones(_SIZE * _SIZE, _SIZE * _SIZE, dtype=dtype)
    (x @ x).softmax(-1).sum()
    release_freed_memory()
    return rss_bytes()
