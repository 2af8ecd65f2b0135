"""How a command computes: device, dtype, threads, the allocator and the route of float32 products."""

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
from backhand.nn.available_memory import available_bytes
from backhand.nn.model_options import BaseModelOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = -1
LARGEST_FREED = 1 << 30
"""Buffers from this size on are given back at once."""
_FROZEN_AT_START = gc.get_freeze_count()  # Python 3.12 freezes a few objects of its own


def resolve_device(options: BaseModelOptions) -> torch.device:
    """The device to compute on.

    Raises:
        UsageError: not a device, or one that this machine or this build of torch lacks.
    """
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise UsageError(
                f"device {options.device!r} computes nothing that could be read again",
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
    """The compute dtype: as asked, or bfloat16 where it is multiplied natively."""
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    return default_dtype(device)


def resolve_threads(options: BaseModelOptions) -> int:
    """As asked; else what torch (and OMP_NUM_THREADS) would take, within the cores and the quota of this process."""
    if options.threads is not None:
        return options.threads
    return max(1, min(torch.get_num_threads(), available_cores()))


def available_cores() -> int:
    """Cores this process may run on: affinity and cgroup quota, the smaller one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def keep_freed_memory() -> bool:
    """Make glibc keep freed buffers of any size for the next step, in large pages; return whether it could be told.

    By default glibc returns buffers above 32 MB to the system at once, so that every step pays page faults for its
    large activations again: 30 ms in place of 3.5 ms for 80 MB. This holds until the process ends. Opt out with
    `tune_allocator = false`, or by setting MALLOC_MMAP_THRESHOLD_ oneself, which is respected.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    kept = bool(libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_FREED) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    if kept:
        grow_heap_in_large_pages(LARGEST_FREED, available_bytes() or 0)
    return kept


def release_freed_memory() -> bool:
    """Give what `keep_freed_memory` has kept back to the system for once; return whether there was a way to."""
    if platform.libc_ver()[0] != "glibc":
        return False
    released = bool(ctypes.CDLL(None).malloc_trim(0))
    grow_heap_again()  # its end was given back with what else was free
    return released


@contextmanager
def loaded_objects_frozen() -> Iterator[None]:
    """Inside, Python's garbage collector leaves alone what is there at the start: imports, the model, the rows.

    They are some hundred thousand objects that live to the end; to look through them again and again took 3 % of a
    bfloat16 step of short rows, during which the other threads wait. Where a caller has frozen what is there, as the
    tests do, it is left so.
    """
    if gc.get_freeze_count() > _FROZEN_AT_START:
        yield
        return
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds[:2], min(thresholds[2], 10))  # `__main__.run` has made those of all rarer
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def keep_fewer_kernels() -> None:
    """Let oneDNN keep half of the 1,024 compiled kernels that it would; what a user has set stays.

    Each takes half a megabyte, and rows of many lengths ask for new ones all the time. oneDNN reads this when it
    compiles its first kernel: it is without effect in a process that has multiplied matrices before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


def medium_precision_pays() -> bool:
    """Whether `set_float32_matmul_precision("medium")` makes float32 products faster, and none of them less exact.

    It sends them to oneDNN. With AVX-512 that is 4 to 25 % faster, and exact to float32 rounding except where the
    processor has a reduced-precision route (AMX); with less, MKL is as fast, compiles nothing, and leaves torch's flash
    kernels their speed. The flags are asked first, then one product is measured.
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
    """Set threads, float32 route, allocator and compiled kernels of a command; the first two are restored afterwards.

    Raises:
        ResourceError: the system does not start that many threads.
    """
    threads_before, precision_before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    keep_fewer_kernels()
    if options.tune_allocator and device.type == "cpu":
        keep_freed_memory()
    _check_threads(threads)
    torch.set_num_threads(threads)
    if device.type == "cpu" and dtype == torch.float32 and medium_precision_pays():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_float32_matmul_precision(precision_before)


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
    """bfloat16 where the device multiplies it natively, else float32.

    On the CPU that takes AVX512-BF16 or AMX (or bf16 on Arm): elsewhere oneDNN converts to float32 and back, which is
    slower than float32 itself. On CUDA it takes compute capability 8.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and onednn_takes_bf16() and _multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def onednn_takes_bf16() -> bool:
    """Whether torch sends bfloat16 products on the CPU to oneDNN; elsewhere loops of its own compute them."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _multiplies_bf16() -> bool:
    """oneDNN takes bf16 on any AVX512; only these instructions multiply it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return True
    return multiplies_tiles() or _processor_has("_is_avx512_bf16_supported")


def multiplies_tiles() -> bool:
    """Whether the processor has AMX, whose tiles oneDNN multiplies bfloat16 with."""
    return _processor_has("_is_amx_tile_supported")


def _processor_has(check: str) -> bool:
    return hasattr(torch.cpu, check) and bool(getattr(torch.cpu, check)())
