"""Allocate memory in large pages where the system has them, since small pages cost many address translations.

A page of 4 KiB must be translated whenever a row of a matrix lies on another page, and again after its translation was
evicted. The cost depends on the machine: it is low if the system runs on it directly, and high in a virtual machine
whose own memory is fragmented. There a float32 step took 1.1 to 1.5 times as long as in pages of 2 MiB (docs/log.md).

The heap. torch allocates weights, activations and gradients by glibc's malloc. That asks the system for the next piece
of the heap in small pages, unless the environment requested large ones before the process started (GLIBC_TUNABLES,
glibc.malloc.hugetlb). The heap is therefore extended once to the free memory's size, and the system asked for large
pages in it. Only addresses are reserved: a page is allocated when it is first written to, as always.

malloc itself extends the heap, and `sbrk(0)` only returns its end. No other call tells which addresses malloc has just
taken, and moving the end by `sbrk` would leave a hole that malloc never fills. Memory freed at the end stays part of
the heap, since `nn.compute` configures malloc to return nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from backhand.system import memory_limits

_LARGE_PAGE = 2 << 20
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_BY_HEURISTIC_OR_ALWAYS = ("0", "1")


def in_large_pages(elements: int, dtype: torch.dtype) -> Tensor:
    """Allocate (elements,) in the processor's memory, uninitialised."""
    size = elements * dtype.itemsize
    if sys.platform == "linux" and size >= _LARGE_PAGE:
        try:
            room = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            room.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # there are no large pages, or no memory, which torch reports
            return torch.empty(elements, dtype=dtype)
        begin = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % _LARGE_PAGE
        return torch.frombuffer(room, dtype=dtype, count=elements, offset=begin)
    return torch.empty(elements, dtype=dtype)


def grow_heap_in_large_pages(largest_bytes: int, length_bytes: int) -> bool:
    """Extend the heap of glibc in large pages, and return True if that succeeded.

    It is not extended where reserved addresses count as memory: under a limit of the process (ulimit -v, -d), or if the
    system does not overcommit (vm.overcommit_memory 2). Nor is it if the system's large pages exceed 2 MiB.

    Args:
        largest_bytes: the size from which on glibc allocates buffers outside the heap (M_MMAP_THRESHOLD).
        length_bytes: the most bytes by which the heap is extended.
    """
    _heap.piece_bytes, _heap.pieces = largest_bytes // 2, length_bytes // (largest_bytes // 2)
    return grow_heap_again()


def grow_heap_again() -> bool:
    """Extend the heap once more if its end was returned to the system; do nothing if it was never extended."""
    if sys.platform != "linux" or not _heap.pieces or not _may_take_addresses():
        return False
    libc = _libc()
    begin, pieces = int(libc.sbrk(0)), []
    for _ in range(_heap.pieces):
        piece = libc.malloc(_heap.piece_bytes)
        if piece is None:
            break
        pieces.append(piece)
        if not begin <= piece + _heap.piece_bytes <= libc.sbrk(0):
            break  # the piece fitted into the heap, or malloc used another heap, such as a thread's
    first, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, int(libc.sbrk(0))
    advised = end > first and libc.madvise(first, end - first, mmap.MADV_HUGEPAGE) == 0
    for piece in pieces:
        libc.free(piece)
    return bool(advised)


class _Heap:
    """The number and size of the pieces by which the heap is extended."""

    pieces = piece_bytes = 0


_heap = _Heap()


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    libc.sbrk.argtypes = (ctypes.c_ssize_t,)
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _may_take_addresses() -> bool:
    if memory_limits() != (None, None):
        return False
    with suppress(OSError, ValueError):
        promised = _OVERCOMMIT.read_text(encoding="ascii").strip() in _BY_HEURISTIC_OR_ALWAYS
        return promised and int(_SIZE.read_text(encoding="ascii")) <= _LARGE_PAGE
    return False
