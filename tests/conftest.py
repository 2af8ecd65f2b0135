"""What every test relies on: no network, few threads, the same random numbers."""

# ruff: noqa: E402
from __future__ import annotations

import gc

# What is imported and collected lives to the end: to look through it again and again took a third of the time that
# collecting the tests takes.
gc.disable()

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from functools import cache, partial

# Before anything imports huggingface_hub, tokenizers or torch.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["BACKHAND_ROWS_CACHE"] = "off"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

from backhand.engines import memory_probe as probe
from backhand.loop import forgetting
from backhand.training import trainer
from tests.support import measured_once, processes
from tests.support.for_each import seed

# PEFT would import it, and torch's compiler with it: a second of each test process. No test quantizes by it.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]

# Started in the background of a shell this process ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No power is lost here, and what would be then is decided by a model of it (support/faulty_files.py): a save waits for
# the disk seventy times, which on a busy one takes longer than the run.
os.fsync = lambda descriptor: None

# A run gives its freed memory back around each save, and would only take it again: 2 % of a tiny run's time.
trainer.MemoryKeeper = partial(trainer.MemoryKeeper, release=lambda: None)  # type: ignore[misc,assignment]

forgetting.neutral_texts = measured_once.two_neutral_texts

# What a test frees stays for the next one. By default buffers go back to the system as soon as they are freed, and each
# of their pages is made anew for the next test: a tenth of the time of those that compute.
if platform.libc_ver()[0] == "glibc":
    _libc = ctypes.CDLL(None)
    _libc.mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD, of <malloc.h>
    # M_MMAP_THRESHOLD: larger ones still go back at once. Glibc before 2.35 takes no more than the second.
    _libc.mallopt(-3, 128 << 20) or _libc.mallopt(-3, 32 << 20)

# Nothing that is collected starts a thread, which the process that others are forked from would not have.
torch.set_num_threads(1)

# A busy machine is no defect: neither an example nor drawing one has a time limit.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)  # xdist's own hook, in each of its processes, calls none after it
def pytest_runtestloop(session: pytest.Session) -> None:
    """Leave what was imported and collected out of garbage collections, which begin here."""
    gc.collect()
    gc.freeze()
    processes.fork_the_server(session.config)
    # Test processes share the cores; with xdist (or OMP_NUM_THREADS set) one thread each is fastest for tiny tensors.
    threads = os.environ.get("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
    torch.set_num_threads(int(threads))
    gc.set_threshold(20_000, *gc.get_threshold()[1:])  # few leave cycles: 3 → 2 % of tests' time
    gc.enable()
    gc.get_freeze_count = cache(gc.get_freeze_count)  # each run asks, and to count takes as long as a few of its steps


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw from torch's global generator draw the same numbers alone and in any order."""
    seed()


@pytest.fixture(autouse=True, scope="module")
def steps_measured_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs that are alike take what was measured for the first of them, but in a file with `memory` in its name."""
    with pytest.MonkeyPatch.context() as patch:
        if "memory" not in request.path.name:
            patch.setattr(probe, "step_bytes", measured_once.step_bytes)
        yield
