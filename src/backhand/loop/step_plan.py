"""The resolved numbers of a run's steps: how many there are, what is due when, rates and seeds.

They follow from the configuration and the step alone, so that a resumed run needs no other state than the adapter, its
moments and a count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from backhand.errors import not_none
from backhand.loop.step import LearningRate
from backhand.options.config import OptimizationOptions, RunOptions, TrainConfig

DEFAULT_WARMUP_SHARE = 0.03


def default_warmup_steps(total_steps: int) -> int:
    """3 % of all steps, rounded up, but never the whole of a one-step run."""
    return min(math.ceil(DEFAULT_WARMUP_SHARE * total_steps), total_steps - 1)


def chosen_rate(
    options: OptimizationOptions, objective: str, weight_scale: Callable[[], float]
) -> tuple[float, str | None]:
    """The learning rate of a run, and why this one; None where it was given as a number.

        rate = c √g,   at most `HIGHEST_RATE`

    What an adapter adds to W x matters by its share of it, so that larger frozen weights bear a higher rate. c and the
    root were measured, and so was what the rate does not follow: rank, steps, and supervised tokens of a step
    (docs/rates.md).

    Args:
        weight_scale: g, rms(W) √in of the adapted matrices: how much larger W x is than x where they have nothing in
            common.
    """
    rate = options.learning_rate
    if rate != "auto":
        return rate, None
    if objective != "sft":
        return COMPARING_RATE, f"{COMPARING_RATE:g}, the usual one for {objective}; another by --learning-rate"
    rate = float(f"{min(HIGHEST_RATE, RATE * math.sqrt(weight_scale())):.2g}")
    return rate, f"{rate:g}, chosen by the size of the frozen weights (docs/rates.md); another by --learning-rate"


RATE, HIGHEST_RATE = 5.2e-4, 5e-3
COMPARING_RATE = 2e-4


def five_times(total_steps: int) -> int:
    """An interval at which something happens five times a run."""
    return max(1, -(-total_steps // 5))


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """An independent 63-bit seed for one purpose, e.g. the dropout of one micro-batch of one step.

    All of them come from the run's one seed, so nothing random has a state that a checkpoint would have to keep.
    """
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class StepPlan:
    """The resolved numbers that the loop uses."""

    run: RunOptions  # intervals and limits
    micro_batch_rows: int  # rows per forward and backward pass
    rate: LearningRate  # of every step

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> StepPlan:
        """From a resolved configuration, in which nothing is left to choose."""
        options, run = config.optimization, config.run
        chosen = (run.eval_every, run.save_every, options.micro_batch_rows, options.warmup_steps)
        if None in chosen or options.learning_rate == "auto":
            raise ValueError(f"the configuration is not resolved: {chosen}, {options.learning_rate}")
        rate = LearningRate(options.learning_rate, options.schedule, not_none(options.warmup_steps), total_steps)
        return cls(run, not_none(options.micro_batch_rows), rate)

    @property
    def total_steps(self) -> int:
        """Of the run."""
        return self.rate.total_steps
