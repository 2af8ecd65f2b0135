"""`backhand search`: plan, train trials until the schedule ends, publish the best adapter, and write the report.

Every trial is a run of `training.run.train` in its own directory. Model, rows and frozen weights are loaded once for
all trials (`engines.engine.RunCache`). A trial pauses at the end of a stage with a checkpoint, and a promoted trial is
resumed from it.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from backhand.adapters.contents import read_json_object
from backhand.data.packing import Sampler
from backhand.engines.engine import RunCache
from backhand.engines.machine import resolve_machine
from backhand.errors import ArtifactError, BackhandError, CheckError, ResourceError, UsageError
from backhand.files import FileLayer, json_bytes, make_directory, write_atomically
from backhand.loop.forecast import BUSY, Busy, between
from backhand.loop.observers import Callback, Observer, RunStart
from backhand.nn.compute import compute_settings, gc_frozen
from backhand.options.config import RunOptions, TrainConfig
from backhand.options.config_file import dump_config, read_table, tables_as
from backhand.printing import duration, line_due, say
from backhand.report.command import write_report
from backhand.runs.directory import ADAPTER, CONFIG, METRICS, RunDirectory, opened
from backhand.runs.interruption import Interrupted
from backhand.search.options import SearchConfig
from backhand.search.result import Measure, SearchResult, file_digests, result_of, write_result
from backhand.search.schedule import EVALUATIONS, Schedule
from backhand.search.space import applied, largest
from backhand.search.study import TRIALS, Study, Trial, optuna_installed
from backhand.terminal import console, working
from backhand.training.calibration import Speed, calibrate
from backhand.training.plan import RunPlan, plan_run
from backhand.training.resume import merge_options
from backhand.training.run import train
from backhand.words import count_of, in_words

SEARCH = "search.toml"
ROWS = "rows.json"
_CHANGEABLE = {"search": ("trials", "hours", "seeds"), "run": ("output", "resume", "quiet", "debug")}
BELOW, ABOVE = 8, 4
"""Default range of the learning rate: `auto`'s rate divided by BELOW, to the same times ABOVE. See docs/rates.md."""
_POLL_S = 1.0
_CALIBRATION_S = 3.0


def search_command(config: SearchConfig, typed: frozenset[str] = frozenset()) -> SearchResult:
    """Run or resume a search. docs/search.md describes the files in its output directory.

    Args:
        config: the run and the options to vary.
        typed: names of options on the command line, including those with their default value.

    Returns:
        the result, as in search.json.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: before the first trial or in a trial.
        Interrupted: after a signal. The trial that was being trained is saved.
    """
    optuna_installed()
    config = (_resumed(config, typed) if config.run.resume else _fresh(config)).validate()
    machine, run_cache = resolve_machine(config), RunCache()
    with compute_settings(config.model, machine.threads, machine.dtype, machine.device):
        with working("planning", quiet=config.run.quiet) as show:
            plan = plan_run(largest(config.run_config, config.search.dimensions), machine, run_cache=run_cache)
            search = Search(resolved(config, plan), run_cache)
            search.prepare(plan)
            if not config.run.resume:
                show("measuring this machine's speed")
                began = time.monotonic()
                with gc_frozen():  # every trial begins like this
                    plan_run(plan.inputs.config, machine, run_cache=run_cache)
                planned_s = time.monotonic() - began
                search.predict(calibrate(search.evaluating(plan), machine, budget_s=_CALIBRATION_S), planned_s)
        search.print_plan(plan)
        try:
            search.train_trials()
        except KeyboardInterrupt:
            stopped = Interrupted(signal.SIGINT, 0, f"continue with {search.resume_command}")
            stopped.what = "interrupted; every trial has its last checkpoint"
            raise stopped from None
    return search.finish()


def resolved(config: SearchConfig, plan: RunPlan) -> SearchConfig:
    """Return the configuration with resolved held-out rows, and with numbers for the defaults of varied options.

    Without `--over` the range of the learning rate is set around this number.
    """
    search, options = config.search, config.optimization
    if any(one.name == "learning_rate" for one in search.dimensions):
        rate, _ = plan.inputs.learning_rate(replace(options, learning_rate="auto"))
        options = replace(options, learning_rate=plan.inputs.learning_rate(options)[0])
        if not search.over:
            search = replace(search, over=(f"learning_rate={rate / BELOW:.4g}:{rate * ABOVE:.4g}:log",))
    if any(one.name == "epochs" for one in search.dimensions):
        options = replace(options, epochs=config.epochs_of(len(plan.inputs.train.examples)))
    return replace(config, search=search, optimization=options, data=plan.inputs.config.data)


def _fresh(config: SearchConfig) -> SearchConfig:
    if config.run.overwrite:
        raise UsageError(
            "a search cannot be overwritten, since it contains many runs",
            where="overwrite",
            next_step="remove the directory yourself, or give another --output",
        )
    output = config.run.output
    if (output / SEARCH).exists():
        raise UsageError(
            f"{output} already contains a search",
            where="output",
            next_step="continue or join it with --resume, or give another directory",
        )
    with opened(output, resume=False, overwrite=False):
        return config


def _resumed(given: SearchConfig, typed: frozenset[str]) -> SearchConfig:
    """Return the stored options, updated by the given ones that may change."""
    path = given.run.output / SEARCH
    if not path.exists():
        raise UsageError(f"there is no search in {given.run.output}", where="output", next_step="leave out --resume")
    stored = tables_as(SearchConfig, read_table(path), str(path))
    config, differences = merge_options(given, stored, typed, lambda part, name: name in _CHANGEABLE.get(part, ()))
    if differences:
        changes = [f"{name}: {before!r} in the search, {value!r} given" for name, before, value in differences]
        raise UsageError(
            "the search cannot be continued: " + "; ".join(changes),
            where=str(given.run.output),
            why="its trials would not be comparable; only trials, hours and seeds may change",
            next_step="leave these options out, or give another --output",
        )
    of_process = {name: getattr(given.run, name) for name in _CHANGEABLE["run"]}
    return replace(config, run=replace(config.run, **of_process))


@dataclass
class _Seconds:
    """Mean seconds of a part of all trials: predicted, or measured as soon as a trial of this process has the part."""

    mean: float = 0.0  # 0 while unknown
    _total: float = 0.0
    _count: float = 0.0

    def add(self, seconds: float, count: float = 1.0) -> None:
        """Add a measurement of this number of parts."""
        self._total, self._count = self._total + seconds, self._count + count
        self.mean = self._total / self._count


class _TrialTimes(Observer):
    """The numbers of steps and the times at which the steps of a trial began and ended, evaluations included."""

    def __init__(self) -> None:
        self.began = self.ended_at = (0, 0.0)

    def started(self, start: RunStart) -> None:
        self.began = self.ended_at = (start.step, time.monotonic())

    def evaluated(self, record: dict[str, Any]) -> None:
        self.ended_at = (record["step"], time.monotonic())
        if record["step"] == self.began[0]:  # an evaluation before the first step is a part of the start
            self.began = self.ended_at

    stepped = evaluated


@dataclass
class Search:
    """One process's part of the search in a directory."""

    config: SearchConfig
    run_cache: RunCache  # model, rows and weights of all trials
    rows: int = 0  # number of training rows
    # the steps of a complete run, with their evaluations
    run: _Seconds = field(default_factory=_Seconds)
    # starting or resuming a trial, and pausing it, which take as long for few steps as for many
    start: _Seconds = field(default_factory=_Seconds)
    # answers, scores and files at the end of a complete run
    end: _Seconds = field(default_factory=_Seconds)
    busy: Busy | None = None  # of the measurement before the first trial

    def __post_init__(self) -> None:
        self.directory = self.config.run.output
        dimensions = self.config.search.dimensions
        given = {one.name: value for one in dimensions if (value := one.of(self.config)) is not None}
        self.schedule = Schedule(self.config.search, dimensions, given, self.config.run.seed)
        assert self.schedule.count  # raises for a grid that is too large, before a file is written
        self.study = Study(self.directory, dimensions, given, self.schedule.last)
        self.started_at = time.monotonic()
        self._console = console(stderr=True, quiet=self.config.run.quiet, soft_wrap=True)

    @property
    def resume_command(self) -> str:
        """The command that continues or joins this search."""
        return f"backhand search --resume --output {shlex.quote(str(self.directory))}"

    def evaluating(self, plan: RunPlan) -> RunPlan:
        """Return the plan of a run with the evaluations of a trial."""
        config = plan.inputs.config
        run = replace(config.run, eval_every=self._eval_every(config))
        return replace(plan, inputs=replace(plan.inputs, config=replace(config, run=run)))

    def predict(self, speed: Speed, planned_s: float) -> None:
        """Take the seconds of a run from a measurement.

        A start and its pause take about as long as planning the run again, one evaluation, and reading and writing a
        checkpoint.

        Args:
            speed: of a run with the evaluations of a trial.
            planned_s: seconds for planning a run whose rows and weights are loaded.
        """
        self.busy = speed.busy
        saves_s = speed.finish_s - speed.end_s
        self.run, self.end = _Seconds(speed.train_s + speed.evaluate_s + saves_s), _Seconds(speed.end_s)
        self.start = _Seconds(planned_s + (speed.evaluate_s + 2 * saves_s) / (EVALUATIONS + 1))

    def prepare(self, plan: RunPlan) -> None:
        """Take the options that all trials share from the largest one, and write them with the digests of the rows.

        Raises:
            UsageError: no rows are held out, or the rows have changed since the search started.
            ArtifactError: the digests of the rows are damaged or missing.
        """
        if plan.inputs.held_out is None:
            raise UsageError(
                "a search compares held-out losses, and no rows are held out",
                where="eval_fraction",
                next_step="give --eval-fraction 0.1, or --eval-data",
            )
        self.rows = len(plan.inputs.train.examples)
        digests = {"data": plan.inputs.train.digest, "held_out": plan.inputs.held_out.digest}
        path = self.directory / ROWS
        known = os.path.lexists(path)
        if known and _row_digests(path) != digests:
            raise UsageError(
                "the rows have changed since the search started",
                where=str(self.directory),
                why="earlier and later trials would not be comparable",
                next_step="restore the rows, or give another --output",
            )
        if not known and self.config.run.resume:
            self._refuse_trials(path)
        memory = plan.memory
        model = replace(self.config.model, base=memory.base, recompute=memory.recompute)
        self.config = replace(self.config, model=model)
        if not self.config.run.resume:
            make_directory(self.directory)
            write_atomically(self.directory / SEARCH, dump_config(self.config).encode())
        if not known:
            write_atomically(path, json_bytes(digests))

    def _refuse_trials(self, path: Path) -> None:
        """Raise ArtifactError if there are trials. Without this file their rows are unknown."""
        with self.study.locked():
            if self.study.trials():
                raise ArtifactError(
                    "the digests of the rows are missing",
                    where=str(path),
                    why="earlier and later trials might not be comparable",
                    next_step="restore the file from a copy, or start another search with another --output",
                )

    def print_plan(self, plan: RunPlan) -> None:
        """Print trials, time, memory and rows of the search."""
        options, schedule = self.config.search, self.schedule
        varied = ", ".join(word.partition("=")[0] for word in options.over) or "learning_rate"
        runs, *_ = self._left(())
        left = self._time_left((), self.busy)
        time_s = f", about {left}{BUSY * (self.busy is not None)}" if left else ""
        trials = f"search: {varied}; {count_of(schedule.count, 'trial')}, {options.sampler}, pruning: {options.prune}"
        lines = [
            f"{trials}; steps of {runs:.1f} runs{time_s}",
            f"memory: about {in_words(plan.memory.peak_bytes)}, one model for all trials",
            f"rows: {self.rows:,} to train on, {len(plan.inputs.held_out_examples):,} held out",
        ]
        if options.hours is not None:
            lines.append(f"budget: {duration(options.hours * 3600)}; no trial starts without time to finish")
        for line in lines:
            self._console.print(line)

    def train_trials(self) -> None:
        """Train trials until the schedule ends, waiting for those of other processes."""
        while True:
            with self.study.locked():
                trial = self.schedule.next(self.study, may_start=self._may_start())
            if trial is None:
                return
            if trial == "wait":
                with working("other processes train the last trials", quiet=self.config.run.quiet):
                    time.sleep(_POLL_S)
                continue
            try:
                self._train(trial)
            finally:
                self.study.release(trial)

    def _train(self, trial: Trial) -> None:
        """Train a trial to its goal and write its losses to the study."""
        config, stage = self.trial_config(trial), trial.goal
        started_at, failed = time.monotonic(), None
        pause_at = None if stage == self.schedule.last else self.step_of(config, stage)
        total = self.steps(config)

        def position(step: int) -> str:
            return f"{self.describe(trial)}: step {step} of {total}"

        times = _TrialTimes()
        try:
            with working(position(0), quiet=self.config.run.quiet) as show:

                def show_step(record: Mapping[str, Any]) -> None:
                    show(position(record["step"]))
                    if line_due(0.5):  # where there is no status line
                        self._console.print(position(record["step"]))

                callbacks: list[Callback] = [times, show_step]
                train(_start_or_resume(config), callbacks=callbacks, run_cache=self.run_cache, pause_at=pause_at)
        except Interrupted as error:
            if error.exit_code != _PAUSED:
                raise Interrupted(error.exit_code - 128, error.step, f"continue with {self.resume_command}") from None
        except BackhandError as error:
            if not _is_due_to_values(error, trial, resumed=config.run.resume):
                raise
            failed = error.one_line
        losses = self._losses(config, stage)
        if failed is None and not losses:
            path = config.run.output / METRICS
            raise ArtifactError(
                "the evaluations of the trial are missing",
                where=str(path),
                next_step="restore the file from a copy, or remove the trial's directory to train it again",
            )
        ended_at = time.monotonic()
        spent = {"spent_s": round(trial.spent_s + ended_at - started_at, 3)}
        fields: dict[str, Any] = {"losses": losses, "done": stage, **spent, "steps": self.step_of(config, stage)}
        if failed is not None or not all(map(math.isfinite, losses)):
            fields = {"failed": failed or "its held-out loss is not finite", **spent}
        elif stage == self.schedule.last:
            fields = {"adapter": file_digests(config.run.output / ADAPTER), **fields}
        with self.study.locked():
            self.study.write(trial.number, fields, finished=stage == self.schedule.last)
            trials = self.study.trials()
        if failed is None:
            self._measure(times, started_at, ended_at, total, finished=stage == self.schedule.last)
        if stage == self.schedule.last and failed is None:
            write_report(config.run.output)
        self._print_result(trials, trials[trial.number])

    def trial_config(self, trial: Trial) -> TrainConfig:
        """Return the configuration of a trial's run."""
        config = applied(self.config.run_config, self.schedule.dimensions, trial.values)
        output, given = self.directory / TRIALS / trial.name, config.run
        run = replace(
            given,
            output=output,
            resume=(output / CONFIG).exists(),
            quiet=True,
            seed=trial.seed,
            keep=1 if given.keep == 2 else given.keep,
            eval_every=self._eval_every(config),
        )
        return replace(config, run=run)

    def _eval_every(self, config: TrainConfig) -> int:
        return self.config.run.eval_every or max(1, -(-self.steps(config) // EVALUATIONS))

    def steps(self, config: TrainConfig) -> int:
        """Return the number of steps of a run."""
        sampler = Sampler(self.rows, config.optimization.batch_rows, config.run.seed)
        return config.optimization.max_steps or config.epochs_of(self.rows) * sampler.steps_per_epoch

    def step_of(self, config: TrainConfig, stage: int) -> int:
        """Return the step at which a stage ends, which has an evaluation."""
        total = self.steps(config)
        if stage == self.schedule.last:
            return total
        every = config.run.eval_every or 1
        return min(total, every * max(1, round(self.schedule.stages[stage - 1].share * total / every)))

    def _losses(self, config: TrainConfig, stage: int) -> list[float]:
        """Return the best held-out loss until each stage up to this one; fewer if a stage has no evaluation."""
        records = RunDirectory(config.run.output, FileLayer()).lines(METRICS)
        # A loss that is not finite is stored as null.
        evaluations = [(one["step"], one["eval_loss"]) for one in records if "eval_loss" in one and one["step"] > 0]
        measured = [(step, math.inf if loss is None else float(loss)) for step, loss in evaluations]
        ends = (self.step_of(config, number) for number in range(1, stage + 1))
        until = ([loss for step, loss in measured if step <= end] for end in ends)
        return [min(losses) for losses in takewhile(bool, until)]

    def _left(self, trials: Sequence[Trial], *, first_best: bool = False) -> tuple[float, int, int]:
        """Return the remaining steps in complete runs, and the remaining starts and ends: see `Schedule.left`."""
        config = self.config.run_config
        config = replace(config, run=replace(config.run, eval_every=self._eval_every(config)))
        ends = [0, *(self.step_of(config, stage) for stage in range(1, self.schedule.last + 1))]
        left = self.schedule.left(trials, first_best=first_best)
        finished = sum(after == self.schedule.last for _, after in left)
        return sum(ends[after] - ends[before] for before, after in left) / ends[-1], len(left), finished

    def _time_left(self, trials: Sequence[Trial], busy: Busy | None = None) -> str:
        """Return the time that remains, as a range while it depends on the rank of the options as given, or ""."""
        least_s, most_s = (self._seconds(*self._left(trials, first_best=best)) for best in (True, False))
        return between(least_s, most_s, busy) if most_s else ""

    def _seconds(self, runs: float, starts: int, ends: int) -> float:
        return runs * self.run.mean + starts * self.start.mean + ends * self.end.mean

    def _measure(self, times: _TrialTimes, started_at: float, ended_at: float, steps: int, *, finished: bool) -> None:
        """Add the measured seconds of a trial's parts. A complete run of it has this number of steps."""
        (before, first_at), (after, last_at) = times.began, times.ended_at
        if after == before:  # it had been trained before, or was left after a step that is not logged
            return
        self.run.add(last_at - first_at, (after - before) / steps)
        pause_s = ended_at - last_at
        self.start.add(first_at - started_at + (0.0 if finished else pause_s))
        if finished:
            self.end.add(pause_s)

    def _may_start(self) -> bool:
        """Return True if there is time for one more trial and for finishing the best one."""
        hours = self.config.search.hours
        if hours is None or not self.run.mean:
            return True
        needed = 1 + 2 * (self.schedule.options.seeds - 1)
        return time.monotonic() - self.started_at + self._seconds(needed, needed, needed) <= hours * 3600

    def _print_result(self, trials: list[Trial], trial: Trial) -> None:
        """Print a line about a trial that has ended a stage or failed."""
        config = self.trial_config(trial)
        if trial.failed is not None:
            self._console.print(f"{self.describe(trial)}: failed: {trial.failed}")
            return
        at = "to the end" if trial.done == self.schedule.last else f"to step {trial.steps} of {self.steps(config)}"
        left = f"  about {left} left" if (left := self._time_left(trials)) else ""
        measure = Measure.of(config)
        shown = f"{measure.name} {measure.shown(trial.losses[-1])}"
        self._console.print(f"{self.describe(trial)}, {at}: {shown}{left}")

    def describe(self, trial: Trial) -> str:
        """Return name and values of a trial."""
        values = [f"{name} {value}" for name, value in trial.values.items()]
        if trial.number == 0:
            values.insert(0, "as given")
        if trial.repeats is not None:
            values.append(f"seed {trial.seed}")
        return f"trial {trial.name} ({', '.join(values)})"

    def finish(self) -> SearchResult:
        """Publish the best adapter, write search.json and the report, and print the result."""
        with self.study.locked():
            trials = self.study.trials()
            result = result_of(self.config, self.schedule, trials, self.steps(self.config))
            target = write_result(result, self.config, self.schedule, trials)
        if not self.config.run.quiet:
            say(*result.lines(), f"Report: {shlex.quote(str(target))}")
        return result


_PAUSED = 128


def _is_due_to_values(error: BackhandError, trial: Trial, *, resumed: bool) -> bool:
    """Return True if the values caused this error: the trial has failed, and the search continues.

    Other errors, such as a damaged file or a full disk, end the search. The trial can continue once they are repaired.
    """
    if isinstance(error, CheckError):
        return True
    if trial.number == 0 or resumed:
        return False
    memory = isinstance(error, ResourceError) and error.where in ("memory", "cache_frozen")
    return memory or (isinstance(error, UsageError) and error.where != "output")


def _row_digests(path: Path) -> dict[str, str]:
    """Return the digests in rows.json. Raises ArtifactError."""
    digests = read_json_object(path)
    if digests.keys() != {"data", "held_out"} or not all(isinstance(value, str) for value in digests.values()):
        raise ArtifactError(
            "these are not the digests of a search's rows",
            where=str(path),
            next_step="restore the file from a copy, or start another search with another --output",
        )
    return digests


def _start_or_resume(config: TrainConfig) -> TrainConfig:
    """Return the configuration to start a run, or to resume one with the options in its directory."""
    run = config.run
    return TrainConfig(run=RunOptions(output=run.output, resume=True, quiet=True)) if run.resume else config
