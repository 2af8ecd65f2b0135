"""Measuring takes longer than a tiny run's steps, so that tests measure less.

What a step holds is measured once for all runs of a test session that are alike, which is what decides the tensors that
a pass makes, and how large they are; tests about memory measure anew. What is forgotten is measured on two of the four
neutral texts.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from backhand.data import held_out
from backhand.engines import memory_probe as probe
from backhand.engines.engine import ShortModel
from backhand.engines.memory.parts import StepBytes
from backhand.kernels.builds import library
from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.ops.weight_tiles import drop_scratch

_measure = probe.step_bytes
_STORE = "BACKHAND_TESTS_MEASURED"
if _STORE not in os.environ:  # the first process of a session has it until it ends, for all that it starts
    _directory = tempfile.TemporaryDirectory(prefix="backhand-measured-")
    os.environ[_STORE] = _directory.name


def step_bytes(short: ShortModel, *shape: Any) -> StepBytes:
    """As `probe.step_bytes`."""
    key = _decisive(short.model), *((_decisive(more.model), *more[1:]) for more in short.more), *shape
    kept = Path(os.environ[_STORE]) / hashlib.sha256(repr(key).encode()).hexdigest()
    if not kept.exists():
        fresh = kept.with_suffix(f".{os.getpid()}")
        drop_scratch()  # what an earlier run has made would not count
        fresh.write_text(json.dumps(_measure(short, *shape)))
        fresh.replace(kept)
    return StepBytes(*json.loads(kept.read_text()))


def two_neutral_texts() -> list[str]:
    """The first of `held_out.neutral_texts`; still two, so that processes can share them."""
    return held_out.neutral_texts()[:2]


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
    return repr(
        (model.config, model.recompute, model.dtype, frozen, model.lora.slots, model.lora.full_tensors, machine)
    )
