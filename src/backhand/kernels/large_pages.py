"""Memory in large pages, where the system has such: small ones are looked up too often.

A page of 4 KiB is looked up whenever a row of a matrix lies on another one, and again whenever it was forgotten. What a
look costs depends on the machine: little where the system runs on it alone, much in a virtual machine whose own memory
lies in small pieces. There a float32 step took 1.1 to 1.5 times as long as in pages of 2 MiB (docs/log.md).

The heap. Weights, activations and gradients are torch's, which has them from glibc's malloc, which asks the system for
the next piece of the heap, in small pages unless the environment said otherwise before the process began
(GLIBC_TUNABLES, glibc.malloc.hugetlb). So the heap is made as long as there is memory, at once, and the system asked
for large pages in it. Only addresses are taken: a page is there once it is first written to, as always.

The heap grows by malloc itself, and `sbrk(0)` only tells where it ends: nothing else says which addresses malloc has
just taken, and moving the end by `sbrk` ourselves would leave a hole that malloc never fills. What is freed at the end
stays part of the heap, since `nn.compute` has told malloc to give nothing back.
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
    """(elements,) in the processor's own memory, uninitialised."""
    size = elements * dtype.itemsize
    if sys.platform == "linux" and size >= _LARGE_PAGE:
        try:
            room = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            room.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a system without them, or without the memory: torch says which
            return torch.empty(elements, dtype=dtype)
        begin = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % _LARGE_PAGE
        return torch.frombuffer(room, dtype=dtype, count=elements, offset=begin)
    return torch.empty(elements, dtype=dtype)


def grow_heap_in_large_pages(largest_bytes: int, length_bytes: int) -> bool:
    """Make the heap of glibc, which this process has, longer, in large pages; return whether it was made so.

    Not where addresses alone count as memory: under a limit of the process's (ulimit -v, -d), or where the system
    promises no more than it has (vm.overcommit_memory 2); nor where a large page is larger than what is meant here.

    Args:
        largest_bytes: from this size on glibc takes buffers from elsewhere (M_MMAP_THRESHOLD).
        length_bytes: at most so much longer; what may be allocated.
    """
    _heap.piece_bytes, _heap.pieces = largest_bytes // 2, length_bytes // (largest_bytes // 2)
    return grow_heap_again()


def grow_heap_again() -> bool:
    """The same once more, where its end has been given back since; nothing where it was not made so long before."""
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
            break  # it fitted into what was there; or the heap ends here, or is another one, as a thread's is
    first, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, int(libc.sbrk(0))
    advised = end > first and libc.madvise(first, end - first, mmap.MADV_HUGEPAGE) == 0
    for piece in pieces:
        libc.free(piece)
    return bool(advised)


class _Heap:
    """It is made longer by so many pieces of so many bytes."""

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
