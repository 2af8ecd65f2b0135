"""Compute settings of a command: device, dtype, threads, allocator and the library for float32 products."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from backhand.errors import ResourceError, UsageError, first_line
from backhand.kernels.large_pages import grow_heap_again, grow_heap_in_large_pages
from backhand.nn.model_options import MOST_THREADS, BaseModelOptions
from backhand.system import affinity_cores, available_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = -1
LARGEST_FREED = 1 << 30
"""Buffers of at least this size are returned to the system at once."""
_FROZEN_AT_START = gc.get_freeze_count()  # Python 3.12 freezes a few of its objects


def resolve_device(options: BaseModelOptions) -> torch.device:
    """Return the device to compute on.

    Raises:
        UsageError: it is not a device, or this machine or this build of torch does not have it.
    """
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise UsageError(
                f"device {options.device!r} is not supported",
                where="device",
                next_step="give auto, cpu or cuda",
            )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {options.device!r} cannot be used",
            where="device",
            why=first_line(error),
            next_step="give auto or cpu",
        ) from None
    return device


def resolve_dtype(options: BaseModelOptions, device: torch.device) -> torch.dtype:
    """Return the compute dtype: the requested one, or bfloat16 if it is multiplied natively."""
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    return default_dtype(device)


def resolve_threads(options: BaseModelOptions) -> int:
    """Return the requested number of threads, or torch's (and OMP_NUM_THREADS'), limited to available cores."""
    if options.threads is not None:
        return options.threads
    return max(1, min(torch.get_num_threads(), available_cores(), _openmp("omp_get_thread_limit") or MOST_THREADS))


def available_cores() -> int:
    """Return the number of cores for this process: the smaller one of CPU affinity and cgroup quota."""
    cores = affinity_cores()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def keep_freed_memory() -> bool:
    """Make glibc keep freed buffers of any size for the next step, in large pages. Return True on success.

    By default glibc returns buffers above 32 MB to the system at once, so every step pays page faults for its large
    activations again: 30 ms instead of 3.5 ms for 80 MB. The setting lasts until the process ends. To opt out, use
    `tune_allocator = false`, or set MALLOC_MMAP_THRESHOLD_, which is respected.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    kept = bool(libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_FREED) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    if kept:
        grow_heap_in_large_pages(LARGEST_FREED, available_bytes() or 0)
    return kept


def release_freed_memory() -> bool:
    """Give the memory that `keep_freed_memory` has kept back to the system once. Return True if that is possible."""
    if platform.libc_ver()[0] != "glibc":
        return False
    released = bool(ctypes.CDLL(None).malloc_trim(0))
    grow_heap_again()  # the end of the heap was released with the other free memory
    return released


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Exclude the objects that exist at the start (imports, model, rows) from garbage collection inside the context.

    There are some hundred thousand of them, and they live until the end. Scanning them repeatedly took 3 % of a
    bfloat16 step of short rows, while the other threads waited. If the caller has already frozen objects, as the tests
    do, nothing changes.
    """
    if gc.get_freeze_count() > _FROZEN_AT_START:
        yield
        return
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds[:2], min(thresholds[2], 10))  # `__main__.run` has raised the third threshold
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


_KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Environment variables with the number of kernels in torch's cache of oneDNN's kernels, and in oneDNN's own cache."""


def limit_kernel_caches() -> None:
    """Limit the caches of compiled kernels to 128 kernels instead of 1,024, unless the user has set a limit.

    Each kernel takes 0.5 to 0.9 MB, and rows of many lengths need new ones all the time: without a limit, a run's
    memory grows by some hundred megabytes. A pass of one size needs about 35. The libraries read the limits when they
    compile their first kernel. The call has no effect in a process that has multiplied matrices before.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, "128")


def most_kernels() -> int:
    """Return the number of compiled kernels that the caches keep; 1,024 is the libraries' default."""
    limits = (os.environ.get(name, "") for name in _KERNEL_CACHES)
    return max(int(limit) if limit.isdecimal() else 1024 for limit in limits)


def medium_precision_pays() -> bool:
    """Return True if `set_float32_matmul_precision("medium")` makes float32 products faster and none less exact.

    The setting sends them to oneDNN. With AVX-512 that is 4 to 25 % faster, and exact to float32 rounding unless the
    processor has a reduced-precision path (AMX). Without AVX-512, MKL is as fast, compiles nothing, and does not slow
    down torch's flash kernels. The CPU flags are checked first, then one product is measured.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cpu._is_amx_tile_supported():
        return False
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = x.double() @ weight.double().T
    try:
        torch.set_float32_matmul_precision("medium")
        error = torch.linalg.vector_norm((x @ weight.T).double() - exact) / torch.linalg.vector_norm(exact)
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < 2e-6)


@contextmanager
def compute_settings(
    options: BaseModelOptions, threads: int, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Apply threads, float32 library, allocator and kernel caches of a command.

    The first two are restored afterwards.

    Raises:
        ResourceError: the threads cannot be started, or parallel regions get fewer of them.
    """
    threads_before, precision_before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    limit_kernel_caches()
    if options.tune_allocator and device.type == "cpu":
        keep_freed_memory()
    _check_threads(threads)
    torch.set_num_threads(threads)
    if device.type == "cpu" and dtype == torch.float32 and medium_precision_pays():
        torch.set_float32_matmul_precision("medium")
    try:
        with _whole_teams():
            if device.type == "cpu":
                _check_product(threads, dtype)
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_float32_matmul_precision(precision_before)


def _openmp(function: str, *arguments: int) -> int | None:
    """Call a function of the OpenMP library that this process uses, or return None if there is none to be found."""
    call = getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None
    return None if call is None else int(call(*arguments))


@contextmanager
def _whole_teams() -> Iterator[None]:
    """Inside the context, a parallel region of this thread gets the threads that it asks for, up to OMP_THREAD_LIMIT.

    The command line removes such settings before torch is loaded (`cli.openmp_limits`). A Python program may have
    loaded torch with them.
    """
    dynamic, levels = _openmp("omp_get_dynamic"), _openmp("omp_get_max_active_levels")
    if dynamic is None or levels is None:
        yield
        return
    _openmp("omp_set_dynamic", 0)
    _openmp("omp_set_max_active_levels", max(1, levels))
    try:
        yield
    finally:
        _openmp("omp_set_dynamic", dynamic)
        _openmp("omp_set_max_active_levels", levels)


def _check_product(threads: int, dtype: torch.dtype) -> None:
    """Raise ResourceError if a product whose entries are all known lacks the parts of some threads."""
    rows, size = 64 * threads, 64  # a part for each thread
    product = torch.ones(rows, size, dtype=dtype) @ torch.ones(size, size, dtype=dtype)
    if not bool((product == size).all()):
        raise ResourceError(
            f"torch computes only a part of a matrix product with {threads} threads",
            where="threads",
            why="OpenMP starts fewer than torch asks for, as OMP_THREAD_LIMIT in the environment makes it do",
            next_step="give --threads 1, or unset OMP_THREAD_LIMIT before Python starts",
        )


_OTHER_THREADS = 2
"""Threads of a command that do not compute: they write progress, and watch other programs."""


def _check_threads(threads: int) -> None:
    """Start as many threads as will compute, and end them: OpenMP ends the process where it cannot start one."""
    done = threading.Event()
    started = []
    try:
        for _ in range(threads - 1 + _OTHER_THREADS if threads > 1 else 0):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise ResourceError(
            f"{threads} threads cannot be started",
            where="threads",
            why=first_line(error),
            next_step="raise the limit of processes (ulimit -u), or give --threads 1",
        ) from None
    finally:
        done.set()
        for thread in started:
            thread.join()


def default_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bfloat16 if the device multiplies it natively, else float32.

    On the CPU this requires AVX512-BF16 or AMX (or bf16 on Arm). Otherwise oneDNN converts to float32 and back, which
    is slower than float32. On CUDA it requires compute capability 8.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and onednn_supports_bf16() and _has_bf16_instructions():
        return torch.bfloat16
    return torch.float32


def onednn_supports_bf16() -> bool:
    """Return True if torch uses oneDNN for bfloat16 products on the CPU. Otherwise it uses its own loops."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_bf16_instructions() -> bool:
    """Return True if the processor multiplies bfloat16. oneDNN accepts it with any AVX512."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return True
    return has_amx() or _processor_has("_is_avx512_bf16_supported")


def has_amx() -> bool:
    """Return True if the processor has AMX, with which oneDNN multiplies bfloat16."""
    return _processor_has("_is_amx_tile_supported")


def _processor_has(check: str) -> bool:
    return hasattr(torch.cpu, check) and bool(getattr(torch.cpu, check)())
