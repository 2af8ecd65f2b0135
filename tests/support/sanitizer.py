"""Processes in which the loops run under the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from backhand.kernels import build

PROJECT = Path(__file__).resolve().parents[2]


def runtime(name: str) -> str | None:
    """The sanitizer's shared library next to the compiler, if it has one."""
    compiler = build.find_compiler()
    if compiler is None or sys.platform != "linux":
        return None
    said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return said.strip() if Path(said.strip()).is_absolute() else None


def environment() -> dict[str, str]:
    """Of a process that loads a build with sanitizers."""
    return os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # The sanitizer's own copies of stack frames are aligned to 32 bytes, where AVX-512 code counts on 64.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join((str(Path(build.__file__).parents[2]), str(PROJECT))),
    }
