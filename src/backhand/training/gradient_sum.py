"""The gradient of a step whose micro-batches several processes compute; `step.OneProcessSum` is that of one alone.

    g = g₀ + g₁ + … + g_{m-1},   each gᵢ computed from zero, added from the left in float64

Addition of floats is not associative: who adds what to what decides the last bits. `ordered` keeps the equation as it
stands, for any number of processes: the buffer of N elements is cut into W slices, each process sends slice k of each
of its micro-batches to process k, which adds them in their order, and the sums go back to everyone. `sum` adds a
process's own micro-batches first and then the processes in one all-reduce.

Bytes that a process sends in a step, with mᵣ micro-batches of its own:

    ordered   4 N (W - 1) / W · (mᵣ + 1)        as much as an all-reduce where each process has one micro-batch
    sum       4 N (W - 1) / W · 2

Beside the gradients travel each micro-batch's nats, as three floats that hold all bits of a float64, its supervised
tokens and whether it attends; and of each process the seconds it computed and waited, and the signal that asked it
to stop.

Bound of `sum`: with u = 2⁻²⁴ and m micro-batches, two orders of the same additions differ in each element by at most
2 (m - 1) u Σᵢ |gᵢ| / (1 - (m - 1) u)      [Higham, Accuracy and Stability of Numerical Algorithms, §4.2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from backhand.training.step import StepSum, zero_sum

_OF_MICRO_BATCH = 5
_OF_PROCESS = 3


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
        ...

    def all_gather(self, received: list[Tensor], sent: Tensor) -> None:
        """Give every process the tensor of each."""
        ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Add up in place."""
        ...


class OrderedSum:
    """`ordered` over several processes.

    Args:
        gradients: the buffer, (elements,).
        shares: of every process, see `shared_out`.
    """

    def __init__(self, gradients: Tensor, shares: Sequence[Sequence[int]], processes: Exchange) -> None:
        self._gradients = gradients
        self._shares = shares
        self._processes = processes
        self._slice = -(-gradients.numel() // processes.size)
        self._own = list(shares[processes.rank])
        self._sent = gradients.new_zeros(processes.size, self._length(len(self._own)))

    def _length(self, count: int) -> int:
        return count * (self._slice + _OF_MICRO_BATCH) + _OF_PROCESS

    def add(self, number: int, nats: float, supervised_tokens: int, *, attends: bool) -> None:
        """See `step.GradientSum.add`."""
        begin = self._own.index(number) * (self._slice + _OF_MICRO_BATCH)
        for process, piece in enumerate(self._gradients.split(self._slice)):
            self._sent[process, begin : begin + piece.numel()] = piece
        words = self._gradients.new_tensor([*_words(nats), supervised_tokens, float(attends)])
        self._sent[:, begin + self._slice : begin + self._slice + _OF_MICRO_BATCH] = words
        self._gradients.zero_()

    def total(self, computed_s: float, waited_s: float, signal: int) -> StepSum:
        """See `step.GradientSum.total`."""
        processes, count = self._processes, sum(map(len, self._shares))
        self._sent[:, -_OF_PROCESS:] = self._gradients.new_tensor([computed_s, waited_s, signal])
        lengths = [self._length(len(share)) for share in self._shares]
        received = self._gradients.new_empty(sum(lengths))
        processes.all_to_all(received, self._sent.view(-1), lengths, [self._sent.shape[1]] * processes.size)
        words: list[list[float]] = [[] for _ in range(count)]
        slices: list[Tensor] = [received] * count
        of_processes = []
        for share, piece in zip(self._shares, received.split(lengths), strict=True):
            for place, number in enumerate(share):
                begin = place * (self._slice + _OF_MICRO_BATCH)
                slices[number] = piece[begin : begin + self._slice]
                words[number] = piece[begin + self._slice : begin + self._slice + _OF_MICRO_BATCH].tolist()
            of_processes.append(piece[-_OF_PROCESS:].tolist())
        added = zero_sum(self._gradients, self._slice)
        for piece in slices:
            added.add_(piece)
        whole = self._gradients.new_empty(processes.size, self._slice)
        processes.all_gather(list(whole.unbind()), added.to(whole.dtype))
        self._gradients.copy_(whole.view(-1)[: self._gradients.numel()])
        return _found(words, of_processes)


class PlainSum:
    """`sum` over several processes: one all-reduce.

    Args:
        gradients: the buffer, (elements,).
        shares: of every process, see `shared_out`.
    """

    def __init__(self, gradients: Tensor, shares: Sequence[Sequence[int]], processes: Exchange) -> None:
        self._gradients = gradients
        self._processes = processes
        self._count = sum(map(len, shares))
        self._words = [[0.0] * _OF_MICRO_BATCH for _ in range(self._count)]

    def add(self, number: int, nats: float, supervised_tokens: int, *, attends: bool) -> None:
        """See `step.GradientSum.add`; the next gradient is added to this one where it stands."""
        self._words[number] = [*_words(nats), float(supervised_tokens), float(attends)]

    def total(self, computed_s: float, waited_s: float, signal: int) -> StepSum:
        """See `step.GradientSum.total`. Each place beside the gradient is written by one process; others add zero."""
        processes, elements = self._processes, self._gradients.numel()
        of_processes = [[0.0] * _OF_PROCESS for _ in range(processes.size)]
        of_processes[processes.rank] = [computed_s, waited_s, float(signal)]
        beside = [word for words in (*self._words, *of_processes) for word in words]
        whole = torch.cat((self._gradients, self._gradients.new_tensor(beside)))
        processes.all_reduce(whole)
        self._gradients.copy_(whole[:elements])
        words = whole[elements:].tolist()
        end = self._count * _OF_MICRO_BATCH
        return _found(_rows(words[:end], _OF_MICRO_BATCH), _rows(words[end:], _OF_PROCESS))


def _words(nats: float) -> tuple[float, float, float]:
    """Three float32 values whose sum is the float64: 24 bits each hold its 53. Not finite values stay so."""
    if not math.isfinite(nats) or abs(nats) > _LARGEST:
        return (math.nan if math.isnan(nats) else math.copysign(math.inf, nats), 0.0, 0.0)
    high = float(torch.tensor(nats, dtype=torch.float32))
    middle = float(torch.tensor(nats - high, dtype=torch.float32))
    return high, middle, nats - high - middle


_LARGEST = torch.finfo(torch.float32).max


def _rows(words: list[float], length: int) -> list[list[float]]:
    return [words[begin : begin + length] for begin in range(0, len(words), length)]


def _found(words: Sequence[Sequence[float]], of_processes: Sequence[Sequence[float]]) -> StepSum:
    return StepSum(
        nats=tuple(high + middle + low for high, middle, low, _, _ in words),
        supervised_tokens=sum(int(supervised) for _, _, _, supervised, _ in words),
        attends=any(attends for *_, attends in words),
        computed_s=tuple(computed for computed, _, _ in of_processes),
        waited_s=tuple(waited for _, waited, _ in of_processes),
        signal=max(int(signal) for _, _, signal in of_processes),
    )
