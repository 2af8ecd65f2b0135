"""The compiled library: loaded once, for the widest instruction set of this processor; and when a kernel is taken.

    BACKHAND_KERNELS=auto|none|baseline|avx2|avx512|avx512bf16|amx      which build

where auto is the widest, and none is torch alone.

An op has two forms: torch's, which is the reference and the fallback, and a kernel of the compiled library. The op
declares the C function beside it, and `loop` gives what to call, or None where torch's form has to do:

    _COUNT = Declared("backhand_count", INT, POINTER, INT64)      # the number of the dtype first

    count = loop(_COUNT, out)
    if count is not None:
        count(out.data_ptr(), out.numel())

The kernel is taken where the library is there and every tensor lies in the processor's own memory, in float32 or
bfloat16, its last axis without gaps. float64 is for proofs: torch's form takes it, unless `proving_loops` sends it to
the very source of the kernels, instantiated for it.

Loops run on torch's own threads: libtorch_cpu exports the plain C function torch_parallel_for, whose pointer is handed
over when the library is loaded, so that no second thread pool is in the process. What reads files by the library needs
no torch, so that it is imported where it is used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backhand.errors import ArtifactError, UsageError
from backhand.kernels.build import BUILT, fault, library_path, processor_runs
from backhand.words import show_notes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VARIABLE = "BACKHAND_KERNELS"
BUILDS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
"""The plainest first; each needs what those before it need."""

POINTER = ctypes.c_void_p
INT = ctypes.c_int
INT64 = ctypes.c_int64
FLOAT = ctypes.c_float
DOUBLE = ctypes.c_double
Type = type[Any]


class Library:
    """One build of the library, loaded.

    Args:
        path: of the shared object.

    Attributes:
        name: its instruction set.

    Raises:
        OSError: the file is not there, or is no library of this system.
    """

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        self._functions: dict[str, Any] = {}
        name: bytes = self.function("backhand_instruction_set", (), ctypes.c_char_p)()
        self.name = name.decode()

    def function(self, name: str, types: Sequence[Type], result: Type | None = None) -> Any:
        """The C function of this name; other Python threads run while it does.

        Args:
            name: as exported.
            types: of its arguments.
            result: of what it returns, None for void.
        """
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = getattr(self._handle, name)
            found.argtypes, found.restype = tuple(types), result
        return found


class Declared:
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


_forced: ContextVar[tuple[Library | None] | None] = ContextVar("forced", default=None)
"""What `using` has put in place of the choice."""


def library() -> Library | None:
    """The build in use, or None where everything goes through torch."""
    forced = _forced.get()
    return _chosen() if forced is None else forced[0]


@contextmanager
def using(build: Library | None) -> Iterator[None]:
    """Use this build, or none, inside; for tests and benchmarks."""
    before = _forced.set((build,))
    try:
        yield
    finally:
        _forced.reset(before)


@functools.cache
def load(name: str, folder: Path = BUILT) -> Library:
    """A build by name, with torch's threads.

    Raises:
        OSError: it is not there.
    """
    loaded = Library(library_path(name, folder))
    loaded.function("backhand_set_parallel_for", (POINTER,))(_torch_parallel_for())
    return loaded


@functools.cache
def usable(folder: Path = BUILT) -> tuple[str, ...]:
    """The builds that are there and that this processor can run, the plainest first, up to what VARIABLE names."""
    if not _is_whole("baseline", folder):
        return ()
    try:
        able = processor_runs(library_path("baseline", folder))
    except OSError:
        return ()
    if (named := os.environ.get(VARIABLE)) in able:
        able = able[: able.index(named) + 1]
    return tuple(name for name in able if name == "baseline" or _is_whole(name, folder))


def _is_whole(name: str, folder: Path) -> bool:
    """Whether a build is there as it was made; says so where it is there and is not."""
    wrong = fault(name, folder)
    if wrong is not None and os.environ.get("LOCAL_RANK", "0") == "0":  # one of a run's processes says it
        instead = "torch computes" if name == "baseline" else "plainer ones compute"
        show_notes([f"the compiled kernels for {name} are not used: {wrong}; {instead}, until `make kernels`"])
    return wrong is None and library_path(name, folder).exists()


def describe() -> str:
    """One line: which kernels run, and why not the compiled ones where they do not."""
    wanted = os.environ.get(VARIABLE, "auto")
    found = library()
    if found is not None:
        return f"compiled kernels: {found.name}" + ("" if wanted == "auto" else f" ({VARIABLE}={wanted})")
    if wanted == "none":
        return f"compiled kernels: none ({VARIABLE}=none); everything goes through torch, slower"
    if (wrong := fault("baseline")) is not None:
        return f"compiled kernels: none ({wrong}: `make kernels`); everything goes through torch, slower"
    return "compiled kernels: none (not built for this machine: `make kernels`); everything goes through torch, slower"


@functools.cache
def _chosen() -> Library | None:
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "none":
        return None
    if wanted not in ("auto", *BUILDS):
        raise UsageError(
            f"{VARIABLE}={wanted} names no build of the compiled kernels",
            next_step=f"set it to one of auto, none, {', '.join(BUILDS)}, or unset it",
        )
    able = usable()
    if wanted == "auto":
        return load(able[-1]) if able else None
    if wanted not in able:
        raise ArtifactError(
            f"the compiled kernels for {wanted} cannot be used",
            where=VARIABLE,
            why=f"here are: {', '.join(able) or 'none'}",
            next_step=f"run `make kernels`, or unset {VARIABLE}",
        )
    return load(wanted)


def _torch_parallel_for() -> int | None:
    """The address of torch's parallel loop, None where this torch does not export it."""
    import torch

    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        handle = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        return ctypes.cast(handle.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Which tensors a kernel takes.


_float64_too = ContextVar("float64_too", default=False)


def loop(declared: Declared, *tensors: Tensor | None) -> Callable[..., Any] | None:
    """The C function with its dtype filled in, or None where torch's form has to do.

    Args:
        declared: takes the number of the dtype first.
        tensors: all that it reads or writes in the storage dtype; None for what is not there.
    """
    import torch

    if torch.compiler.is_compiling():
        return None  # what is traced has no addresses
    build = library()
    dtype = None if build is None else _dtype_of_loopable(tensors)
    if build is None or dtype is None or (dtype == torch.float64 and not _float64_too.get()):
        return None
    return declared.function_of(dtype, build)


def is_loopable(tensor: Tensor) -> bool:
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


@functools.cache
def _numbers() -> dict[torch.dtype, int]:
    """As in native/dtypes.h."""
    import torch

    return {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


@contextmanager
def proving_loops() -> Iterator[None]:
    """Inside, float64 takes the kernels too, where the library is there."""
    before = _float64_too.set(True)
    try:
        yield
    finally:
        _float64_too.reset(before)


def loops_take_float64() -> bool:
    """Whether float64 takes the kernels here and now."""
    return _float64_too.get()


@contextmanager
def torch_form() -> Iterator[None]:
    """Inside, every op takes torch's form."""
    with using(None):
        yield


def loops_are_there() -> bool:
    """Whether ops take kernels at all."""
    return library() is not None


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
