"""Run the sine experiment: part 1 trains the base, part 2 an adapter. Nothing is printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backhand.lab.sine.check import CheckRow, check_gradients
from backhand.lab.sine.network import FloatArray, Network, Start, draw_start, read_start
from backhand.lab.sine.options import SineOptions
from backhand.lab.sine.points import Points, make_points
from backhand.lab.sine.shifted_target import ShiftedResult, run_shifted_target
from backhand.lab.sine.training import AdapterTraining, BaseTraining, GradientDescent, train
from backhand.lab.sine.walk import Formula, walk


@dataclass(frozen=True)
class PartResult:
    """Results of one part."""

    part: str  # `base` or `lora`
    learning_rate: float
    losses: npt.NDArray[np.float64]  # (epochs,) before each update
    final_loss: float  # after the last update
    predictions: FloatArray  # (points, 1) after the last update
    trained_parameters: int
    train_s: float  # wall-clock seconds of the loop, including comparisons with autograd
    walk: list[Formula]  # the epoch formula by formula, empty unless requested
    check: list[CheckRow]  # comparisons with autograd, empty unless requested


@dataclass(frozen=True)
class SineResult:
    """Results of the experiment."""

    points: Points
    start: Start
    base: PartResult
    lora: PartResult
    digest_before: str  # SHA-256 of the frozen base before part 2
    digest_after: str  # SHA-256 of the frozen base after part 2
    shifted: ShiftedResult | None  # the second experiment, None if it was not run

    @property
    def check(self) -> list[CheckRow]:
        """Comparisons with autograd of both parts, empty unless requested."""
        return self.base.check + self.lora.check

    @property
    def frozen_unchanged(self) -> bool:
        """True if no bit of the base changed in part 2."""
        return self.digest_before == self.digest_after

    @property
    def failed_checks(self) -> list[CheckRow]:
        """Comparisons with autograd that failed."""
        return [row for row in self.check if not row.passed]


def run_sine(options: SineOptions, progress: Callable[[str], None] = lambda _: None) -> SineResult:
    """Run part 1, part 2 and the second experiment.

    Raises:
        UsageError: if an option is out of range.
        DataError: if `target` or `start` name a file that cannot be used.
        CheckError: if a loss becomes infinite or NaN.
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
    """Make the network's arrays read-only, so that writing to a frozen weight raises an error."""
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
