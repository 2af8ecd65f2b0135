"""The second experiment: adapt a square hidden layer to a target that the base has not learned.

For every seed a base 1 → 64 → 64 → 1 learns sin x. Then adapters of several ranks on the 64 × 64 weight of this frozen
base, and a full update of the same weight, learn another target. The results compare errors and numbers of trained
parameters.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from backhand.lab.sine.network import FloatArray, Network, draw_spread_start
from backhand.lab.sine.options import ShiftedTargetOptions
from backhand.lab.sine.points import Points
from backhand.lab.sine.training import Adam, AdapterTraining, BaseTraining, FullUpdateTraining, train

LAYER = 1
"""Index of the adapted layer, between the first two hidden layers."""


@dataclass(frozen=True)
class ShiftedRow:
    """Results of one rank or of the full update, over all seeds."""

    rank: int | None  # rank of the adapter, None for the full update
    trained_parameters: int
    errors: tuple[float, ...]  # mean squared error after training, one per seed

    @property
    def label(self) -> str:
        """Label, such as `rank 4` or `full`."""
        return _label(self.rank)

    @property
    def mean(self) -> float:
        """Geometric mean of the errors, which span several orders of magnitude."""
        return statistics.geometric_mean(self.errors)

    @property
    def spread(self) -> float:
        """Standard deviation of log₁₀ error over the seeds."""
        return statistics.stdev(math.log10(error) for error in self.errors)

    def gap(self, other: ShiftedRow) -> float:
        """Return how far the mean log₁₀ error of `other` is below this one's, in units of the larger spread."""
        distance = math.log10(self.mean / other.mean)
        return distance / max(self.spread, other.spread, 1e-12)


@dataclass(frozen=True)
class ShiftedResult:
    """Results of the second experiment, and the predictions of the first seed for the picture."""

    base_name: str  # name of the base's target
    points: Points  # the adapters' target
    base_errors: tuple[float, ...]  # errors of the base on its own target, one per seed
    unadapted_errors: tuple[float, ...]  # errors of the base on the shifted target, one per seed
    rows: tuple[ShiftedRow, ...]  # ranks from low to high, then the full update
    predictions: dict[str, FloatArray]  # label → (points, 1) of the first seed, the base first

    @property
    def falls_beyond_spread(self) -> bool:
        """True if the error falls from each row to the next by more than the larger of their spreads."""
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
        seed: seed of the first base; the following bases use the following seeds.

    Raises:
        CheckError: if a loss becomes infinite or NaN.
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

    lora_A is normal with variance 1/in, and lora_B is zero. For a seed the first rows are the same at every rank.
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
