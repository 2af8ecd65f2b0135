"""What the process itself takes: interpreter, libraries, tokenizer and rows, measured where they are all there."""

from __future__ import annotations

import torch

from backhand.nn.compute import release_freed_memory
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.train.config import OptimizationOptions
from backhand.train.memory import rss_bytes
from backhand.train.optimizer import AdapterOptimizer

_SIZE = 8


def settled_rss_bytes(dtype: torch.dtype) -> int:
    """Resident memory now, once everything is loaded that a step loads when it is first taken.

    The optimizer and matrix libraries read their code as they are first called; whatever is loaded before the
    measurement need not be guessed. What an earlier model of this process has left behind as freed
    memory is given back first: a step will use it, and it would be counted twice.

    Args:
        dtype: the compute dtype.
    """
    lora = LoRAParameters([LoRASlot("warm_up", _SIZE, _SIZE, 1, 1.0)])
    AdapterOptimizer(lora, OptimizationOptions()).step(0.0)
    x = torch.ones(_SIZE * _SIZE, _SIZE * _SIZE, dtype=dtype)
    (x @ x).softmax(-1).sum()
    release_freed_memory()
    return rss_bytes()
