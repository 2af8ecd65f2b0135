"""Result of a search: the best values, their gain over the options as given, the adapter, and the report."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from backhand.adapters.contents import CARD_FILE, CONFIG_FILE, RECORD_FILE, TENSOR_FILE, parse_json_object
from backhand.adapters.record import bytes_digest, changed_files, read_record
from backhand.errors import ArtifactError, CheckError
from backhand.files import FileLayer, json_bytes, write_atomically
from backhand.options.config import TrainConfig
from backhand.printing import duration
from backhand.reading import read_plain
from backhand.report import charts
from backhand.report.command import write_page
from backhand.report.comparison import comparison_values
from backhand.report.rendering import figure, render
from backhand.report.run_record import read_run
from backhand.runs.directory import ADAPTER, CONFIG, REPORT, SUMMARY, RunDirectory
from backhand.runs.summary import read_summary
from backhand.search.options import SearchConfig
from backhand.search.schedule import Schedule, best_of
from backhand.search.space import Values
from backhand.search.study import RESULT, TRIALS, Trial
from backhand.words import apart, count_of, mean_interval


@dataclass(frozen=True)
class SearchResult:
    """Result of a search. `search.json` contains these fields and every trial."""

    # output, adapter: directory of the search, and directory of the best adapter in it
    output: str
    adapter: str
    best: int  # number of the best trial
    values: Values  # of the best trial
    # loss, given_loss: held-out loss of the best trial and of the options as given, each the mean over the seeds;
    # None if the run with the options as given failed
    loss: float
    given_loss: float | None
    differences: tuple[float, ...]  # by seed: the loss of the options as given minus that of the best values tried
    sentence: str  # values to use, and their gain
    command: str  # which repeats the best trial
    importance: dict[str, float]  # share of each option, with the sum 1; empty if there are too few trials
    # trials, failed: number of trials without repetitions, and how many of them failed
    trials: int
    failed: int
    runs: float  # training of all trials together, in complete runs
    spent_s: float  # of all trials together

    def lines(self) -> list[str]:
        """Return the lines for the terminal."""
        ranked = sorted(self.importance.items(), key=lambda one: -one[1])
        importance = ", ".join(f"{name} {share:.0%}" for name, share in ranked)
        return [
            f"{count_of(self.trials, 'trial')} with the steps of {self.runs:.1f} runs, in {duration(self.spent_s)}"
            + (f"; {self.failed} failed" if self.failed else ""),
            self.sentence,
            *([f"Importance: {importance}."] if importance else []),
            f"Adapter: {self.adapter}",
            f"Repeat: {self.command}",
        ]


def result_of(config: SearchConfig, schedule: Schedule, trials: Sequence[Trial], steps: int) -> SearchResult:
    """Compare the trials.

    Args:
        steps: number of steps of a run with the options as given.

    Raises:
        CheckError: no trial finished.
    """
    best, given = best_of(trials, schedule.last), trials[0]
    if best is None:
        raise CheckError(
            "no trial finished",
            where=str(config.run.output),
            why=next((trial.failed for trial in trials if trial.failed), None),
            next_step="narrow the ranges of --over, or give a lower --learning-rate",
        )
    by_seed = [
        {trial.seed: trial.loss_at(schedule.last) for trial in trials if one.number in (trial.number, trial.repeats)}
        for one in (best, given)
    ]
    seeds = [seed for seed in by_seed[0] if by_seed[1].get(seed, math.inf) < math.inf] if not given.failed else []
    differences = tuple(by_seed[1][seed] - by_seed[0][seed] for seed in seeds)
    loss = statistics.mean(by_seed[0][seed] for seed in seeds or by_seed[0])
    given_loss = statistics.mean(by_seed[1][seed] for seed in seeds) if seeds else None
    measure, rows = Measure.of(config), _measured_on(config.run.output, best)
    others = [trial for trial in trials if trial.number and trial.repeats is None and trial.failed is None]
    briefly = bool(others) and all(trial.done < schedule.last for trial in others)
    sentence = _sentence(best, loss, given_loss, differences, measure, rows, briefly=briefly)
    if len(differences) > 1 and given_loss is not None and given_loss <= loss:
        best, loss = given, given_loss
    output, firsts = config.run.output, [trial for trial in trials if trial.repeats is None]
    path = output / TRIALS / best.name / CONFIG
    return SearchResult(
        output=str(output),
        adapter=str(output / ADAPTER),
        best=best.number,
        values=best.values,
        loss=loss,
        given_loss=given_loss,
        differences=differences,
        sentence=sentence + _tried_briefly(firsts, schedule.last, steps),
        command=f"backhand train {shlex.quote(str(path))} --output runs/again",
        importance=schedule.importance(trials),
        trials=len(firsts),
        failed=sum(trial.failed is not None for trial in firsts),
        runs=round(sum(trial.steps for trial in trials) / steps, 3),
        spent_s=round(sum(trial.spent_s for trial in trials), 1),
    )


class Measure(NamedTuple):
    """Words for the held-out losses of trials. The loss of a run on rewards is the negative of its mean reward."""

    name: str
    better: str
    best: str
    sign: int

    @classmethod
    def of(cls, config: TrainConfig) -> Measure:
        """Return the words for the objective of the trials."""
        if config.objective.objective == "grpo":
            return cls("held-out reward", "higher", "highest", -1)
        return cls("held-out loss", "lower", "lowest", 1)

    def shown(self, loss: float) -> str:
        """Format the loss or reward."""
        return f"{self.sign * loss + 0.0:.4f}"


def _measured_on(output: Path, trial: Trial) -> str:
    """Return the number of held-out rows of a finished trial as a clause, or "" if its summary is missing."""
    summary = read_summary(output / TRIALS / trial.name / SUMMARY)
    return "" if summary is None else f" on {count_of(summary.held_out_rows, 'row')}"


def _tried_briefly(trials: Sequence[Trial], last: int, steps: int) -> str:
    """Return a sentence about the trials that ended before their last step, or ""."""
    brief = [trial for trial in trials if trial.failed is None and trial.done < last]
    if not brief:
        return ""
    most = max(trial.steps for trial in brief)
    return f" {count_of(len(brief), 'trial')} of {len(trials)} ended early, after at most {most:,} of {steps:,} steps."


def _sentence(
    best: Trial,
    loss: float,
    given_loss: float | None,
    differences: Sequence[float],
    on: Measure,
    rows: str,
    *,
    briefly: bool,
) -> str:
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in best.values.items())
    options = options or "the options as given"
    seeds = count_of(len(differences), "seed")
    if given_loss is None:
        return f"Use {options}: {on.name} {on.shown(loss)}{rows}; with the options as given the run failed."
    if best.number == 0:
        mean = f", the mean of {seeds}" if len(differences) > 1 else ""
        given = f"the options as given ({on.shown(given_loss)}{rows}{mean})"
        if briefly:
            why = "all others ended early, judged by their first steps alone; --prune none trains them to the end"
            return f"No other trial was compared with {given}: {why}."
        return f"Keep {options}: no trial has a {on.better} {on.name} than {given}."
    after, before = apart(on.sign * loss + 0.0, on.sign * given_loss + 0.0, 4)
    figures = f"{on.name} {after}{rows}, {on.better} than {before} as given"
    if len(differences) < 2:
        chosen = "with one seed each, and chosen among the trials on these rows"
        return f"Use {options}: {figures}, {chosen}; --resume --seeds 3 tests if that is more than chance."
    gain, low, high = mean_interval(differences)
    if gain <= 0:
        first = f"{options} had the {on.best} {on.name} with the first seed, but not on average"
        return f"Keep the options as given: {first}; the mean of {seeds} is {after}{rows}, and {before} as given."
    unclear = "" if low > 0 else ": too few seeds to tell the difference from chance"
    interval = f"95 % interval {figure(low)} to {figure(high)} over {seeds}"
    return f"Use {options}: {figures} by {figure(gain)} ({interval}){unclear}."


def write_result(result: SearchResult, config: SearchConfig, schedule: Schedule, trials: Sequence[Trial]) -> Path:
    """Publish the best adapter, write search.json and report.html; return the page's path.

    Raises:
        ArtifactError: the adapter of the best trial is damaged. The one published before stays.
        ResourceError: a file cannot be written.
    """
    output = config.run.output
    RunDirectory(output.resolve(), FileLayer()).publish_adapter(checked_adapter(output, trials[result.best]))
    table: dict[str, Any] = {**asdict(result), "all": [asdict(trial) for trial in trials]}
    write_atomically(output / RESULT, json_bytes(table))
    target = output / REPORT
    write_page(target, _page(result, schedule, trials, Measure.of(config)))
    return target


def file_digests(directory: Path) -> dict[str, str]:
    """Return the digest of every file in a directory that was just written, by name."""
    return {path.name: bytes_digest(read_plain(path)) for path in sorted(directory.iterdir())}


def checked_adapter(output: Path, trial: Trial) -> dict[str, bytes]:
    """Return the files of a trial's adapter, compared with the digests from the end of the trial.

    Trials of earlier versions have no digests in the study. Their backhand.json has those of tensors and configuration.

    Raises:
        ArtifactError: a file is missing or has changed.
    """
    run = output / TRIALS / trial.name
    names = trial.adapter or (CONFIG_FILE, TENSOR_FILE, RECORD_FILE, CARD_FILE)
    contents: dict[str, bytes] = {}
    changed: list[str] = []
    for name in names:
        try:
            contents[name] = read_plain(run / ADAPTER / name)
        except OSError as error:
            changed.append(f"{name}: {error.strerror or error}")
    if trial.adapter:
        changed += [
            f"{name}: its bytes have changed"
            for name, data in contents.items()
            if bytes_digest(data) != trial.adapter[name]
        ]
    elif not changed:
        record = read_record(parse_json_object(contents[RECORD_FILE], RECORD_FILE), RECORD_FILE)
        changed += changed_files(record, {name: contents[name] for name in (CONFIG_FILE, TENSOR_FILE)})
    if changed:
        again = f"backhand train --resume --output {shlex.quote(str(run))}"
        raise ArtifactError(
            f"the adapter of the best trial has changed since its end; {ADAPTER}/ of the search stays as it is",
            where=str(run / ADAPTER),
            why="; ".join(changed),
            next_step=f"{again} restores it from the trial's checkpoint; then resume the search",
        )
    return contents


_MAX_COMPARED_RUNS = 4


def _page(result: SearchResult, schedule: Schedule, trials: Sequence[Trial], measure: Measure) -> bytes:
    """Return the report as one HTML file."""
    output = Path(result.output)
    with_losses = [trial for trial in trials if trial.losses and trial.failed is None]
    finished = sorted(
        (trial for trial in with_losses if trial.done == schedule.last), key=lambda trial: trial.losses[-1]
    )
    shown = sorted(finished[:_MAX_COMPARED_RUNS], key=lambda trial: trial.number)
    runs = [read_run(output / TRIALS / trial.name) for trial in shown]
    values = comparison_values(runs, [trial.label for trial in shown])
    for dimension in schedule.dimensions:
        rows = [
            {
                "x": trial.values[dimension.name],
                "loss": measure.sign * trial.losses[-1],
                "reached": schedule.reached(trial),
            }
            | {"trial": trial.label}
            for trial in with_losses
            if dimension.name in trial.values
        ]
        kind = "nominal" if dimension.choices else "log" if dimension.log else "linear"
        stages = [stage.name for stage in schedule.stages]
        values["charts"][f"setting-{dimension.name}"] = charts.settings(
            rows, dimension.name, kind, stages, measure.name
        )
    return render(
        "search.html.j2",
        {
            **values,
            "title": f"{output.name}: search",
            "result": result,
            "dimensions": [dimension.name for dimension in schedule.dimensions],
            "schedule": schedule,
            "measure": measure,
            # Trials that reached the latest stage come first, in the order of their losses.
            "trials": sorted(trials, key=lambda one: (-one.done, one.losses[-1] if one.losses else 0.0, one.number)),
        },
    )
