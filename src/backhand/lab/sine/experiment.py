"""The experiment from options to numbers, without a word printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from backhand.lab.sine.check import CheckRow, check_adapter, check_base
from backhand.lab.sine.network import FloatArray, Network, Points, Start, draw_start, make_points, read_start
from backhand.lab.sine.options import SineOptions
from backhand.lab.sine.shifted_target import ShiftedResult, run_shifted_target
from backhand.lab.sine.training import AdapterTraining, BaseTraining, GradientDescent, train
from backhand.lab.sine.walk import WalkLine, walk_adapter, walk_base


@dataclass(frozen=True)
class PartResult:
    """One part."""

    part: str  # `base` or `lora`
    losses: npt.NDArray[np.float64]  # (epochs,) before each update
    final_loss: float  # after the last update
    predictions: FloatArray  # (points, 1) after the last update
    trained_parameters: int
    train_s: float  # wall seconds of the loop, comparisons with autograd included
    walk: list[WalkLine]  # the epoch that was walked through, if any


@dataclass(frozen=True)
class SineResult:
    """Everything that the experiment found."""

    points: Points
    start: Start
    base: PartResult
    lora: PartResult
    # digest_before, digest_after: SHA-256 of the frozen base before and after part 2
    digest_before: str
    digest_after: str
    check: list[CheckRow] = field(default_factory=list)  # comparisons with autograd, empty unless asked for
    shifted: ShiftedResult | None = None  # the second experiment, None if left out

    @property
    def frozen_unchanged(self) -> bool:
        """Whether not one bit of the base moved in part 2."""
        return self.digest_before == self.digest_after

    @property
    def failed_checks(self) -> list[CheckRow]:
        """Comparisons out of bounds."""
        return [row for row in self.check if not row.passed]


def run_sine(options: SineOptions, progress: Callable[[str], None] = lambda _: None) -> SineResult:
    """Run part 1, part 2 and the second experiment.

    Raises:
        UsageError: an option out of range.
        DataError: `target` or `start` name a file that cannot be used.
        CheckError: a loss is not finite any more.
    """
    options.validate()
    points = make_points(options.target, options.points, options.dtype)
    shifted_points = _shifted_points(options, points)
    start = (
        draw_start(options.widths, options.rank, options.seed, options.dtype)
        if options.start is None
        else read_start(options.start, options.widths, options.rank, options.dtype)
    )
    check: list[CheckRow] = []
    progress(f"part 1, base: {options.base_epochs:,} epochs")
    base, network = _run_base(options, points, start, check)
    progress(f"part 2, LoRA: {options.lora_epochs:,} epochs")
    with read_only(network):
        digest_before = network.digest()
        lora = _run_lora(options, points, start, network, check)
        digest_after = network.digest()
    shifted = None
    if shifted_points is not None:
        shifted = run_shifted_target(
            points,
            shifted_points,
            options.second,
            options.seed,
            lambda text: progress(f"second experiment: {text}"),
        )
    return SineResult(points, start, base, lora, digest_before, digest_after, check, shifted)


@contextmanager
def read_only(network: Network) -> Iterator[None]:
    """Frozen in earnest: writing to a weight raises."""
    arrays = (*network.weights, network.bias)
    for array in arrays:
        array.flags.writeable = False
    try:
        yield
    finally:
        for array in arrays:
            array.flags.writeable = True


def _shifted_points(options: SineOptions, points: Points) -> Points | None:
    if not options.second.shifted:
        return None
    return make_points(options.second.shifted_target, options.points, options.dtype, points.x)


def _run_base(options: SineOptions, points: Points, start: Start, check: list[CheckRow]) -> tuple[PartResult, Network]:
    training, rate = BaseTraining(start.network, points), options.base_learning_rate
    result = _run_part(
        _Part("base", "part 1, base", training, options.base_epochs, rate),
        options,
        lambda epoch: check.extend(check_base(training, points, epoch)),
        lambda: walk_base(training, points, rate),
        lambda: training.network.predict(points.x),
    )
    return result, training.network


def _run_lora(
    options: SineOptions, points: Points, start: Start, network: Network, check: list[CheckRow]
) -> PartResult:
    training = AdapterTraining(network, 0, points, start.lora_A, start.lora_B, options.scaling)
    rate = options.lora_learning_rate
    return _run_part(
        _Part("lora", "part 2, LoRA", training, options.lora_epochs, rate),
        options,
        lambda epoch: check.extend(check_adapter(training, network, points, epoch)),
        lambda: walk_adapter(training, network, points, rate),
        lambda: network.predict(points.x, training.delta_weight),
    )


class _Part(NamedTuple):
    name: str
    where: str
    training: BaseTraining | AdapterTraining
    epochs: int
    learning_rate: float


def _run_part(
    part: _Part,
    options: SineOptions,
    compare: Callable[[int], None],
    walked: Callable[[], list[WalkLine]],
    predicted: Callable[[], FloatArray],
) -> PartResult:
    training = part.training
    walk: list[WalkLine] = []
    checked = _epochs_to_check(options, part.epochs)

    def observe(epoch: int) -> None:
        if epoch in checked:
            compare(epoch)
        if options.step and epoch == options.step_epoch:
            walk.extend(walked())

    optimizer = GradientDescent(training.parameters, part.learning_rate)
    began = time.perf_counter()
    observed = checked | ({options.step_epoch} if options.step else frozenset())
    losses = train(training, optimizer, part.epochs, observe=observe, observe_epochs=observed, where=part.where)
    train_s = time.perf_counter() - began
    final_loss, count = training.forward(), training.parameters.values.size
    return PartResult(part.name, losses, final_loss, predicted(), count, train_s, walk)


def _epochs_to_check(options: SineOptions, epochs: int) -> frozenset[int]:
    """Those of check_epochs that a part of so many epochs has; negative ones count from the end."""
    if not options.check:
        return frozenset()
    places = (epoch if epoch >= 0 else epochs + epoch for epoch in options.check_epochs)
    return frozenset(place for place in places if 0 <= place < epochs)
