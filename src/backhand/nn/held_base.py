"""How much memory is free, and whether a base is held dense in it or stays in its file's own blocks.

Training plans this with its micro-batches (`training.memory.bases`). What measures or answers many prompts at once
takes dense weights where they fit, since a quantized matrix is unpacked for every pass. What answers a prompt at a time
does not: its products read blocks faster than the dense numbers (`kernels.few_rows`), and there is nothing to load.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from backhand.kernels.library import library
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import BaseModelOptions

_PAGE_BYTES = resource.getpagesize()
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
        source: the opened base model.
        dtype: the compute dtype.
        device: where to compute.
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


def available_bytes(root: Path = Path("/")) -> int | None:
    """What may still be allocated: free memory, within the limits of the control groups; None where it is not known.

    Args:
        root: where /proc and /sys are, for tests.
    """
    amounts = list(_group_bytes(root))
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        amounts.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            amounts.append(max(0, soft - pages * _PAGE_BYTES))
    return min(amounts) if amounts else None


def _group_bytes(root: Path) -> Iterator[int]:
    """What each control group that this process is in, and those around it, leaves."""
    memberships = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory") or "memory" in controllers.split(","):
                memberships.append(group.strip("/"))
    for base, limit_file, used_file, cache_name in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        # In a container the file system's root is often the container's own group, whatever its name is outside.
        for group in {"", *memberships}:
            for around in (Path(group), *Path(group).parents):
                directory = root / base / around
                with suppress(OSError, ValueError):
                    limit = int((directory / limit_file).read_text(encoding="ascii"))
                    used = int((directory / used_file).read_text(encoding="ascii"))
                    yield max(0, limit - max(0, used - _cached_bytes(directory, cache_name)))


def _cached_bytes(directory: Path, name: str) -> int:
    """What a group uses for files that nobody has looked at lately: it is given back when memory is asked for."""
    with suppress(OSError, ValueError):
        for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
