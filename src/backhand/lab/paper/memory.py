"""Measure memory and checkpoint size of an adapter and of full fine-tuning [arXiv:2106.09685, section 4.2].

Apart from activations, an optimizer step holds the frozen weights in the compute dtype, and 16 bytes per trained
parameter: a float32 value, its gradient and Adam's two moments. Full fine-tuning trains every weight. Both are measured
in separate processes. Each process allocates these tensors, takes one optimizer step as in `loop.step`, and prints its
peak memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from backhand.errors import ResourceError
from backhand.safe_path import python_words, safe_environment
from backhand.system import available_bytes

RUNS = 3
BYTES_PER_TRAINED = 16
SMALLEST_MEASURABLE = 8 * 2**20
"""Below this size the growth of a process says little, since it reuses several hundred KiB of earlier memory."""

_MARGIN = 1.15


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step of adapter training or full fine-tuning."""

    trained: int
    computed_bytes: int  # size of the tensors
    # Growth of the process, one value per run; empty if there is not enough memory.
    measured_bytes: tuple[int, ...]

    @property
    def bytes(self) -> float | None:
        """Median of the measurements, or the computed size without any; None if it is too small to measure."""
        if self.computed_bytes < SMALLEST_MEASURABLE:
            return None
        return statistics.median(self.measured_bytes) if self.measured_bytes else float(self.computed_bytes)


@dataclass(frozen=True)
class MemoryResult:
    """Memory of a step and size of the stored files, for the adapter and for all weights."""

    adapter: StepMemory
    full: StepMemory
    adapter_stored_bytes: int  # the adapter's file
    full_stored_bytes: int  # every weight of the base in float32, as the adapter's factors are stored

    @property
    def memory_ratio(self) -> float | None:
        """Memory of full fine-tuning over that of the adapter, None if one of them is too small to measure."""
        if self.full.bytes is None or self.adapter.bytes is None:
            return None
        return self.full.bytes / self.adapter.bytes

    @property
    def stored_ratio(self) -> float:
        """Stored size of all weights over that of the adapter."""
        return self.full_stored_bytes / self.adapter_stored_bytes

    def as_json(self) -> dict[str, Any]:
        """Return all fields and both ratios."""
        return asdict(self) | {"memory_ratio": self.memory_ratio, "stored_ratio": self.stored_ratio}


def measure_memory(
    base_elements: int, adapter_elements: int, adapter_stored_bytes: int, *, element_bytes: int, runs: int = RUNS
) -> MemoryResult:
    """Measure a step of the adapter and of full fine-tuning.

    Args:
        element_bytes: bytes per element of the frozen weights, 2 in bfloat16 and 4 in float32.
    """
    free = available_bytes()

    def step(frozen: int, trained: int) -> StepMemory:
        computed = frozen * element_bytes + trained * BYTES_PER_TRAINED
        fits = free is None or free > _MARGIN * computed
        measured = tuple(_measure(frozen, trained, element_bytes) for _ in range(runs if fits else 0))
        return StepMemory(trained, computed, measured)

    adapter, full = step(base_elements, adapter_elements), step(0, base_elements)
    return MemoryResult(adapter, full, adapter_stored_bytes, 4 * base_elements)


def _measure(frozen: int, trained: int, element_bytes: int) -> int:
    command = python_words("backhand.lab.paper.memory", *map(str, (frozen, trained, element_bytes)))
    environment = os.environ | safe_environment()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines()
        raise ResourceError(
            f"the memory of a step with {trained:,} trained parameters could not be measured",
            why=lines[-1] if lines else f"the process exited with {ended.returncode}, perhaps because memory ran out",
            next_step="leave memory out of --analyses",
        )
    return int(json.loads(ended.stdout)["grown_bytes"])


def _hold_a_step() -> None:
    """Allocate the tensors of one optimizer step, take the step, and print by how much the process grew."""
    import torch
    from torch.optim.adamw import adamw

    from backhand.system import peak_rss_bytes, rss_bytes

    def step(elements: int) -> None:
        value, gradient = torch.full((elements,), 0.5), torch.full((elements,), 0.1)
        mean, squares, count = torch.zeros(elements), torch.zeros(elements), torch.zeros(())
        rates: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
        adamw([value], [gradient], [mean], [squares], [], [count], fused=True, amsgrad=False, maximize=False, **rates)

    frozen_elements, trained_elements, element_bytes = (int(word) for word in sys.argv[1:])
    torch.set_num_threads(1)
    step(1000)  # the first step of a process loads code, which is not part of the measurement
    before = rss_bytes()
    frozen = torch.full((frozen_elements,), 0.5, dtype={2: torch.bfloat16, 4: torch.float32}[element_bytes])
    step(trained_elements)
    sys.stdout.write(json.dumps({"grown_bytes": peak_rss_bytes() - before, "frozen": frozen.numel()}))


if __name__ == "__main__":
    _hold_a_step()
