"""Forecast of a run's duration: predicted before the first step, and corrected by the run's own times.

A run consists of steps, pauses between them (evaluations and checkpoints), and its end (answers and files). Let p be
predicted and t measured seconds. The rest of a run takes

    Σ p(remaining steps) · r  +  Σ p(remaining pauses) · q  +  p(end) · r

with r = Σ t(steps) / Σ p(steps) and q = Σ t(pauses) / Σ p(pauses) of the parts so far. Recent steps have more weight in
r, because the other work of a machine changes. Until a pause after the first step has been measured, q = r.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from backhand.printing import duration

FULL_LENGTH = " if every answer has its full length"
"""Clause after a forecast of steps that sample answers."""
BUSY = ", as the processor is busy with other work"
"""Clause after a forecast that was measured while the process had to wait, mostly for other programs."""
_KEPT = 0.95
"""Factor by which the weight of earlier steps decreases per logged step."""


class Busy(NamedTuple):
    """Times on a processor that other programs use too, as multiples of the predicted one."""

    least: float  # if the other work ends: the time that the main thread computed
    most: float  # if it stays, with its mean share of the processor


def between(least_s: float, most_s: float, busy: Busy | None) -> str:
    """Return a predicted time as words, as a range if both ends differ."""
    least, most = (duration(one * other) for one, other in zip((least_s, most_s), busy or (1.0, 1.0), strict=True))
    return most if least == most else f"{least} to {most}"


@dataclass
class Forecast:
    """Predicted seconds of the parts of a run, and the measured ones so far."""

    steps_s: Sequence[float]  # predicted seconds of each step
    pauses_s: Mapping[int, float]  # predicted seconds of the pause after each of these steps; 0: before the first step
    end_s: float  # predicted seconds from the last pause to the end of the command
    full_length: bool = False  # True if sampled answers are assumed to have their full length; steps may be shorter
    busy: Busy | None = None  # None if the processor was free during the measurement

    # _began: time at which the run began or was resumed; _began_at: its steps and seconds in steps until then
    _began: float = field(default_factory=time.monotonic)
    _began_at: tuple[int, float] = (0, 0.0)
    _last: tuple[int, float] = (0, 0.0)  # steps done, and seconds spent in steps
    # _measured, _predicted: weighted seconds of the steps so far
    _measured: float = 0.0
    _predicted: float = 0.0
    _logged: int = 0  # number of logged steps

    def __post_init__(self) -> None:
        self._until = list(accumulate(self.steps_s, initial=0.0))

    def begin(self, step: int, train_s: float) -> None:
        """Start the clock when `step` steps are done, which took `train_s` seconds."""
        self._began, self._began_at, self._last = time.monotonic(), (step, train_s), (step, train_s)

    @property
    def total_s(self) -> float:
        """Predicted seconds from the beginning of this process's steps to the end."""
        return self._left_s(self._began_at[0], 1.0, 1.0)

    def in_words(self, remaining: str) -> str:
        """Return the predicted duration in words.

        Args:
            remaining: which steps it is that of, after a space; "" for all.
        """
        clauses = FULL_LENGTH * self.full_length + BUSY * (self.busy is not None)
        return f"{between(self.total_s, self.total_s, self.busy)}{remaining}{clauses}"

    def left_s(self, step: int, train_s: float) -> float:
        """Return the seconds that remain after a step.

        Args:
            step: number of steps done.
            train_s: seconds spent in all steps of the run.
        """
        before, spent_s = self._last
        measured, predicted = train_s - spent_s, self._until[step] - self._until[before]
        # The first step compiles and allocates. It only counts until there is another one.
        kept = 0.0 if self._logged == 1 else _KEPT
        self._measured, self._predicted = kept * self._measured + measured, kept * self._predicted + predicted
        self._last, self._logged = (step, train_s), self._logged + 1
        prior = self._until[-1] / max(1, len(self.steps_s))  # the prediction counts as one step
        if self.busy is not None and self._logged > 1:
            prior = 0.0  # it was slowed by other work, which may have ended
        slower = (self._measured + prior) / ((self._predicted + prior) or 1.0)
        first, first_s = self._began_at
        paused = {after: seconds for after, seconds in self.pauses_s.items() if first <= after < step}
        pauses = slower
        if any(after > first for after in paused):
            pauses = (time.monotonic() - self._began - (train_s - first_s)) / (sum(paused.values()) or 1.0)
        return self._left_s(step, slower, pauses)

    def _left_s(self, step: int, slower: float, pauses: float) -> float:
        paused_s = sum(seconds for after, seconds in self.pauses_s.items() if after >= step)
        return slower * (self._until[-1] - self._until[step] + self.end_s) + pauses * paused_s
