"""How a run computes: the settings of `backhand.nn.compute`."""

from __future__ import annotations

from backhand.nn.compute import (
    available_cores,
    compute_settings,
    keep_freed_memory,
    lossless_medium_precision,
    resolve_device,
    resolve_dtype,
    resolve_threads,
)

__all__ = [
    "available_cores",
    "compute_settings",
    "keep_freed_memory",
    "lossless_medium_precision",
    "resolve_device",
    "resolve_dtype",
    "resolve_threads",
]
