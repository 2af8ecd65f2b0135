"""The page of a search: one sentence, held-out losses against each setting, what decided, runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from backhand.report import charts
from backhand.report.comparison import comparison_values
from backhand.report.rendering import figure, percent, render, time_taken
from backhand.report.run_record import read_run
from backhand.search.schedule import Schedule
from backhand.search.study import TRIALS, Trial

_MOST_SIDE_BY_SIDE = 4


def search_page(
    output: Path, sentence: str, importance: Mapping[str, float], schedule: Schedule, trials: Sequence[Trial]
) -> bytes:
    """The page as one HTML file."""
    measured = [trial for trial in trials if trial.losses and trial.failed is None]
    ended = sorted((trial for trial in measured if trial.done == schedule.last), key=lambda trial: trial.losses[-1])
    shown = sorted(ended[:_MOST_SIDE_BY_SIDE], key=lambda trial: trial.number)
    runs = [read_run(output / TRIALS / trial.name) for trial in shown]
    values = comparison_values(runs, [_name(trial) for trial in shown])
    for dimension in schedule.dimensions:
        rows = [
            {
                "x": trial.values[dimension.name],
                "loss": trial.losses[-1],
                "reached": _reached(schedule, trial),
                "trial": _name(trial),
            }
            for trial in measured
        ]
        kind = "nominal" if dimension.choices else "log" if dimension.log else "linear"
        stages = [_stage(stage.share) for stage in schedule.stages]
        values["charts"][f"setting-{dimension.name}"] = charts.settings(rows, dimension.name, kind, stages)
    return render(
        "search.html.j2",
        {
            **values,
            "title": f"{output.name}: search",
            "sentence": sentence,
            "dimensions": [dimension.name for dimension in schedule.dimensions],
            "importance": [(name, percent(share)) for name, share in importance.items()],
            "rows": [_row(schedule, trial) for trial in sorted(trials, key=_rank)],
        },
    )


def _rank(trial: Trial) -> tuple[float, ...]:
    """Those that came farthest first, and of these the lowest loss."""
    return (-trial.done, trial.losses[-1] if trial.losses else 0.0, trial.number)


def _row(schedule: Schedule, trial: Trial) -> list[str]:
    values = [figure(trial.values[dimension.name]) for dimension in schedule.dimensions]
    loss = f"{trial.losses[-1]:.4f}" if trial.losses and trial.failed is None else "–"
    reached = trial.failed or _reached(schedule, trial)
    return [_name(trial), *values, str(trial.seed), loss, reached, time_taken(trial.spent_s)]


def _name(trial: Trial) -> str:
    more = "" if trial.repeats is None else f" (as {trial.repeats:03d}, seed {trial.seed})"
    return f"{trial.name}{' as given' if trial.number == 0 else ''}{more}"


def _reached(schedule: Schedule, trial: Trial) -> str:
    return _stage(schedule.stages[trial.done - 1].share) if trial.done else "nothing yet"


def _stage(share: float) -> str:
    return "to the end" if share == 1 else f"{share:.0%} of its steps"
