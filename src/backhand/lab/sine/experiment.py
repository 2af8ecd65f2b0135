"""Both experiments from options to numbers, without a word printed."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from backhand.lab.sine.network import (
    FloatArray,
    Network,
    Points,
    Start,
    draw_spread_start,
    draw_start,
    make_points,
    read_start,
)
from backhand.lab.sine.options import ShiftedTargetOptions, SineOptions
from backhand.lab.sine.training import Adam, AdapterTraining, BaseTraining, FullUpdateTraining, GradientDescent, train
from backhand.lab.sine.walk import CheckRow, Formula, check_gradients, walk


@dataclass(frozen=True)
class PartResult:
    """One part."""

    part: str  # `base` or `lora`
    learning_rate: float
    losses: npt.NDArray[np.float64]  # (epochs,) before each update
    final_loss: float  # after the last update
    predictions: FloatArray  # (points, 1) after the last update
    trained_parameters: int
    train_s: float  # wall seconds of the loop, comparisons with autograd included
    walk: list[Formula]  # the epoch that was walked through, if any
    check: list[CheckRow]  # comparisons with autograd, empty unless asked for


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
    shifted: ShiftedResult | None  # the second experiment, None if left out

    @property
    def check(self) -> list[CheckRow]:
        """Comparisons with autograd of both parts, empty unless asked for."""
        return self.base.check + self.lora.check

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
    second, sizes = options.second, (options.widths, options.rank)
    points = make_points(options.target, options.points, options.dtype)
    shifted_points = None
    if second.shifted:
        shifted_points = make_points(second.shifted_target, options.points, options.dtype, points.x)
    if options.start is None:
        start = draw_start(*sizes, options.seed, options.dtype)
    else:
        start = read_start(options.start, *sizes, options.dtype)
    training = BaseTraining(start.network, points)
    base = _run_part(options, points, training, progress)
    network = training.network
    with read_only(network):
        digest_before = network.digest()
        adapter = AdapterTraining(network, 0, points, start.lora_A, start.lora_B, options.scaling)
        lora = _run_part(options, points, adapter, progress)
        digest_after = network.digest()
    shifted = None
    if shifted_points is not None:
        shifted = run_shifted_target(
            points, shifted_points, second, options.seed, lambda text: progress(f"second experiment: {text}")
        )
    return SineResult(points, start, base, lora, digest_before, digest_after, shifted)


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


def _run_part(
    options: SineOptions, points: Points, training: BaseTraining | AdapterTraining, progress: Callable[[str], None]
) -> PartResult:
    if isinstance(training, BaseTraining):
        part, where, epochs, rate = "base", "part 1, base", options.base_epochs, options.base_learning_rate
    else:
        part, where, epochs, rate = "lora", "part 2, LoRA", options.lora_epochs, options.lora_learning_rate
    progress(f"{where}: {epochs:,} epochs")
    walked: list[Formula] = []
    compared: list[CheckRow] = []
    checked = {epoch % epochs for epoch in options.check_epochs if options.check and -epochs <= epoch < epochs}
    stepped = {options.step_epoch} if options.step else set()

    def observe(epoch: int) -> None:
        if epoch in checked:
            compared.extend(check_gradients(training, points, part, epoch))
        if epoch in stepped:
            walked.extend(walk(training, points, rate))

    optimizer = GradientDescent(training.parameters, rate)
    began = time.perf_counter()
    losses = train(training, optimizer, epochs, observe=observe, observe_epochs=checked | stepped, where=where)
    train_s = time.perf_counter() - began
    final_loss, count = training.forward(), training.parameters.values.size
    return PartResult(part, rate, losses, final_loss, training.head.outputs, count, train_s, walked, compared)


# The second experiment: a square hidden layer is adapted to a target that the base has not seen.
#
# For every seed a base 1 → 64 → 64 → 1 learns sin x. Then, from that same frozen base, adapters of several ranks on the
# 64 × 64 weight, and a full update of it, learn another target: error and number of trained parameters side by side.

LAYER = 1
"""The adapted layer: the one between the first two hidden layers."""


@dataclass(frozen=True)
class ShiftedRow:
    """One way of adapting, over all seeds."""

    rank: int | None  # of the adapter; None for the full update
    trained_parameters: int
    errors: tuple[float, ...]  # mean squared error after training, one per seed

    @property
    def label(self) -> str:
        """`rank 4`, or `full`."""
        return _label(self.rank)

    @property
    def mean(self) -> float:
        """Geometric mean of the errors, which span decades."""
        return statistics.geometric_mean(self.errors)

    @property
    def spread(self) -> float:
        """Standard deviation of log₁₀ error over the seeds."""
        return statistics.stdev(math.log10(error) for error in self.errors)

    def gap(self, other: ShiftedRow) -> float:
        """By how many of the larger spread the mean log₁₀ error of `other` lies below this one's."""
        distance = math.log10(self.mean / other.mean)
        return distance / max(self.spread, other.spread, 1e-12)


@dataclass(frozen=True)
class ShiftedResult:
    """The table, and the fits of the first seed for the picture."""

    base_name: str  # what the base learned
    points: Points  # what the adapters learned
    base_errors: tuple[float, ...]  # of the base on its own target, one per seed
    unadapted_errors: tuple[float, ...]  # of the base on the shifted target, one per seed
    rows: tuple[ShiftedRow, ...]  # ranks from low to high, then the full update
    predictions: dict[str, FloatArray]  # label to (points, 1), of the first seed, the base first

    @property
    def falls_beyond_spread(self) -> bool:
        """Whether the error falls from each row to the next by more than the larger of their spreads."""
        return all(row.gap(following) > 1 for row, following in pairwise(self.rows))


def run_shifted_target(
    base_points: Points,
    shifted_points: Points,
    options: ShiftedTargetOptions,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> ShiftedResult:
    """Train every base, adapter and full update.

    Args:
        seed: of the first base; the next ones count up.

    Raises:
        CheckError: a loss is not finite.
    """
    ranks: tuple[int | None, ...] = (*sorted(set(options.shifted_ranks)), None)
    base_errors: list[float] = []
    trained_parameters: dict[int | None, int] = {}
    predictions: list[dict[str, FloatArray]] = []
    for number in range(options.shifted_seeds):
        progress(f"seed {number + 1} of {options.shifted_seeds}")
        network = _train_base(base_points, options, seed + number)
        base_errors.append(_error(network.predict(base_points.x), base_points))
        predictions.append({"base": network.predict(shifted_points.x)})
        for rank in ranks:
            trained = _adapt(network, shifted_points, options, rank, seed + number)
            predictions[-1][_label(rank)] = network.predict(shifted_points.x, trained.delta_weight, LAYER)
            trained_parameters[rank] = trained.parameters.values.size
    errors = {
        label: tuple(_error(of_seed[label], shifted_points) for of_seed in predictions) for label in predictions[0]
    }
    rows = tuple(ShiftedRow(rank, trained_parameters[rank], errors[_label(rank)]) for rank in ranks)
    return ShiftedResult(base_points.name, shifted_points, tuple(base_errors), errors["base"], rows, predictions[0])


def _label(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"


def _train_base(points: Points, options: ShiftedTargetOptions, seed: int) -> Network:
    base = BaseTraining(draw_spread_start(options.shifted_widths, seed, points.x), points)
    epochs = options.shifted_base_epochs
    optimizer = Adam(base.parameters, options.shifted_base_learning_rate, epochs)
    train(base, optimizer, epochs, where="second experiment, base")
    return base.network


def _adapt(
    network: Network, points: Points, options: ShiftedTargetOptions, rank: int | None, seed: int
) -> AdapterTraining | FullUpdateTraining:
    """Train an adapter of `rank`, or the full update, from the frozen base.

    lora_A is normal with variance 1/in and lora_B zero; the same seed draws the same first rows for every rank.
    """
    trained: AdapterTraining | FullUpdateTraining = FullUpdateTraining(network, LAYER, points)
    learning_rate, label = options.shifted_full_learning_rate, "full update"
    if rank is not None:
        outputs, inputs = network.weights[LAYER].shape
        drawn = np.random.default_rng([seed, 1]).standard_normal((rank, inputs)) / np.sqrt(inputs)
        factors = drawn.astype(points.y.dtype), np.zeros((outputs, rank), points.y.dtype)
        trained = AdapterTraining(network, LAYER, points, *factors, options.shifted_scaling)
        learning_rate, label = options.shifted_learning_rate, _label(rank)
    optimizer = Adam(trained.parameters, learning_rate, options.shifted_epochs)
    train(trained, optimizer, options.shifted_epochs, where=f"second experiment, {label}")
    return trained


def _error(prediction: FloatArray, points: Points) -> float:
    error = float(np.mean((prediction.astype(np.float64) - points.y) ** 2))
    return max(error, sys.float_info.min)  # the table takes logarithms
