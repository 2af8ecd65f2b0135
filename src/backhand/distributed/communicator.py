"""Communication between the processes of a run. `Communicator` is a run of one process; it sends nothing.

`process_group.ProcessGroup` implements the same methods for several processes. Code that trains calls these methods and
never asks how many processes there are: the results are the same bits, unless `--reduce sum` is chosen.
"""

from __future__ import annotations

import functools
import json
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from backhand.runs.interruption import Interruption

T = TypeVar("T")


class MicroBatchResult(NamedTuple):
    """The result of one micro-batch, computed by one process."""

    number: int
    loss: float  # sum over its tokens or rows
    supervised_tokens: int
    attends: bool  # True if at least one supervised position has a position before it


@dataclass(frozen=True)
class StepTotals:
    """The results of all processes in one step. The step's gradient is in the gradient buffer."""

    losses: tuple[float, ...]  # sum of each micro-batch, in order
    supervised_tokens: int  # of all micro-batches
    attends: bool  # True if at least one supervised position of the step has a position before it
    computed_s: tuple[float, ...]  # seconds of computation per process
    # Seconds that each process spent in the previous exchange, including waiting for others; 0 in the first step. The
    # duration of this step's exchange is unknown until it is over.
    waited_s: tuple[float, ...]


class GradientSum(Protocol):
    """The sum of one step's gradients. The gradient buffer is zero at first."""

    def add(self) -> None:
        """Take the buffer's contents as the gradient of this process's next micro-batch."""

    def reduce(self) -> None:
        """Write the whole step's gradient into the buffer of every process."""


class Communicator:
    """The processes of a run: here one process. `ProcessGroup` is the implementation for several.

    Attributes:
        rank, world_size: number of this process; number of processes.
        local_world_size: number of the run's processes on this machine.
        local_rank: number of this process on its machine.
        interruption: receives this process's signals; None until the run installs its handlers.
        waited_s: seconds of the most recent exchange of a step, including waiting for others.
    """

    rank = 0
    world_size = 1
    local_world_size = 1
    local_rank = 0

    def __init__(self) -> None:
        self.interruption: Interruption | None = None
        self.waited_s = 0.0

    @property
    def is_main_process(self) -> bool:
        """True for rank 0, the process that writes files and prints."""
        return self.rank == 0

    @property
    def stop_requested(self) -> bool:
        """True if this process has received a signal to stop, whether or not the others know of it."""
        return self.interruption is not None and self.interruption.requested is not None

    @property
    def should_stop(self) -> bool:
        """True if all processes know that one of them has received a signal to stop."""
        return self.stop_requested

    def assign(self, tokens: Sequence[int]) -> list[list[int]]:
        """Return the numbers of each process's pieces, ascending.

        Args:
            tokens: number of tokens per piece, in descending order.
        """
        return [list(range(len(tokens)))]

    def gradient_sum(self, gradients: Tensor, shares: Sequence[Sequence[int]]) -> GradientSum:
        """Return the accumulator of one step's gradients.

        Args:
            gradients: the gradient buffer, (elements,) float32, zero.
            shares: the micro-batch numbers of every process, from `assign`.
        """
        return OneProcessSum(gradients, len(shares[0]))

    def reduce_step(
        self, gradient_sum: GradientSum, results: Sequence[MicroBatchResult], computed_s: float
    ) -> StepTotals:
        """Write the whole step's gradient into the buffer and return the totals over all processes.

        Afterwards all processes know of a signal that any of them had received.

        Args:
            results: of this process's micro-batches.
            computed_s: seconds in which this process computed them.
        """
        start_s = time.perf_counter()
        gradient_sum.reduce()
        parts = self.all_gather_object([results, computed_s, self.waited_s])
        self.waited_s = time.perf_counter() - start_s
        in_order = sorted(MicroBatchResult(*result) for part, _, _ in parts for result in part)
        return StepTotals(
            losses=tuple(result.loss for result in in_order),
            supervised_tokens=sum(result.supervised_tokens for result in in_order),
            attends=any(result.attends for result in in_order),
            computed_s=tuple(computed for _, computed, _ in parts),
            waited_s=tuple(waited for _, _, waited in parts),
        )

    def parallel_map(
        self, tokens: Sequence[int], fn: Callable[[int], T], *, interruptible: bool = False
    ) -> list[T] | None:
        """Map `fn` over the pieces, split across processes, and gather the results (JSON values).

        Args:
            tokens: number of tokens per piece, in descending order.
            fn: maps the number of a piece to its result.
            interruptible: return None if a process has received a signal to stop.
        """
        local: dict[int, T] = {}
        for number in self.assign(tokens)[self.rank]:
            if interruptible and self.stop_requested:
                break
            local[number] = fn(number)
        results = {int(number): value for part in self.all_gather_object(local) for number, value in part.items()}
        return [results[number] for number in range(len(tokens))] if len(results) == len(tokens) else None

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the JSON value of every process, by rank."""
        return [value]

    def share_rows(self, rows: Tensor, places: Sequence[list[int]]) -> None:
        """Copy the rows that each process has computed into the tensor of every process.

        Args:
            rows: (rows, columns), of the same shape in every process.
            places: for each process, the indices of its rows.
        """

    def broadcast(self, value: bytes) -> bytes:
        """Return rank 0's bytes."""
        return value

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's JSON value."""
        return json.loads(self.broadcast(json.dumps(value).encode()))

    def assert_equal(self, facts: Mapping[str, Any]) -> None:
        """Compare facts that must be equal in all processes.

        Raises:
            ArtifactError: names the facts that differ, with both values.
        """

    def assert_equal_adapters(self, digest: Callable[[], str], step: int) -> None:
        """Compare the adapters of all processes.

        Raises:
            CheckError: names the processes whose adapter differs from rank 0's.
        """


def sequential_sum(values: Iterable[float]) -> float:
    """Return the float64 sum from left to right. The last bits of Python's own `sum` depend on the Python version."""
    return functools.reduce(operator.add, values, 0.0)


def zero_sum(gradients: Tensor, elements: int) -> Tensor:
    """Return (elements,) zeros to add gradients to: float64, so that many micro-batches round no more than one.

    On Apple's GPUs, which have no float64, the zeros are float32.
    """
    wide = torch.float32 if gradients.device.type == "mps" else torch.float64
    return torch.zeros(elements, dtype=wide, device=gradients.device)


class OneProcessSum:
    """The sum of a process that computes every micro-batch itself.

    Args:
        gradients: the gradient buffer, (elements,).
        micro_batches: number of micro-batches of the step. A single one needs no second buffer.
    """

    def __init__(self, gradients: Tensor, micro_batches: int) -> None:
        self._gradients = gradients
        self._sum = zero_sum(gradients, gradients.numel()) if micro_batches > 1 else None

    def add(self) -> None:
        if self._sum is not None:
            self._sum.add_(self._gradients)
            self._gradients.zero_()

    def reduce(self) -> None:
        if self._sum is not None:
            self._gradients.copy_(self._sum)
