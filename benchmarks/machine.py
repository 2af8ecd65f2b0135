"""The machine and the versions that a measurement belongs to, and how to have less of it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

# What keeps oneDNN, torch's own kernels, MKL and this project's loops from newer instructions than these.
CAPS: dict[str, dict[str, str]] = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "BACKHAND_KERNELS": "avx2",
    },
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "BACKHAND_KERNELS": "avx512bf16"},
}
# Of /proc/cpuinfo, the newest first.
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}

_PACKAGES = ("torch", "transformers", "peft", "trl", "sentence-transformers", "bitsandbytes", "numpy", "backhand")


def cap_instructions(name: str | None) -> None:
    """Let the processes that are started from here use no newer instructions than these of `CAPS`."""
    os.environ.update(CAPS[name] if name else {})


def describe_machine(cap: str | None = None) -> dict[str, object]:
    """Processor, instructions, cores, memory and the versions of what is compared; `cap` is what was capped to."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "instructions": _instructions(),
        **({"capped_to": cap} if cap else {}),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def _instructions() -> str:
    flags = _cpuinfo("flags").split()
    return next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), platform.machine())


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return ""
