"""The amount of memory that can still be allocated."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from backhand.system import free_bytes, memory_limits


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated within the limits of control groups, or None if unknown.

    Args:
        root: directory of /proc and /sys, for tests.
    """
    amounts = list(_group_bytes(root))
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        amounts.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    if (free := free_bytes()) is not None:
        amounts.append(free)
    addresses, _ = memory_limits()
    if addresses is not None:
        with suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            amounts.append(max(0, addresses - pages * mmap.PAGESIZE))
    return min(amounts) if amounts else None


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield the free bytes of each control group of this process and of its parents."""
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
        # In a container, the root of the file system is often the container's group, with another name outside.
        for group in {"", *memberships}:
            for ancestor in (Path(group), *Path(group).parents):
                directory = root / base / ancestor
                with suppress(OSError, ValueError):
                    limit = int((directory / limit_file).read_text(encoding="ascii"))
                    used = int((directory / used_file).read_text(encoding="ascii"))
                    yield max(0, limit - max(0, used - _cached_bytes(directory, cache_name)))


def _cached_bytes(directory: Path, name: str) -> int:
    """Return the bytes of a group's inactive file cache, which the system releases on demand."""
    with suppress(OSError, ValueError):
        for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
