"""Limits of the environment on the OpenMP threads of a parallel region.

oneDNN, which multiplies bfloat16 matrices for torch, divides a product by the number of threads that it asks for. If
OpenMP gives it fewer, the parts of the missing threads are not computed, without an error. Schedulers and images set
variables with this effect. They are removed before torch is loaded; a limit becomes the default number of threads.

In a Python program that has loaded torch earlier, `nn.compute` does what is still possible.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from backhand.system import affinity_cores

_THREADS = "OMP_NUM_THREADS"


def remove_limits(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove variables that give a parallel region fewer threads than it asks for, and limit the default instead."""
    for name in ("OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS"):
        _taken(environment, name)
    limit = _number(_taken(environment, "OMP_THREAD_LIMIT"))
    default = _number(environment.get(_THREADS, "").partition(",")[0]) or affinity_cores()
    if 0 < limit < default:
        environment[_THREADS] = str(limit)


def _taken(environment: MutableMapping[str, str], name: str) -> str:
    """Remove a variable and its form for all devices, and return the value that counts."""
    general = environment.pop(f"{name}_ALL", "")
    return environment.pop(name, general)


def _number(text: str) -> int:
    """Return a number, or 0 for text that OpenMP ignores."""
    return int(text) if text.strip().isdecimal() else 0
