"""How micro-batches add up: in their own order, whoever computed them, or in one sum."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backhand.distributed.communicator import Communicator, GradientSum, MicroBatchResult, StepTotals, sequential_sum
from backhand.distributed.gradient_sums import OrderedSum, PlainSum, assign

Kind = Callable[[Tensor, Sequence[Sequence[int]], "Meeting"], GradientSum]


def plain(gradients: Tensor, _: Sequence[Sequence[int]], processes: Meeting) -> PlainSum:
    return PlainSum(gradients, processes)


def ordered(gradients: Tensor, shares: Sequence[Sequence[int]], processes: Meeting) -> OrderedSum:
    return OrderedSum(gradients, shares, processes)


UNIT = 2.0**-24


class Meeting(Communicator):
    """One thread's end of an exchange."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[object]) -> None:
        super().__init__()
        self.rank, self.world_size, self._barrier, self._table = rank, size, barrier, table

    def _shown(self, mine: object) -> list[object]:
        self._table[self.rank] = mine
        self._barrier.wait(30)
        seen = list(self._table)
        self._barrier.wait(30)
        return seen

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        pieces = [theirs[self.rank] for theirs in self._shown(sent.split(sent_sizes))]  # type: ignore[index]
        assert [piece.numel() for piece in pieces] == received_sizes
        received.copy_(torch.cat(pieces))

    def all_gather(self, received: list[Tensor], sent: Tensor) -> None:
        for place, theirs in zip(received, self._shown(sent), strict=True):
            place.copy_(theirs)  # type: ignore[arg-type]

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._shown(json.loads(json.dumps(value)))

    def all_reduce(self, tensor: Tensor) -> None:
        shown = self._shown(tensor.clone())
        tensor.copy_(torch.stack(shown).sum(0))  # type: ignore[arg-type]


def step(
    kind: Kind, gradients: Tensor, nats: Sequence[float], shares: Sequence[Sequence[int]]
) -> list[tuple[Tensor, StepTotals]]:
    """What every process ends with, of micro-batches with these gradients, (count, elements)."""
    size, found = len(shares), {}
    barrier, table = threading.Barrier(size), [None] * size

    def process(rank: int) -> None:
        buffer, meeting = torch.zeros(gradients.shape[1]), Meeting(rank, size, barrier, table)  # type: ignore[arg-type]
        meeting.waited_s = 0.25 * rank
        found[rank] = buffer, summed(meeting, kind(buffer, shares, meeting), buffer, gradients, nats, shares[rank])

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


def summed(
    processes: Communicator,
    added: GradientSum,
    buffer: Tensor,
    gradients: Tensor,
    nats: Sequence[float],
    share: Sequence[int],
) -> StepTotals:
    for number in share:
        buffer += gradients[number]
        added.add()
    own = [MicroBatchResult(number, nats[number], 3 + number, number == 1) for number in share]
    return processes.reduce_step(added, own, 0.5 + processes.rank)


def alone(gradients: Tensor, nats: Sequence[float]) -> tuple[Tensor, StepTotals]:
    buffer, processes, share = torch.zeros(gradients.shape[1]), Communicator(), range(len(gradients))
    return buffer, summed(processes, processes.gradient_sum(buffer, [share]), buffer, gradients, nats, share)


def drawn(count: int, elements: int, seed: int) -> tuple[Tensor, list[float]]:
    """Numbers of many sizes, so that every order of adding them has its own last bits."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, elements, generator=generator)
    gradients *= 10 ** torch.randint(-3, 3, (count, 1), generator=generator).float()
    return gradients, (100 * torch.rand(count, generator=generator, dtype=torch.float64)).tolist()


@given(size=st.integers(1, 4), count=st.integers(1, 7), elements=st.integers(1, 40), seed=st.integers(0, 1 << 20))
@settings(max_examples=40)
def test_ordered_is_one_process_to_the_bit(size: int, count: int, elements: int, seed: int) -> None:
    gradients, nats = drawn(count, elements, seed)
    expected, alone_found = alone(gradients, nats)
    shares = assign([7 + number % 3 for number in range(count)], size)
    for buffer, found in step(ordered, gradients, nats, shares):
        assert torch.equal(buffer, expected)
        assert found.losses == tuple(nats) == alone_found.losses
        assert found.supervised_tokens == sum(range(3, 3 + count)) and found.attends == (count > 1)
        assert found.computed_s == tuple(0.5 + rank for rank in range(size))
        assert found.waited_s == tuple(0.25 * rank for rank in range(size))


def test_another_order_has_other_bits() -> None:
    """The proof above can fail: a sum that takes each process's micro-batches together is not the same."""
    gradients, nats = drawn(6, 200, seed=1)
    shares = [[0, 3, 4], [1, 2, 5]]
    together = sum(gradients[share[0]] + gradients[share[1]] + gradients[share[2]] for share in shares)
    expected, _ = alone(gradients, nats)
    assert isinstance(together, Tensor) and not torch.equal(together, expected)
    assert not torch.equal(step(plain, gradients, nats, shares)[0][0], expected)
    assert torch.equal(step(ordered, gradients, nats, shares)[0][0], expected)


@given(size=st.integers(2, 4), count=st.integers(1, 7), seed=st.integers(0, 1 << 20))
@settings(max_examples=40)
def test_sum_lies_within_its_bound(size: int, count: int, seed: int) -> None:
    gradients, nats = drawn(count, 50, seed)
    expected, _ = alone(gradients, nats)
    share = (count - 1) * UNIT
    bound = 2 * share / (1 - share) * gradients.abs().double().sum(0)
    for buffer, found in step(plain, gradients, nats, assign([5] * count, size)):
        assert torch.all((buffer.double() - expected.double()).abs() <= bound)
        assert found.losses == tuple(nats)
        assert found.supervised_tokens == sum(range(3, 3 + count))
        assert found.computed_s == tuple(0.5 + rank for rank in range(size))
        assert found.waited_s == tuple(0.25 * rank for rank in range(size))


@pytest.mark.parametrize("kind", [ordered, plain])
def test_what_is_not_finite_arrives_so(kind: Kind) -> None:
    gradients, nats = drawn(3, 5, seed=2)
    gradients[2, 1] = math.inf
    buffer, found = step(kind, gradients, [nats[0], math.nan, 1e300], assign([1] * 3, 2))[0]
    assert torch.isinf(buffer[1]) and torch.isfinite(buffer[0])
    assert found.losses[0] == nats[0] and math.isnan(found.losses[1]) and found.losses[2] == 1e300


def test_shares_are_by_tokens_and_hold_each_once() -> None:
    assert assign([90, 50, 40, 10], 2) == [[0, 3], [1, 2]]
    assert assign([4], 3) == [[0], [], []]
    assert sorted(number for share in assign([3] * 11, 4) for number in share) == list(range(11))


@pytest.mark.parametrize("size", [1, 3])
def test_many_micro_batches_round_no_more_than_one(size: int) -> None:
    """Float32 from the left would lose every one of them when it is added to the first."""
    count = 4_097
    gradients = torch.full((count, 2), 2.0**-25)
    gradients[0] = 1.0
    nats, shares = [0.0] * count, assign([1] * count, size)
    expected = 1 + 2.0**-13
    assert left_float32(gradients[:, 0]) == 1.0
    for buffer, _ in [alone(gradients, nats)] if size == 1 else step(ordered, gradients, nats, shares):
        assert buffer.tolist() == [expected, expected]


def left_float32(values: Tensor) -> float:
    total = torch.zeros(())
    for value in values:
        total += value
    return float(total)


def test_sequential_sum_does_not_compensate() -> None:
    assert sequential_sum([1e16, 1.0, 1.0, -1e16]) == 0.0
