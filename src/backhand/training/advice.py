"""What a run's own curves say of it: one sentence, and the command to try next.

Of the held-out losses e_0 (before the first step), e_1 … e_n let e_b be the lowest behind the first, and

    gain = e_0 - e_b        what was learnt
    rise = e_n - e_b        what was lost again
    last = e_m - e_n        what the end brought, from the last evaluation in the first four fifths of the steps

How far a run has come is told by the sum of its steps' rates, not by their number: at the end of a schedule steps are
small. So a loss is still falling where the last piece of that stretch brought, for the sum of its rates, at least half
of what the whole of it did; and where a run of n steps was best at step k, one of fewer has learnt as much, which ends
with small steps too:

    n · (rates of the first k steps) / (rates of all n)

The first that holds of what `judged` asks, in its order, is said; docs/rates.md has it as a table.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backhand.loop.step import LearningRate
from backhand.loop.step_plan import five_times
from backhand.options.config import OptimizationOptions, TrainConfig
from backhand.runs.directory import CONFIG

Finding = Literal["unsteady", "not better", "hardly moved", "rose", "still falling", "forgot", "low", "fine"]

LITTLE = 0.02
"""Of e_0: a gain that is hardly any."""
RISEN = 0.03
"""Of e_b: a rise that is more than noise."""
FALLING = 0.05
"""Of the gain: a last stretch that brought so much would have been followed by more."""
LAST = 0.2
"""Of the steps: the last stretch. A shorter one, at the end of a schedule, would bring nothing at any rate."""
SLOWER = 0.5
"""Of the mean speed of the last stretch: a last piece that brought less, for the sum of its rates, is at rest."""
LOW = 1 / 3
"""Of the rate that `auto` stands for: a rate so low may well have learnt less than there is to learn."""
HIGH = 1.5
"""Times that rate: above it, that rate is tried first."""
MOST = 0.9
"""Of the steps: so many are nearly all, and nothing to try."""
PIECE = 0.01
"""Of the sum of all rates: a shorter last piece tells of noise."""
SPIKE = 1.3
"""Times the loss of the first steps."""
FORGOTTEN_NATS = 1.5
"""On neutral texts, a token."""


@dataclass(frozen=True)
class Curves:
    """What a run measured."""

    held_out: Sequence[tuple[int, float]]  # (step, loss) of every finite evaluation, the first one before any step
    training: Sequence[float]  # the loss of every logged step
    # how far the loss on neutral texts had risen at the best evaluation; None where not measured
    forgotten_nats: float | None = None

    @property
    def best(self) -> tuple[int, float]:
        """Step and loss of the lowest evaluation behind the first."""
        return min(self.held_out[1:], key=lambda one: one[1])

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Curves:
        """Of the lines of metrics.jsonl."""
        evaluations = [one for one in records if _is_finite(one.get("eval_loss"))]
        held_out = list({one["step"]: one["eval_loss"] for one in evaluations}.items())  # the later of two counts
        best = min(evaluations[1:], key=lambda one: one["eval_loss"], default={})
        losses = [one["loss"] for one in records if _is_finite(one.get("loss"))]
        return cls(held_out, losses, best.get("forgetting_nats"))


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


Until = Callable[[int, int], float]
"""The sum of the rates up to a step, of those of all steps, whose number is given as well."""


def rates_until(options: OptimizationOptions, total_steps: int) -> Until:
    """That sum under a schedule of so many steps, of which a run may have made fewer."""
    plan = LearningRate(1.0, options.schedule, options.warmup_steps or 0, total_steps)
    sums = list(itertools.accumulate(map(plan.at, range(total_steps)), initial=0.0))
    return lambda step, steps: sums[step] / sums[steps]


def judged(curves: Curves, until: Until, share: float = 1.0) -> Finding | None:
    """What is to be said first; None where nothing was held out, or not evaluated twice.

    Args:
        curves: of the run.
        until: of its schedule.
        share: its rate, over the one that `auto` stands for.
    """
    if len(curves.held_out) < 3:
        return None
    losses = [loss for _, loss in curves.held_out]
    base, best = losses[0], curves.best[1]
    steps = curves.held_out[-1][0]
    before = max((step for step, _ in curves.held_out if step <= (1 - LAST) * steps), default=None)
    if before is None:  # the first of them is missing
        return None
    gain, rise, last = base - best, losses[-1] - best, dict(curves.held_out)[before] - losses[-1]
    pieces = [one for one in curves.held_out if before < one[0] and until(one[0], steps) <= 1 - PIECE]
    # Where no evaluation divides the stretch, the whole of it is the last piece.
    between, middle = pieces[-1] if pieces else (before, losses[-1] + last)
    share_of_stretch = (1 - until(between, steps)) / (1 - until(before, steps))
    falling = last > FALLING * gain and middle - losses[-1] >= SLOWER * last * share_of_stretch
    few = max(1, len(curves.training) // 10)
    later = curves.training[2 * few :] if len(curves.training) >= 4 * few else ()
    if later and max(later) > SPIKE * statistics.mean(curves.training[:few]):
        return "unsteady"  # back above where it began
    if gain <= 0:
        return "not better"
    if gain < LITTLE * abs(base):
        return "hardly moved"
    if rise > RISEN * abs(best):
        return "rose"
    if share < LOW:
        return "low"
    if falling:
        return "still falling"
    if curves.forgotten_nats is not None and curves.forgotten_nats > FORGOTTEN_NATS:
        return "forgot"
    return "fine"


def advice(
    config: TrainConfig, curves: Curves, total_steps: int, usual: float, run: Path
) -> tuple[str, str | None] | None:
    """A sentence about the run, and the command to try next, if there is one.

    Args:
        config: of the run, resolved.
        usual: the rate that `auto` stands for.
    """
    rate, objective = float(config.optimization.learning_rate), config.objective.objective
    until = rates_until(config.optimization, total_steps)
    found = None if objective == "grpo" else judged(curves, until, rate / usual if objective == "sft" else 1.0)
    if found is None:
        return None
    step, forgotten, options = curves.best[0], curves.forgotten_nats or 0.0, config.optimization
    higher = f"--learning-rate {usual if rate < LOW * usual else 3 * rate:.2g}"
    twice = f"--max-steps {2 * total_steps}" if options.max_steps else f"--epochs {2 * options.epochs}"
    fewer = max((options.warmup_steps or 0) + 1, round(until(step, total_steps) * total_steps))
    lower = f"--learning-rate {usual if rate > HIGH * usual else rate / 3:.2g}"
    why, instead = "fewer steps would do", f"--max-steps {fewer} --eval-every {five_times(fewer)}"
    if rate > HIGH * usual:
        why, instead = "the learning rate is high", lower
    elif fewer > MOST * total_steps:
        why, instead = "nearly all of its steps were needed", ""
    said, more = {
        "unsteady": ("The training loss came back above where it began: the learning rate is too high.", lower),
        "not better": (
            "Other rows are answered no better than before: the rate is too high, or they are of another kind.",
            lower,
        ),
        "hardly moved": ("It hardly moved: the learning rate is too low, or the steps are too few.", higher),
        "rose": (f"The held-out loss rose after step {step}, whose adapter is kept: {why}.", instead),
        "still falling": ("The held-out loss was still falling at the end.", twice),
        "forgot": (
            f"It forgot much, {forgotten:.2f} nats a token of neutral texts: a lower rate keeps more.",
            f"--learning-rate {rate / 2:.2g}",
        ),
        "low": (f"Its learning rate is far below {usual:g}, which suits such runs: that may learn more.", higher),
        "fine": ("Nothing in its curves asks for another rate or more steps.", ""),
    }[found]
    if not more:
        return said, None
    before = re.fullmatch(r"(.*)-again(?:-(\d+))?", run.name, re.DOTALL)
    name = f"{before[1]}-again-{int(before[2] or 1) + 1}" if before else f"{run.name}-again"
    again = run.with_name(name)
    return said, f"backhand train {shlex.quote(str(run / CONFIG))} {more} --output {shlex.quote(str(again))}"
