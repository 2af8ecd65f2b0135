"""Find the kernel of the compiled library for a call, and describe its C function.

An op has two forms: torch's form, which is the reference and the fallback, and a kernel of the compiled library. The op
declares the C function, and `find_kernel` returns it, or None if torch's form has to compute:

    _COUNT = KernelSignature("backhand_count", INT, POINTER, INT64)      # the dtype's number first

    count = find_kernel(_COUNT, out)
    if count is not None:
        count(out.data_ptr(), out.numel())

A kernel is used if the library is available (`builds`). Every tensor must be in the processor's memory, in float32 or
bfloat16, and its last axis must have no gaps. float64 is for proofs. Torch's form computes it, unless `proving_kernels`
sends it to the same kernel sources, instantiated for float64.
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
SegmentRuns = tuple[tuple[int, int, int, tuple[tuple[int, int], ...]], ...]
"""Runs of segments as in `ops.document_groups`, for `segment_table`."""


class KernelSignature:
    """Name and types of a C function, which is taken from the build that is in use at each call.

    Args:
        name: its exported name.
        types: the types of its arguments.
        result: the type of its result, None for void.
    """

    def __init__(self, name: str, *types: Type, result: Type | None = None) -> None:
        self.name, self.types, self.result = name, types, result
        self._by_dtype: dict[
            tuple[Library, torch.dtype], Callable[..., Any]
        ] = {}  # cached, since a step asks hundreds of times

    def function(self) -> Any | None:
        """Return the C function, or None if there is no build."""
        build = library()
        return None if build is None else build.function(self.name, self.types, self.result)

    def function_of(self, dtype: torch.dtype, build: Library) -> Callable[..., Any] | None:
        """Return the function of this build with the dtype's number filled in, or None if kernels lack the dtype."""
        function = self._by_dtype.get((build, dtype))
        if function is None and (number := _numbers().get(dtype)) is not None:
            function = partial(build.function(self.name, self.types, self.result), number)
            self._by_dtype[build, dtype] = function
        return function


_float64_enabled = ContextVar("float64_enabled", default=False)


def find_kernel(signature: KernelSignature, *tensors: Tensor | None) -> Callable[..., Any] | None:
    """Return the C function with its dtype filled in, or None if torch's form has to compute.

    Args:
        signature: the function, whose first argument is the dtype's number.
        tensors: all tensors that it reads or writes in the storage dtype; None for omitted ones.
    """
    import torch

    if torch.compiler.is_compiling():
        return None  # traced tensors have no addresses
    build = IN_USE.get()()
    dtype = None if build is None else _common_dtype(tensors)
    if build is None or dtype is None or (dtype == torch.float64 and not _float64_enabled.get()):
        return None
    return signature.function_of(dtype, build)


def kernel_can_read(tensor: Tensor) -> bool:
    """Return True if kernels may read a tensor: in the processor's memory, dense, and not recorded by autograd."""
    return _common_dtype((tensor,)) is not None


def _common_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype | None:
    """Return the common dtype of tensors that kernels may read; None for other tensors, mixed dtypes, or no tensor."""
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
    """Return the address and the row stride."""
    return x.data_ptr(), x.stride(0)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels compute: float64 for float64, else float32."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _numbers() -> dict[torch.dtype, int]:
    """Return the numbers of dtypes in native/dtypes.h."""
    import torch

    return {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


@contextmanager
def proving_kernels() -> Iterator[None]:
    """Inside, float64 uses the kernels too, if the library is available."""
    before = _float64_enabled.set(True)
    try:
        yield
    finally:
        _float64_enabled.reset(before)


def kernels_take_float64() -> bool:
    """Return True if float64 currently uses the kernels."""
    return _float64_enabled.get()


# Cached, since every layer needs the same tables.
@functools.lru_cache(maxsize=16)
def segment_table(runs: SegmentRuns) -> Tensor:
    """Return starts, lengths and parents of all segments, (3, segments) int64; the parent is -1 if there is none.

    Args:
        runs: (first token, number of segments, tokens of each, spans of the segments before each).
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
