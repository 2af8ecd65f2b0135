"""What a tiny run measures takes longer than its steps: here it measures less.

What a step holds is measured once for all runs of a test process that are alike, which is what decides the tensors that
a pass makes, and how large they are; tests about memory measure anew. What is forgotten is measured on one of the four
neutral texts.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from backhand.data import stored_examples
from backhand.kernels.builds import library
from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.training.engine import ShortModel
from backhand.training.memory import probe
from backhand.training.memory.parts import StepBytes

_measure = probe.step_bytes
_found: dict[Hashable, StepBytes] = {}


def step_bytes(short: ShortModel, *shape: Any) -> StepBytes:
    """As `probe.step_bytes`."""
    key = _decisive(short.model), *((_decisive(more.model), *more[1:]) for more in short.more), *shape
    if key not in _found:
        _found[key] = _measure(short, *shape)
    return _found[key]


def one_neutral_text() -> list[str]:
    """The first of `stored_examples.neutral_texts`."""
    return stored_examples.neutral_texts()[:1]


def _decisive(model: Any) -> str:
    frozen = [
        (
            name,
            [(part.type_id, part.blocks.shape, part.order is None, part.column_order is None) for part in weight.parts],
        )
        if isinstance(weight, QuantizedMatrix)
        else (name, weight.shape, weight.dtype)
        for name, weight in model.frozen_tensors()
    ]
    machine = model.device, torch.get_num_threads(), library() and library().name
    return repr((model.config, model.recompute, model.dtype, frozen, model.lora.slots, model.lora.trained, machine))
