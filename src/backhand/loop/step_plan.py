"""The plan of a run's steps: how many there are, their learning rates and seeds, and the intervals of evaluations.

All of it follows from the configuration and the step number. Therefore a resumed run needs only the adapter, AdamW's
moments and the number of steps done.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from backhand.errors import not_none
from backhand.loop.step import LearningRate
from backhand.objective.spec import Traits
from backhand.options.config import OptimizationOptions, RunOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions

DEFAULT_WARMUP_SHARE = 0.03


def default_warmup_steps(total_steps: int) -> int:
    """Return 3 % of all steps, rounded up, but fewer than all steps."""
    return min(math.ceil(DEFAULT_WARMUP_SHARE * total_steps), total_steps - 1)


def chosen_rate(
    options: OptimizationOptions, objective: ObjectiveOptions, total_steps: int, weight_scale: Callable[[], float]
) -> tuple[float, str | None]:
    """Return the learning rate of a run, and the reason for it, or None if the rate was given as a number.

        rate = c k √g,   at most `HIGHEST_RATE`

    The effect of an adapter depends on the size of its update relative to W x, so larger frozen weights allow a higher
    rate. The constant c and the root were measured. Measurements also show that the best rate does not depend on the
    adapter's rank, the number of steps, or the supervised tokens per step (docs/rates.md).

    The factor k is 1, except in short runs of objectives whose labels mean nothing to the model at first. At k = 1, the
    rate falls to zero before they mean something. k is at most `Traits.short_run_factor`. It falls to 1 at 200 steps.

    Args:
        options: the options of the optimizer.
        objective: the options of the objective.
        total_steps: number of steps of the run.
        weight_scale: returns g = rms(W) √in of the adapted matrices, which is |W x| / |x| for an x unrelated to W.
    """
    rate = options.learning_rate
    if rate != "auto":
        return rate, None
    if not objective.traits.rate_rule:
        usual = f"{COMPARING_RATE:g}, the usual one for {objective.objective}; another by --learning-rate"
        return COMPARING_RATE, usual
    factor = short_run_factor(objective, total_steps)
    rate = float(f"{min(HIGHEST_RATE, RATE * factor * math.sqrt(weight_scale())):.2g}")
    reasons = "the size of the frozen weights" + " and the number of steps" * (objective.traits.short_run_factor > 1)
    return rate, f"{rate:g}, chosen by {reasons}; another by --learning-rate"


def short_run_factor(objective: ObjectiveOptions, total_steps: int) -> float:
    """Return k of `chosen_rate`."""
    traits: Traits = objective.traits
    return min(traits.short_run_factor, max(1.0, _SHORT_STEPS / total_steps))


def rate_note(rate: float | str, objective: ObjectiveOptions) -> str | None:
    """Return a warning of a given rate that is far from those that train an adapter, or None."""
    lowest, highest = _RATES if objective.traits.rate_rule else _COMPARING_RATES
    if isinstance(rate, str) or lowest <= rate <= highest:
        return None
    far = "above the usual ones of {}, so that training probably diverges"
    if rate < lowest:
        far = "below the usual ones of {}, so that the adapter hardly changes"
    remedy = "leave out --learning-rate to choose one automatically"
    return f"warning: the learning rate {rate:g} is far {far.format(objective.objective)}; {remedy}"


RATE, HIGHEST_RATE = 5.2e-4, 5e-3
COMPARING_RATE = 2e-4
_RATES, _COMPARING_RATES = (1e-6, 10 * HIGHEST_RATE), (1e-7, 50 * COMPARING_RATE)
"""Rates between which a run may be meant: those of docs/rates.md with a wide margin."""
_SHORT_STEPS = 200  # runs with fewer steps may have a higher rate


def five_times(total_steps: int) -> int:
    """Return the interval of an event that happens five times per run."""
    return max(1, -(-total_steps // 5))


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return an independent 63-bit seed for one purpose, e.g. the dropout of one micro-batch of one step.

    All seeds are derived from the run's seed, so a checkpoint needs no random state.
    """
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class StepPlan:
    """The number of steps, the learning rates and the intervals that the loop uses. All options are resolved."""

    run: RunOptions  # intervals and limits
    micro_batch_rows: int  # number of rows per forward and backward pass
    rate: LearningRate  # the learning rate of every step

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> StepPlan:
        """Return the plan of a resolved configuration. Raises ValueError if an option is unresolved."""
        options, run = config.optimization, config.run
        chosen = (run.eval_every, run.save_every, options.micro_batch_rows, options.warmup_steps)
        if None in chosen or options.learning_rate == "auto":
            raise ValueError(f"the configuration is not resolved: {chosen}, {options.learning_rate}")
        rate = LearningRate(options.learning_rate, options.schedule, not_none(options.warmup_steps), total_steps)
        return cls(run, not_none(options.micro_batch_rows), rate)

    @property
    def total_steps(self) -> int:
        """Number of steps of the run."""
        return self.rate.total_steps
