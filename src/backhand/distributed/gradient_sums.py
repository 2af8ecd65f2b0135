"""The gradient of a step whose micro-batches several processes compute, and the assignment of micro-batches.

    g = g₀ + g₁ + … + g_{m-1},   each gᵢ computed from zero, added from the left in float64

Addition of floats is not associative, so the order of the additions decides the last bits. `OrderedSum` follows the
equation for any number of processes: it cuts the buffer of N elements into W slices, and each process sends slice k of
each of its micro-batches to process k. Process k adds them in their order and returns the sum to all processes.
`PlainSum` adds a process's own micro-batches first and then the processes in one all-reduce.

Bytes that a process sends in a step, with mᵣ micro-batches of its own:

    ordered   4 N (W - 1) / W · (mᵣ + 1)        as much as an all-reduce if each process has one micro-batch
    sum       4 N (W - 1) / W · 2

Bound of `sum`: with u = 2⁻²⁴ and m micro-batches, two orders of the same additions differ in each element by at most
2 (m - 1) u Σᵢ |gᵢ| / (1 - (m - 1) u)      [Higham, Accuracy and Stability of Numerical Algorithms, §4.2]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from backhand.distributed.communicator import zero_sum


class Collectives(Protocol):
    """The collective operations that a sum over several processes needs."""

    rank: int
    world_size: int

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Send one piece to each process and receive one from each."""

    def all_gather(self, received: list[Tensor], sent: Tensor) -> None:
        """Give every process the tensor of each process."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all processes in place."""


class OrderedSum:
    """The sum over several processes in the order of the micro-batches (`--reduce ordered`).

    Args:
        gradients: the gradient buffer, (elements,).
        shares: the micro-batch numbers of every process, from `communicator.assign`.
    """

    def __init__(self, gradients: Tensor, shares: Sequence[Sequence[int]], group: Collectives) -> None:
        self._gradients, self._shares, self._group = gradients, shares, group
        self._slice = -(-gradients.numel() // group.world_size)
        self._sent = gradients.new_zeros(group.world_size, len(shares[group.rank]), self._slice)
        self._added = 0

    def add(self) -> None:
        for process, piece in enumerate(self._gradients.split(self._slice)):
            self._sent[process, self._added, : piece.numel()] = piece
        self._gradients.zero_()
        self._added += 1

    def reduce(self) -> None:
        group, numbers = self._group, [number for share in self._shares for number in share]
        lengths = [len(share) * self._slice for share in self._shares]
        received = self._gradients.new_empty(len(numbers), self._slice)
        own_sizes = [lengths[group.rank]] * group.world_size
        group.all_to_all(received.view(-1), self._sent.view(-1), lengths, own_sizes)
        total = zero_sum(self._gradients, self._slice)
        for index in sorted(range(len(numbers)), key=numbers.__getitem__):
            total.add_(received[index])
        slices = self._gradients.new_empty(group.world_size, self._slice)
        group.all_gather(list(slices.unbind()), total.to(slices.dtype))
        self._gradients.copy_(slices.view(-1)[: self._gradients.numel()])


class PlainSum:
    """The sum over several processes by one all-reduce (`--reduce sum`). Micro-batches add up in the buffer itself."""

    def __init__(self, gradients: Tensor, group: Collectives) -> None:
        self._gradients, self._group = gradients, group

    def add(self) -> None:
        """Leave the gradient in the buffer, where the next one is added to it."""

    def reduce(self) -> None:
        self._group.all_reduce(self._gradients)


def assign(tokens: Sequence[int], world_size: int) -> list[list[int]]:
    """Assign each micro-batch to the process that has the fewest tokens so far.

    Args:
        tokens: number of tokens per micro-batch, in descending order.
        world_size: number of processes. With fewer micro-batches than processes, some processes receive none.

    Returns:
        the micro-batch numbers of each process, ascending; each number occurs once.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for number, count in enumerate(tokens):
        process = loads.index(min(loads))
        shares[process].append(number)
        loads[process] += count
    return shares
