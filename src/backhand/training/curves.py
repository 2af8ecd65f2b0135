"""The curves of a finished run, and what they say.

The held-out losses are e_0 (before the first step), e_1, …, e_n. Let e_b be the lowest of e_1, …, e_n, and e_m the last
one in the first four fifths of the steps:

    gain = e_0 - e_b        learnt by the run
    rise = e_n - e_b        lost again after the best evaluation
    last = e_m - e_n        learnt in the last fifth of the steps

The progress of a run is measured by the sum of its learning rates instead of the number of steps, because steps at the
end of a schedule are small. This has two consequences:

- The loss is still falling if `last` is a clear share of the gain or of e_n, and the lowest loss is in the last fifth.
  The last piece of the last fifth must also have reduced it, per unit of this sum, at least half as much as the whole
  last fifth.
- If a run of n steps was best at step k, a shorter run with its own schedule learns as much. Its number of steps is
      n · (sum of the rates of the first k steps) / (sum of the rates of all n steps)
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from backhand.loop.step import LearningRate
from backhand.options.config import OptimizationOptions
from backhand.runs.summary import forgotten_nats

Finding = Literal[
    "memorised",
    "unsteady",
    "not better",
    "above constant",
    "hardly moved",
    "rose",
    "still falling",
    "forgot",
    "low",
    "late",
    "fine",
]

LITTLE = 0.02
"""A gain below this share of e_0 is small."""
RISEN = 0.03
"""A rise above this share of e_b is more than noise."""
FALLING = 0.05
"""If `last` is above this share of the gain, more steps would reduce the loss further."""
OF_THE_REST = 0.015
"""The same if `last` is above this share of the gain and above the share `FALLING` of e_n: the rest can be small."""
LAST = 0.2
"""The share of the steps at the end in which `last` is measured. In a shorter part, the rates are too low to matter."""
SLOWER = 0.5
"""Share of the mean speed of the last fifth below which its last piece counts as no longer falling."""
LATE = 0.5
"""A larger share of the gain in the second half of the steps means that the loss fell late."""
MIDDLE = 0.4
"""The last evaluation in the first half tells what came in the second one if it is after this share of the steps."""
LOW = 1 / 3
"""A rate below this share of `auto`'s rate may have learnt less than possible. No lower one is proposed."""
HIGH = 1.5
"""Above this multiple of `auto`'s rate, `auto`'s rate is proposed first."""
MEMORISED = 0.2
"""Training rows are memorised if their loss falls below this share of the first one, and the held-out loss does not."""
QUARTER = 0.25
"""Share of the sum of all rates at the end, in which a training loss may fall steeply: half of a linear schedule."""
CERTAIN = 2.0
"""A fall of the training loss by more than this multiple of its standard error is no chance of the batches."""
PIECE = 0.01
"""A last piece with a smaller share of the sum of all rates is too noisy to use."""
SPIKE = 1.3
"""Multiple of the loss of the first steps from which on a later loss counts as a spike."""
PEAK = 0.05
"""Share of e_0 by which the held-out loss rises and falls again if a spike was instability and not a hard batch."""
FORGOTTEN_NATS = 1.5
"""Rise of the loss on neutral texts, in nats per token, that counts as much forgetting."""


@dataclass(frozen=True)
class Curves:
    """The losses of a run."""

    held_out: Sequence[tuple[int, float]]  # (step, loss) of every finite evaluation, beginning before the first step
    training: Sequence[float]  # the loss of every logged step
    forgotten_nats: float | None = None  # rise on neutral texts at the best evaluation; None if not measured
    # share of the groups of a run on rewards whose answers all had the same reward
    no_gradient_share: float = 0.0
    without_gradient: bool = False  # every step of a run on rewards had the gradient 0
    rewards: Sequence[float] = ()  # the finite mean rewards of the logged steps of such a run
    cut_off: float = 0.0  # share of its answers that were cut off at the limit of tokens
    # loss of a new head before the first step, if `held_out` has that of the best constant answer instead, else None
    first_loss: float | None = None

    @property
    def best(self) -> tuple[int, float]:
        """Step and loss of the lowest evaluation after the first one."""
        return min(self.held_out[1:], key=lambda one: one[1])

    @property
    def training_ends(self) -> tuple[float, float]:
        """Mean training loss of the first and of the last fifth of the logged steps; not a number without any."""
        few = max(1, len(self.training) // 5)
        if not self.training:
            return math.nan, math.nan
        return statistics.fmean(self.training[:few]), statistics.fmean(self.training[-few:])

    @property
    def middle(self) -> int:
        """Step of the last evaluation in the first half of the steps."""
        return max(step for step, _ in self.held_out if 2 * step <= self.held_out[-1][0])

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], constant_loss: float | None = None) -> Curves:
        """Return the curves in the lines of metrics.jsonl.

        Args:
            records: the lines.
            constant_loss: held-out loss of the best constant answer, with a head. The loss before the first step is
                at most this one, because a new head is random.
        """
        evaluations = [one for one in records if _is_finite(one.get("eval_loss"))]
        # If a step was evaluated twice, the later evaluation counts.
        held_out = list({one["step"]: one["eval_loss"] for one in evaluations}.items())
        first_loss = None
        if constant_loss is not None and held_out and held_out[0][1] > constant_loss:
            step, first_loss = held_out[0]
            held_out[0] = step, constant_loss
        best = min(evaluations[1:], key=lambda one: one["eval_loss"], default=None)
        losses = [one["loss"] for one in records if _is_finite(one.get("loss"))]
        forgot = None if best is None else forgotten_nats(records, best["step"])
        curves = cls(held_out, losses, forgot, first_loss=first_loss)
        rewarded = [one for one in records if _is_finite(one.get("no_gradient_groups"))]
        if not rewarded:
            return curves
        return replace(
            curves,
            no_gradient_share=statistics.mean(one["no_gradient_groups"] for one in rewarded),
            without_gradient=all(one["grad_norm"] == 0 for one in rewarded),
            rewards=[one["reward"] for one in rewarded if _is_finite(one["reward"])],
            cut_off=statistics.mean(one["clipped_answers"] for one in rewarded),
        )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


Until = Callable[[int, int], float]
"""Maps (step, number of steps made) to the sum of the rates before the step as a share of the sum of all rates."""


def rates_until(options: OptimizationOptions, total_steps: int) -> Until:
    """Return the function `Until` for a schedule of `total_steps` steps. The run may have made fewer steps."""
    plan = LearningRate(1.0, options.schedule, options.warmup_steps or 0, total_steps)
    sums = list(itertools.accumulate(map(plan.at, range(total_steps)), initial=0.0))
    return lambda step, steps: sums[step] / sums[steps]


def first_finding(curves: Curves, until: Until, share: float = 1.0) -> Finding | None:
    """Return the first finding that applies, or None if there are too few evaluations.

    Args:
        curves: the losses of the run.
        until: the sums of its learning rates.
        share: its learning rate relative to `auto`'s rate.
    """
    if len(curves.held_out) < 3:
        return None
    losses = [loss for _, loss in curves.held_out]
    base, best = losses[0], curves.best[1]
    steps = curves.held_out[-1][0]
    before = max((step for step, _ in curves.held_out if step <= (1 - LAST) * steps), default=None)
    if before is None:  # the evaluation before the first step is missing
        return None
    gain, rise, last = base - best, losses[-1] - best, dict(curves.held_out)[before] - losses[-1]
    first, end = curves.training_ends
    if share <= HIGH and gain < LITTLE * abs(base) and end < MEMORISED * min(base, first):
        return "memorised"
    pieces = [one for one in curves.held_out if before < one[0] and until(one[0], steps) <= 1 - PIECE]
    # Without an evaluation inside the last fifth, the whole last fifth is the last piece.
    between, middle = pieces[-1] if pieces else (before, losses[-1] + last)
    share_of_stretch = (1 - until(between, steps)) / (1 - until(before, steps))
    much = last > FALLING * gain or (last > FALLING * abs(losses[-1]) and last > OF_THE_REST * gain)
    falling = curves.best[0] > before and much and middle - losses[-1] >= SLOWER * last * share_of_stretch
    few = max(1, len(curves.training) // 10)
    later = curves.training[2 * few :] if len(curves.training) >= 4 * few else ()
    # Batches differ in difficulty, so a spike of the training loss alone is no evidence.
    spiked = later and max(later) > SPIKE * statistics.mean(curves.training[:few])
    measured = [base if curves.first_loss is None else curves.first_loss, *losses[1:]]
    if spiked and _peak(measured) > PEAK * abs(base):
        return "unsteady"
    if gain < LITTLE * abs(base):
        if measured[0] - best >= LITTLE * abs(base) and rise <= RISEN * abs(best):
            return "low" if share < LOW else "above constant"
        return "hardly moved" if max(losses) - base < LITTLE * abs(base) else "not better"
    if share < LOW:
        return "low"
    if rise > RISEN * abs(best):
        return "rose"
    if falling:
        return "still falling"
    if curves.forgotten_nats is not None and curves.forgotten_nats > FORGOTTEN_NATS:
        return "forgot"
    half = curves.middle
    return "late" if half >= MIDDLE * steps and dict(curves.held_out)[half] - losses[-1] > LATE * gain else "fine"


def steep_fall(training: Sequence[float], until: Until, steps: int) -> tuple[int, float, float] | None:
    """Return a step and the mean training losses around it and at the end, if the loss fell steeply in between.

    The step is where `QUARTER` of the sum of the rates is left. The fall is steep if it is clear in spite of the
    differences of batches, and per unit of this sum at least half as fast as that of the whole run.

    Args:
        training: the losses of the logged steps.
        until: the sums of the learning rates.
        steps: number of steps.
    """
    ends = [(place + 1) * steps // len(training) for place in range(len(training))]
    begin = next((place for place, step in enumerate(ends) if until(step, steps) >= 1 - QUARTER), 0)
    few = (len(training) - begin) // 3
    if few < 2:
        return None
    around, last = training[begin - few // 2 :][:few], training[-few:]
    before, after = statistics.fmean(around), statistics.fmean(last)
    error = math.sqrt((statistics.variance(around) + statistics.variance(last)) / few)
    all_of_it = statistics.fmean(training[: max(1, len(training) // 10)]) - after
    steep = before - after > max(CERTAIN * error, SLOWER * QUARTER * all_of_it) and all_of_it > 0
    return (ends[begin], before, after) if steep else None


def _peak(losses: Sequence[float]) -> float:
    """Return the height of the highest peak: how far an evaluation is above both an earlier and a later one."""
    inner = range(1, len(losses) - 1)
    return max(losses[place] - max(min(losses[:place]), min(losses[place + 1 :])) for place in inner)
