"""Three steps of `backhand train` on a quantized base under a real limit of memory, stopped and resumed on the way.

The limit is a control group (of version 2, else of version 1) where one may be made: it counts anonymous memory and the
file's pages together, once the file is out of the cache that whoever wrote it pays for. Elsewhere it is RLIMIT_DATA,
which counts every private writable mapping in full, and so the model's file as well, which is mapped private and
copy-on-write. A process that needs more is killed, or gets an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environment import peer_environment

STEPS, STOPPED_AFTER = 3, 1
_GROUPS = Path("/sys/fs/cgroup")


def train_under_limit(file: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, stop with Ctrl-C's signal after the first step, resume to the end; every process under the limit.

    Args:
        file: the GGUF file.
        folder: for the rows and the run.
        arguments: rows, length, threads, memory_limit in GB.

    Returns:
        seconds of each step and losses, the peak, what set the limit, exit codes.
    """
    limit = int(arguments.memory_limit * 1e9)
    run = folder / "run"
    rows = _write_rows(folder / "rows.jsonl", STEPS * arguments.rows, arguments.length)
    command = [sys.executable, "-m", "backhand", "train", "--output", str(run)]
    fresh = ["--model", file, "--data", str(rows), "--base", "quantized", "--dtype", arguments.dtype]
    fresh += ["--max-steps", str(STEPS), "--batch-rows", str(arguments.rows), "--max-length", str(arguments.length)]
    fresh += ["--threads", str(arguments.threads), "--memory", f"{arguments.memory_limit}GB", "--save-every", "1"]
    fresh += ["--log-every", "1", "--answers", "0", "--eval-fraction", "0", "--learning-rate", "2e-4"]
    _out_of_cache(file)
    with memory_limit(limit) as (enter, kind):
        first = _watched([*command, *fresh], enter, run, stop_after=STOPPED_AFTER)
        second = _watched([*command, "--resume"], enter, run, stop_after=None)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    times = [line["time_s"] for line in steps]
    return {
        "limit_bytes": limit,
        "limit_kind": kind,
        "file_bytes": Path(file).stat().st_size,
        "rows": arguments.rows,
        "length": arguments.length,
        "step_s": [now - before for before, now in zip([0.0, *times], times, strict=False)],
        "loss": [line["loss"] for line in steps],
        "peak_bytes": max(first["peak_bytes"], second["peak_bytes"]),
        "parts": [first, second],
    }


def _out_of_cache(file: str) -> None:
    """Have a file's pages read again, by whom they then count for."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _write_rows(path: Path, count: int, length: int) -> Path:
    """Rows of letters, one token each in the random models' tokenizer, all but a few of them supervised."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=length + 8))
            file.write(json.dumps({"prompt": text[:8], "completion": text[8 : length - 24]}) + "\n")
    return path


def _watched(command: list[str], enter: Callable[[], None], run: Path, stop_after: int | None) -> dict[str, Any]:
    """The process's exit code, seconds and highest resident memory; interrupted once this many steps are recorded."""
    began, peak, stopped = time.monotonic(), 0, False

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started this in the background
        enter()

    # No thread runs here that could hold a lock while the child enters its limit.
    process = subprocess.Popen(command, preexec_fn=prepare, env=peer_environment("backhand"))  # noqa: PLW1509
    while process.poll() is None:
        peak = max(peak, _peak_bytes(process.pid))
        metrics = run / "metrics.jsonl"
        if stop_after is not None and not stopped and metrics.exists():
            steps = sum('"loss"' in line for line in metrics.read_text(encoding="utf-8").splitlines())
            if steps >= stop_after:
                process.send_signal(signal.SIGINT)
                stopped = True
        time.sleep(0.05)
    expected = 130 if stop_after is not None else 0
    if process.returncode != expected:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {process.returncode}, not {expected}")
    return {"exit_code": process.returncode, "seconds": time.monotonic() - began, "peak_bytes": peak}


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


@contextmanager
def memory_limit(limit: int) -> Iterator[tuple[Callable[[], None], str]]:
    """(what a child calls before its program starts, what sets the limit)."""
    group, kind = _new_group(limit)
    if group is None:
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)), kind
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None, kind
    finally:
        group.rmdir()


_VERSION_2 = ("0::", "", {"memory.max": "{limit}", "memory.swap.max": "0"})
_VERSION_1 = (":memory:", "memory", {"memory.limit_in_bytes": "{limit}", "memory.memsw.limit_in_bytes": "{limit}"})


def _new_group(limit: int) -> tuple[Path | None, str]:
    """A group below this process's own, or below its substitute in a container, with its limit.

    None where none may be made or limited.
    """
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for mark, folder, limits in (_VERSION_2, _VERSION_1):
        own = next((line.partition(mark)[2] for line in lines if mark in line), "")
        root = _GROUPS / folder
        parent = root / own.strip("/")
        group = (parent if parent.is_dir() else root) / f"backhand-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in limits.items():
                if (group / name).exists():  # where there is no swap, there is no limit of it
                    (group / name).write_text(value.format(limit=limit))
            if not (group / next(iter(limits))).exists():
                raise FileNotFoundError(group)
        except OSError:
            group.rmdir()
            continue
        return group, f"cgroup {next(iter(limits))}"
    return None, "RLIMIT_DATA"
