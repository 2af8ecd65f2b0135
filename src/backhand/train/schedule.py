"""The learning rate of every step: a rise over the warm-up steps, then constant, linear or cosine.

With w warm-up steps of n in all, step s = 0, 1, …, n - 1 has the rate `learning_rate` times
    (s + 1) / (w + 1)                          for s < w: above zero from the first step on, 1 at s = w
    1                                          constant
    (n - s) / (n - w)                          linear: the last step still moves, zero would come after it
    (1 + cos(π (s - w) / (n - w))) / 2         cosine
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from backhand.train.config import Schedule

DEFAULT_WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class LearningRate:
    """The rate as a function of the step.

    Attributes:
        highest: the rate at the end of warm-up.
        schedule: what happens after it.
        warmup_steps: w above.
        total_steps: n above.
    """

    highest: float
    schedule: Schedule
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The rate of this step, counted from 0."""
        if step < self.warmup_steps:
            return self.highest * (step + 1) / (self.warmup_steps + 1)
        span = max(1, self.total_steps - self.warmup_steps)
        after = step - self.warmup_steps
        if self.schedule == "linear":
            return self.highest * max(0, span - after) / span
        if self.schedule == "cosine":
            return self.highest * (1 + math.cos(math.pi * min(after, span) / span)) / 2
        return self.highest


def default_warmup_steps(total_steps: int) -> int:
    """3 % of all steps, rounded up, but never the whole of a one-step run."""
    return min(math.ceil(DEFAULT_WARMUP_SHARE * total_steps), total_steps - 1)
