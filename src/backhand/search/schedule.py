"""Choose the next trial of a search: continue one, start one, promote the best, repeat with other seeds, or end.

With successive halving every trial is first trained for an eighth of its steps. The best are promoted to a half of
them, and the best of these to the end [arXiv:1502.07943]. A promoted trial is resumed exactly: its bits are those of
the same run made alone. The sampler learns from the losses at the first stage, which all trials reach after the same
share of their steps.
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
    """Point at which trials stop, and the share of them that is promoted from there (at least one trial)."""

    share: float  # of a trial's steps
    promoted: float  # share of the trials

    @property
    def name(self) -> str:
        """Name for the report."""
        return "to the end" if self.share == 1 else f"{self.share:.0%} of its steps"


STAGES: Mapping[str, tuple[Stage, ...]] = {
    "halving": (Stage(1 / 8, 1 / 3), Stage(1 / 2, 0.0), Stage(1.0, 1.0)),
    "median": (Stage(1 / 8, 1 / 2), Stage(1 / 2, 1 / 2), Stage(1.0, 1.0)),
    "none": (Stage(1.0, 1.0),),
}
EVALUATIONS = 8
"""Evaluations per trial without `--eval-every`, enough for every stage to end with one."""

Wait = Literal["wait"]


@dataclass(frozen=True)
class Schedule:
    """Rules of one search."""

    options: SearchOptions
    dimensions: tuple[Dimension, ...]
    given: Values  # values of the options as given, which are those of the first trial
    seed: int  # of the runs and of the sampler

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages of every trial, in order."""
        return STAGES[self.options.prune]

    @property
    def last(self) -> int:
        """Number of the last stage, counted from 1."""
        return len(self.stages)

    @property
    def points(self) -> list[Values]:
        """Points of the grid, without the options as given."""
        return [one for one in grid(self.dimensions, self.options.trials) if one != self.given]

    @property
    def count(self) -> int:
        """Number of trials without repetitions. The first one has the options as given."""
        return 1 + len(self.points) if self.options.sampler == "grid" else self.options.trials

    def reached(self, trial: Trial) -> str:
        """Return the name of the stage that a trial has reached."""
        return self.stages[trial.done - 1].name if trial.done else "nothing yet"

    def promoted(self, stage: int, count: int) -> int:
        """Return how many of `count` trials are promoted from a stage."""
        return min(count, max(1, math.ceil(self.stages[stage - 1].promoted * count)))

    def left(self, trials: Sequence[Trial] = (), *, first_best: bool = False) -> list[tuple[int, int]]:
        """Return what remains to train of the whole search: per start or resumption, the stages before and after it.

        Args:
            trials: the trials so far.
            first_best: whether the options as given are the best wherever losses are still unknown. Otherwise they are
                never promoted, and are trained to the end in addition, for the comparison.
        """
        starts = [(trial.done, trial.goal) for trial in trials if trial.due]
        firsts = [trial for trial in trials if trial.repeats is None]
        reached = {trial.number: trial.goal for trial in firsts if trial.failed is None}
        new = range(len(firsts), max(self.count, len(firsts)))
        starts += [(0, 1)] * len(new)
        reached |= dict.fromkeys(new, 1)

        def ranks(stage: int) -> list[int]:
            losses = {trial.number: trial.loss_at(stage) for trial in firsts}
            arrived = [number for number, goal in reached.items() if goal >= stage]
            if any(losses.get(number, math.inf) == math.inf for number in arrived):
                losses[0] = -math.inf if first_best else math.inf
            return sorted(arrived, key=lambda number: (losses.get(number, math.inf), -number))

        for stage in range(1, self.last):
            ranked = ranks(stage)
            for number in ranked[: self.promoted(stage, len(ranked))]:
                if reached[number] == stage:
                    starts.append((stage, stage + 1))
                    reached[number] = stage + 1
        pairs = 1 if ranks(self.last)[:1] == [0] else 2
        if reached.get(0, self.last) < self.last:
            starts.append((reached[0], self.last))
        repeats = pairs * (self.options.seeds - 1) - (len(trials) - len(firsts))
        return starts + [(0, self.last)] * max(0, repeats)

    def next(self, study: Study, *, may_start: bool) -> Trial | Wait | None:
        """Return the next trial to train, claimed for this process.

        Args:
            study: the study, locked by the caller.
            may_start: whether there is time for one more trial.

        Returns:
            `wait` while the next step depends on trials of other processes; None at the end of the search.
        """
        trials = study.trials()
        for trial in trials:
            if trial.due and study.claim(trial):
                return trial
        firsts = [trial for trial in trials if trial.repeats is None]
        if len(firsts) < self.count and (may_start or not firsts):
            return study.add(self.propose(firsts), self.seed, goal=1)
        if any(trial.due for trial in trials):
            return "wait"
        promoted = self._promote(study, firsts)
        return promoted or self._repeat(study, trials)

    def _promote(self, study: Study, firsts: Sequence[Trial]) -> Trial | Wait | None:
        for stage in range(1, self.last):
            arrived = [trial for trial in firsts if trial.done >= stage and trial.failed is None]
            ranked = sorted(arrived, key=lambda trial: trial.loss_at(stage))[: self.promoted(stage, len(arrived))]
            new = [trial for trial in ranked if trial.goal == stage]
            for trial in new:
                study.write(trial.number, {"goal": stage + 1})
            if new:
                # The process that trained a trial to its stage releases it a moment later.
                return next((trial for trial in study.trials() if trial.due and study.claim(trial)), "wait")
        return None

    def _repeat(self, study: Study, trials: Sequence[Trial]) -> Trial | Wait | None:
        """Return the next run for the comparison: the options as given to the end, then both with other seeds."""
        best = best_of(trials, self.last)
        if best is None:
            return None
        if trials[0].goal < self.last and trials[0].failed is None:
            if not study.claim(trials[0]):
                return "wait"
            study.write(0, {"goal": self.last})
            return replace(trials[0], goal=self.last)
        repeated = {(trial.repeats, trial.seed) for trial in trials}
        for more in range(1, self.options.seeds):
            for trial in (best, trials[0]):
                if (trial.number, self.seed + more) not in repeated and trial.failed is None:
                    return study.add(trial.values, self.seed + more, self.last, repeats=trial.number)
        return None

    def propose(self, firsts: Sequence[Trial]) -> Values:
        """Return the values of the next trial, determined by the existing trials and the seed."""
        number = len(firsts)
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
        study = self.losses_at(1, firsts, chosen)
        values = study.ask(distributions(self.dimensions)).params
        return {one.name: one.rounded(values[one.name]) for one in self.dimensions}

    def losses_at(self, stage: int, firsts: Sequence[Trial], sampler: Any = None) -> Any:
        """Return an Optuna study, in memory, of the losses at one stage, without trials outside the dimensions."""
        optuna = optuna_installed()
        study = optuna.create_study(sampler=sampler)
        known = [trial for trial in firsts if trial.losses[stage - 1 : stage] and trial.failed is None]
        worst = max((trial.loss_at(stage) for trial in known), default=0.0)
        for trial in firsts:
            inside = all(one.name in trial.values and one.holds(trial.values[one.name]) for one in self.dimensions)
            if inside and (trial in known or trial.failed is not None):
                value = trial.loss_at(stage) if trial in known else 2 * abs(worst) + 1  # keeps the sampler away
                spaces = distributions(self.dimensions)
                study.add_trial(optuna.trial.create_trial(params=trial.values, distributions=spaces, value=value))
        return study

    def importance(self, trials: Sequence[Trial]) -> dict[str, float]:
        """Return each option's share in deciding if a trial is among the better ones [arXiv:2304.10255].

        The shares have the sum 1. The result is empty if only one option is varied or there are too few trials.
        """
        firsts = [trial for trial in trials if trial.repeats is None and trial.losses and trial.failed is None]
        if len(self.dimensions) < 2 or len(firsts) < _MIN_TRIALS_FOR_IMPORTANCE:
            return {}
        optuna = optuna_installed()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna marks the evaluator as experimental
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.3)
            shares = optuna.importance.get_param_importances(self.losses_at(1, firsts), evaluator=evaluator)
        return {name: float(value) for name, value in shares.items() if math.isfinite(value)}


_MIN_TRIALS_FOR_IMPORTANCE = 6


def best_of(trials: Sequence[Trial], last: int) -> Trial | None:
    """Return the finished trial with the lowest held-out loss, repetitions excluded; None if no trial finished."""
    finished = [trial for trial in trials if trial.repeats is None and trial.loss_at(last) < math.inf]
    return min(finished, key=lambda trial: trial.loss_at(last), default=None)
