"""A limit of addresses for a process that an earlier run may have left a long heap."""

from __future__ import annotations

import resource
from pathlib import Path

from backhand.kernels import large_pages
from backhand.nn.compute import release_freed_memory


def address_space() -> int:
    """Bytes of addresses that this process has taken."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def limit_addresses(more_bytes: int) -> None:
    """This process may take so many more bytes of addresses than it needs now.

    The free end of a long heap (`kernels.large_pages`) would be taken within any limit: it is given back before.
    """
    large_pages._heap.pieces = 0
    release_freed_memory()
    most = address_space() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
