"""The gradient of a step whose micro-batches several processes compute; `step.OneProcessSum` is that of one alone.

    g = g₀ + g₁ + … + g_{m-1},   each gᵢ computed from zero, added from the left in float64

Addition of floats is not associative: who adds what to what decides the last bits. `ordered` keeps the equation as it
stands, for any number of processes: the buffer of N elements is cut into W slices, each process sends slice k of each
of its micro-batches to process k, which adds them in their order, and the sums go back to everyone. `sum` adds a
process's own micro-batches first and then the processes in one all-reduce.

Bytes that a process sends in a step, with mᵣ micro-batches of its own:

    ordered   4 N (W - 1) / W · (mᵣ + 1)        as much as an all-reduce where each process has one micro-batch
    sum       4 N (W - 1) / W · 2

Besides, the processes tell each other (`step.Processes.total`) what each micro-batch had of nats and supervised tokens,
whether it attends, and the seconds that each computed and waited.

Bound of `sum`: with u = 2⁻²⁴ and m micro-batches, two orders of the same additions differ in each element by at most
2 (m - 1) u Σᵢ |gᵢ| / (1 - (m - 1) u)      [Higham, Accuracy and Stability of Numerical Algorithms, §4.2]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from backhand.training.step import zero_sum


def shared_out(tokens: Sequence[int], processes: int) -> list[list[int]]:
    """Which micro-batches each process computes: each goes to the one that has the fewest tokens so far.

    Args:
        tokens: of every micro-batch, the longest first.
        processes: how many there are; some get none where there are fewer micro-batches.

    Returns:
        for each process the numbers of its micro-batches, rising; each number once.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for number, count in enumerate(tokens):
        process = loads.index(min(loads))
        shares[process].append(number)
        loads[process] += count
    return shares


class Exchange(Protocol):
    """What a sum over processes needs of them."""

    rank: int
    size: int

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Send a piece to each process, and receive one of each."""

    def all_gather(self, received: list[Tensor], sent: Tensor) -> None:
        """Give every process the tensor of each."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Add up in place."""


class OrderedSum:
    """`ordered` over several processes.

    Args:
        gradients: the buffer, (elements,).
        shares: of every process, see `shared_out`.
    """

    def __init__(self, gradients: Tensor, shares: Sequence[Sequence[int]], processes: Exchange) -> None:
        self._gradients, self._shares, self._processes = gradients, shares, processes
        self._slice = -(-gradients.numel() // processes.size)
        self._sent = gradients.new_zeros(processes.size, len(shares[processes.rank]), self._slice)
        self._added = 0

    def add(self) -> None:
        """See `step.GradientSum.add`."""
        for process, piece in enumerate(self._gradients.split(self._slice)):
            self._sent[process, self._added, : piece.numel()] = piece
        self._gradients.zero_()
        self._added += 1

    def total(self) -> None:
        """See `step.GradientSum.total`."""
        processes, numbers = self._processes, [number for share in self._shares for number in share]
        lengths = [len(share) * self._slice for share in self._shares]
        received = self._gradients.new_empty(len(numbers), self._slice)
        own = [lengths[processes.rank]] * processes.size
        processes.all_to_all(received.view(-1), self._sent.view(-1), lengths, own)
        added = zero_sum(self._gradients, self._slice)
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            added.add_(received[place])
        whole = self._gradients.new_empty(processes.size, self._slice)
        processes.all_gather(list(whole.unbind()), added.to(whole.dtype))
        self._gradients.copy_(whole.view(-1)[: self._gradients.numel()])


class PlainSum:
    """`sum` over several processes: the next gradient is added to this one where it stands, then one all-reduce."""

    def __init__(self, gradients: Tensor, processes: Exchange) -> None:
        self._gradients, self._processes = gradients, processes

    def add(self) -> None:
        """See `step.GradientSum.add`."""

    def total(self) -> None:
        """See `step.GradientSum.total`."""
        self._processes.all_reduce(self._gradients)
