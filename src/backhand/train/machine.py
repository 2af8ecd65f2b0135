"""Where and how a run computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backhand.nn.compute import resolve_device, resolve_dtype, resolve_threads
from backhand.train.config import TrainConfig


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    threads: int


def resolve_machine(config: TrainConfig) -> Machine:
    """Device, dtype and threads. Raises UsageError for a device that cannot be used."""
    device = resolve_device(config.model)
    return Machine(device, resolve_dtype(config.model, device), resolve_threads(config.model))
