"""When a kernel of the compiled library is taken, and how it is called.

An op has two forms: torch's, which is the reference and the fallback, and a kernel of the compiled library. The op
declares the C function beside it, and `loop` gives what to call, or None where torch's form has to do:

    _COUNT = KernelSignature("backhand_count", INT, POINTER, INT64)      # the number of the dtype first

    count = find_kernel(_COUNT, out)
    if count is not None:
        count(out.data_ptr(), out.numel())

The kernel is taken where the library is there (`builds`) and every tensor lies in the processor's own memory, in
float32 or bfloat16, its last axis without gaps. float64 is for proofs: torch's form takes it, unless `proving_kernels`
sends it to the very source of the kernels, instantiated for it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from backhand.kernels.builds import IN_USE, Library, library

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POINTER = ctypes.c_void_p
INT = ctypes.c_int
INT64 = ctypes.c_int64
DOUBLE = ctypes.c_double
Type = type[Any]


class KernelSignature:
    """A C function of the library, whichever build is in use when it is asked for.

    Args:
        name: as exported.
        types: of its arguments.
        result: of what it returns, None for void.
    """

    def __init__(self, name: str, *types: Type, result: Type | None = None) -> None:
        self.name, self.types, self.result = name, types, result
        self._by_dtype: dict[tuple[Library, torch.dtype], Callable[..., Any]] = {}  # a step asks hundreds of times

    def function(self) -> Any | None:
        """What to call, or None where everything goes through torch."""
        found = library()
        return None if found is None else found.function(self.name, self.types, self.result)

    def function_of(self, dtype: torch.dtype, build: Library) -> Callable[..., Any] | None:
        """The one of this build with the number of the dtype filled in, or None where it has none."""
        found = self._by_dtype.get((build, dtype))
        if found is None and (number := _numbers().get(dtype)) is not None:
            found = partial(build.function(self.name, self.types, self.result), number)
            self._by_dtype[build, dtype] = found
        return found


_float64_too = ContextVar("float64_too", default=False)


def find_kernel(declared: KernelSignature, *tensors: Tensor | None) -> Callable[..., Any] | None:
    """The C function with its dtype filled in, or None where torch's form has to do.

    Args:
        declared: takes the number of the dtype first.
        tensors: all that it reads or writes in the storage dtype; None for what is not there.
    """
    import torch

    if torch.compiler.is_compiling():
        return None  # what is traced has no addresses
    build = IN_USE.get()()
    dtype = None if build is None else _dtype_of_loopable(tensors)
    if build is None or dtype is None or (dtype == torch.float64 and not _float64_too.get()):
        return None
    return declared.function_of(dtype, build)


def kernel_can_read(tensor: Tensor) -> bool:
    """Whether kernels may have its address: it lies in the processor's own memory, densely, and records nothing."""
    return _dtype_of_loopable((tensor,)) is not None


def _dtype_of_loopable(tensors: Iterable[Tensor | None]) -> torch.dtype | None:
    """The dtype of tensors whose addresses kernels may have; None for others, several dtypes, or no tensor."""
    import torch

    dtype, recording = None, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if dtype is None:
            dtype = tensor.dtype
        elif tensor.dtype != dtype:
            return None
        strides = tensor.stride()
        if strides and strides[-1] != 1 and tensor.shape[-1] > 1:
            return None
        if not tensor.is_cpu or (recording and tensor.requires_grad):
            return None
    return dtype


def matrix(x: Tensor) -> tuple[int, int]:
    """Address, and how far rows are apart."""
    return x.data_ptr(), x.stride(0)


@functools.cache
def _numbers() -> dict[torch.dtype, int]:
    """As in native/dtypes.h."""
    import torch

    return {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


@contextmanager
def proving_kernels() -> Iterator[None]:
    """Inside, float64 takes the kernels too, where the library is there."""
    before = _float64_too.set(True)
    try:
        yield
    finally:
        _float64_too.reset(before)


def kernels_take_float64() -> bool:
    """Whether float64 takes the kernels here and now."""
    return _float64_too.get()


# Every layer asks for the same ones.
@functools.lru_cache(maxsize=16)
def segment_table(runs: tuple[tuple[int, int, int, tuple[tuple[int, int], ...]], ...]) -> Tensor:
    """Starts, lengths and parents of all segments, (3, segments) int64, as kernels take them; no parent is -1.

    Args:
        runs: (first token, segments behind one another, tokens of each, spans of the segments before each).
    """
    import torch

    rows: list[tuple[int, int, int]] = []
    number_of: dict[int, int] = {}  # by a segment's end
    for first, count, length, before in runs:
        parent = number_of[before[-1][1]] if before else -1
        for start in (first + place * length for place in range(count)):
            number_of[start + length] = len(rows)
            rows.append((start, length, parent))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T.contiguous()
