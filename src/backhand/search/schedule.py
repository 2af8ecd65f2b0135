"""What to do next in a search: go on with a trial, begin one, promote the best, repeat with other seeds, or be done.

With successive halving every trial first comes to an eighth of its steps; the best go on from there to a half, and the
best of these to the end [arXiv:1502.07943]. To go on is to resume the run, exactly, so that a promoted trial is the run
that it would have been alone. What the sampler learns from is the loss at the first stage, where all trials have come
to the same share of their steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from backhand.loop.step_plan import derived_seed
from backhand.search.options import SearchOptions
from backhand.search.space import Dimension, Values, evenly, grid
from backhand.search.study import Study, Trial, distributions, optuna_installed


class Stage(NamedTuple):
    """Where trials stop: a share of their steps; and the share of the trials there that goes on (at least one)."""

    share: float
    goes_on: float

    @property
    def name(self) -> str:
        """For people."""
        return "to the end" if self.share == 1 else f"{self.share:.0%} of its steps"


STAGES: Mapping[str, tuple[Stage, ...]] = {
    "halving": (Stage(1 / 8, 1 / 3), Stage(1 / 2, 0.0), Stage(1.0, 1.0)),
    "median": (Stage(1 / 8, 1 / 2), Stage(1 / 2, 1 / 2), Stage(1.0, 1.0)),
    "none": (Stage(1.0, 1.0),),
}
EVALUATIONS = 8
"""Of a trial, unless `--eval-every` says otherwise: enough for every stage to end with one."""

Wait = Literal["wait"]


@dataclass(frozen=True)
class Schedule:
    """The rules of one search."""

    options: SearchOptions  # of the search
    dimensions: tuple[Dimension, ...]  # what is varied
    given: Values  # the values of the options as they are given, those of the first trial
    seed: int  # of the run, and of the sampler

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Where trials stop."""
        return STAGES[self.options.prune]

    @property
    def last(self) -> int:
        """Number of the last stage, from 1."""
        return len(self.stages)

    @property
    def points(self) -> list[Values]:
        """Of a grid."""
        return [one for one in grid(self.dimensions, self.options.trials) if one != self.given]

    @property
    def count(self) -> int:
        """Trials of their own, the first one with the options as given."""
        return 1 + len(self.points) if self.options.sampler == "grid" else self.options.trials

    def reached(self, trial: Trial) -> str:
        """How far a trial has come, in words."""
        return self.stages[trial.done - 1].name if trial.done else "nothing yet"

    def promoted(self, stage: int, count: int) -> int:
        """How many of so many trials go on from this stage."""
        return min(count, max(1, math.ceil(self.stages[stage - 1].goes_on * count)))

    def runs(self) -> float:
        """What the whole search trains, in runs from beginning to end."""
        at = self.count
        total = at * self.stages[0].share
        for stage in range(1, self.last):
            at = self.promoted(stage, at)
            total += at * (self.stages[stage].share - self.stages[stage - 1].share)
        if self.last > 1:  # the first trial goes on to the end, for the comparison
            total += 1 - self.stages[0].share
        return total + 2 * (self.options.seeds - 1)

    def next(self, study: Study, *, may_begin: bool) -> Trial | Wait | None:
        """The trial to go on with, which is held now; `wait` where others work on what is to be known; None at the end.

        Args:
            study: locked.
            may_begin: whether there is time for one more trial.
        """
        trials = study.trials()
        for trial in trials:
            if trial.due and study.hold(trial):
                return trial
        own = [trial for trial in trials if trial.repeats is None]
        if len(own) < self.count and (may_begin or not own):
            return study.begin(self.proposed(own), self.seed, goal=1)
        if any(trial.due for trial in trials):
            return "wait"
        promoted = self._promote(study, own)
        return promoted or self._repeat(study, trials)

    def _promote(self, study: Study, own: Sequence[Trial]) -> Trial | Wait | None:
        for stage in range(1, self.last):
            there = [trial for trial in own if trial.done >= stage and trial.failed is None]
            ranked = sorted(there, key=lambda trial: trial.loss_at(stage))[: self.promoted(stage, len(there))]
            new = [trial for trial in ranked if trial.goal == stage]
            for trial in new:
                study.write(trial.number, {"goal": stage + 1})
            if new:
                # Whoever has brought a trial to its stage holds it for a moment longer.
                return next((trial for trial in study.trials() if trial.due and study.hold(trial)), "wait")
        return None

    def _repeat(self, study: Study, trials: Sequence[Trial]) -> Trial | Wait | None:
        """What the best is compared with: the options as given to the end, and both with other seeds."""
        best = best_of(trials, self.last)
        if best is None:
            return None
        if trials[0].goal < self.last and trials[0].failed is None:
            if not study.hold(trials[0]):
                return "wait"
            study.write(0, {"goal": self.last})
            return replace(trials[0], goal=self.last)
        there = {(trial.repeats, trial.seed) for trial in trials}
        for more in range(1, self.options.seeds):
            for trial in (best, trials[0]):
                if (trial.number, self.seed + more) not in there and trial.failed is None:
                    return study.begin(trial.values, self.seed + more, self.last, repeats=trial.number)
        return None

    def proposed(self, own: Sequence[Trial]) -> Values:
        """The values of the next trial; they follow from the trials that are there."""
        number = len(own)
        if number == 0:
            return self.given
        if self.options.sampler == "grid":
            return self.points[number - 1]
        spread = (self.count + 1) // 2 if self.options.sampler == "tpe" else 0
        if number <= spread:
            return evenly(self.dimensions, number - 1)
        samplers, seed = optuna_installed().samplers, derived_seed(self.seed, "search", number) % 2**32
        random = self.options.sampler == "random"
        chosen = samplers.RandomSampler(seed=seed) if random else samplers.TPESampler(seed=seed, n_startup_trials=0)
        study = self.measured(own, 1, chosen)
        values = study.ask(distributions(self.dimensions)).params
        return {one.name: one.rounded(values[one.name]) for one in self.dimensions}

    def measured(self, own: Sequence[Trial], stage: int, sampler: Any = None) -> Any:
        """Optuna's study of the losses at one stage, in memory, without trials outside of what is searched."""
        optuna = optuna_installed()
        study = optuna.create_study(sampler=sampler)
        known = [trial for trial in own if trial.losses[stage - 1 : stage] and trial.failed is None]
        worst = max((trial.loss_at(stage) for trial in known), default=0.0)
        for trial in own:
            inside = all(one.name in trial.values and one.holds(trial.values[one.name]) for one in self.dimensions)
            if inside and (trial in known or trial.failed is not None):
                value = trial.loss_at(stage) if trial in known else 2 * abs(worst) + 1  # nothing near one that failed
                spaces = distributions(self.dimensions)
                study.add_trial(optuna.trial.create_trial(params=trial.values, distributions=spaces, value=value))
        return study

    def importance(self, trials: Sequence[Trial]) -> dict[str, float]:
        """How much each option decides whether a trial is among the better ones, in all 1 [arXiv:2304.10255].

        Empty where one option alone is varied, or trials are too few to tell.
        """
        own = [trial for trial in trials if trial.repeats is None and trial.losses and trial.failed is None]
        if len(self.dimensions) < 2 or len(own) < _ENOUGH:
            return {}
        optuna = optuna_installed()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a feature of Optuna that may change
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.3)
            found = optuna.importance.get_param_importances(self.measured(own, 1), evaluator=evaluator)
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}


_ENOUGH = 6


def best_of(trials: Sequence[Trial], last: int) -> Trial | None:
    """The trial with the lowest held-out loss of those that came to their end, repetitions aside."""
    ended = [trial for trial in trials if trial.repeats is None and trial.loss_at(last) < math.inf]
    return min(ended, key=lambda trial: trial.loss_at(last), default=None)
