"""Another system's kernels against this one's on the same problems: how far numbers are apart, and how many are equal.

Random problems are those of tests/kernels/sanitized_loops.py; cases are those of `backhand verify`, in each dtype, and
each type of stored blocks is unpacked. Run by `tools/foreign_kernels.py`.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.kernels.builds import Library, using
from backhand.kernels.dequantize import block_shape, dequantize, is_compiled
from backhand.kernels.library import proving_kernels
from backhand.verify.runner import PROOF_FILES, load_proofs
from tests.kernels import sanitized_loops
from tools.foreign.kernels import IN_PLACE

PROBLEMS = 40
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-11}
"""Of the difference's norm, relative to the numbers'."""


class Differences:
    """Differences over one kernel's problems, or over one op's cases."""

    def __init__(self) -> None:
        self.numbers = self.same = 0
        self.worst = dict.fromkeys(BOUNDS, 0.0)
        self.beyond: list[str] = []

    def add(self, ours: Tensor, theirs: Tensor, name: str = "", dtype: torch.dtype | None = None) -> None:
        """Two results of one problem.

        Args:
            ours, theirs: of one shape and dtype.
            name: what to call them where they differ by more than rounding.
            dtype: of the problem, where gradients are float32 though it is bfloat16.
        """
        dtype = dtype or ours.dtype
        self.numbers += ours.numel()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
        self.same += int((ours.contiguous().view(bits) == theirs.contiguous().view(bits)).sum())
        a, b = ours.double(), theirs.double()
        scale = max(float(a.norm()), 1e-3 * a.numel() ** 0.5)
        error = float((a - b).norm()) / scale if scale else 0.0
        self.worst[dtype] = max(self.worst[dtype], error if error == error else float("inf"))
        if not error <= BOUNDS[dtype]:
            self.beyond.append(f"{name} {tuple(ours.shape)} {error:.1e}")

    def __str__(self) -> str:
        words = ", ".join(f"{str(dtype)[6:]} {error:.1e}" for dtype, error in self.worst.items() if error)
        return f"{self.same:,} of {self.numbers:,} bits alike" + (f"; at most {words}" if words else "")


def random_problems(both: Sequence[Library]) -> dict[str, Differences]:
    """The same random problems by both, kernel by kernel.

    Args:
        both: this system's, and the other one's.
    """
    found: dict[str, Differences] = defaultdict(Differences)
    made: list[Any] = []
    stored = sanitized_loops._stored

    def kept(numbers: Any, dtype: Any) -> Any:
        made.append(stored(numbers, dtype))
        return made[-1]

    sanitized_loops._stored = kept
    for run in sanitized_loops.LOOPS:
        for seed in range(PROBLEMS):
            results = []
            for library in both:
                made.clear()
                run([library], sanitized_loops.Draw(seed))
                results.append([_tensor(array) for array in made])
            for ours, theirs in zip(*results, strict=True):
                found[f"random {run.__name__}"].add(ours, theirs)
    sanitized_loops._stored = stored
    return found


def _tensor(array: Any) -> Tensor:
    copy = torch.from_numpy(array.copy())
    return copy.view(torch.bfloat16) if array.dtype == np.uint16 else copy


def cases(both: Sequence[Library]) -> dict[str, Differences]:
    """Outputs and gradients of every case of every op that has kernels.

    Args:
        both: this system's, and the other one's.
    """
    found: dict[str, Differences] = defaultdict(Differences)
    for proof in (proof for op in sys.argv[1:] or PROOF_FILES for proof in load_proofs(op) if proof.compiled):
        for case in proof.cases:
            for dtype in BOUNDS:
                tensors = {
                    name: x.to(dtype) if x.is_floating_point() and x.dtype == torch.float64 else x
                    for name, x in case.tensors.items()
                }

                names: list[str] = []

                def compute(
                    tensors: Any = tensors, case: Any = case, proof: Any = proof, names: Any = names
                ) -> list[Tensor]:
                    y, gradients = case.run_manual({name: x.clone() for name, x in tensors.items()}, proof.backward)
                    names[:] = ["y", *gradients]
                    return [y, *gradients.values()]

                for (ours, theirs), name in zip(_by_both(both, compute), names, strict=True):
                    found[f"cases of {proof.op}"].add(ours, theirs, f"{case.name}: {name}", dtype)
    return found


def stored_blocks(both: Sequence[Library]) -> dict[str, Differences]:
    """Random blocks of every type, unpacked.

    Args:
        both: this system's, and the other one's.
    """
    from gguf.constants import GGMLQuantizationType

    found: dict[str, Differences] = defaultdict(Differences)
    random = np.random.default_rng(0)
    with using(both[0]):
        types = [int(number) for number in GGMLQuantizationType if is_compiled(int(number))]
    for type_id in types:
        values, size = block_shape(type_id)
        # Small bytes: no scale of theirs is infinite.
        source = random.integers(0, 256, (5, 3 * size), np.uint8) & 0x3B
        for dtype in (torch.float32, torch.bfloat16):

            def compute(source: Any = source, dtype: Any = dtype, type_id: int = type_id, values: int = values) -> Any:
                return [dequantize(source, type_id, torch.zeros(5, 3 * values, dtype=dtype))]

            for ours, theirs in _by_both(both, compute):
                found[f"{len(types)} types of blocks"].add(ours, theirs)
    return found


@torch.no_grad()
def _by_both(both: Sequence[Library], compute: Callable[[], list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    results = []
    for library in both:
        with using(library), proving_kernels():
            results.append(compute())
    return list(zip(*results, strict=True))


def main() -> int:
    """Print the table; 1 where numbers differ by more than rounding."""
    ours = Library(Path(os.environ["BACKHAND_AGAINST"]))
    both = (ours, IN_PLACE)
    print(f"this system's kernels: {ours.name}; the other one's: {IN_PLACE.name}")
    held = True
    for part in (cases,) if sys.argv[1:] else (random_problems, stored_blocks, cases):
        for name, differences in part(both).items():
            held &= not differences.beyond
            print(f"{'FAIL' if differences.beyond else 'ok  '} {name}: {differences}", flush=True)
            for line in differences.beyond:
                print(f"       {line}")
    print(f"{sum(IN_PLACE.calls.values()):,} calls of {len(IN_PLACE.calls)} functions")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
