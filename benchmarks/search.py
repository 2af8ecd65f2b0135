"""A search against the commands that it takes the place of, and what it finds against a grid of 16 rates.

    python benchmarks/search.py time [--trials 12] [--rows 120] [--threads 2]
    python benchmarks/search.py found [--tasks text translate headline define write]
    python benchmarks/search.py replay

`time`: one `backhand search --prune none --sampler random` of twelve trials, then the same twelve runs as twelve
commands, `backhand train trials/NAME/config.toml`. Each must leave the trial's adapter bit for bit before a time is
believed. The default pruning is measured too. `found`: the default search on the rows and with the options of the grids
that benchmarks/rates.py has stored, 16 rates from 1e-4 to 1e-2, every run to its end: by how much its best held-out
loss is above the grid's, and how many runs' steps it trained in all, the comparison with the options as given among
them. `replay`: the same question put to the stored curves, between whose rates losses are interpolated, for five seeds:
the default search proposes, prunes and promotes as it does, and no model runs. Results of the first two go to
benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import describe_machine
from rates import FINE, REAL, Case, rows_of

from backhand.search.command import ABOVE, BELOW
from backhand.search.options import SearchOptions
from backhand.search.schedule import Schedule, Stage, best_of
from backhand.search.space import Values
from backhand.search.study import Trial

HERE = Path(__file__).parent
TASKS = ("text", *REAL)


def command(*words: object) -> float:
    """Run `backhand` in a process of its own; return the seconds. Raises RuntimeError if it failed."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "backhand", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=peer_environment("backhand"))
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def options(case: Case, folder: Path, threads: int) -> list[object]:
    """Of a run, as benchmarks/rates.py makes it."""
    rows = rows_of(case.task, case.rows)
    train, held_out = folder / f"{case.task}.jsonl", folder / f"{case.task}_held_out.jsonl"
    for path, part in ((train, rows[: case.rows]), (held_out, rows[case.rows :])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    words: list[object] = ["--data", train, "--eval-data", held_out, "--model", case.model, "--threads", threads]
    words += ["--batch-rows", case.batch_rows, "--micro-batch-rows", case.batch_rows, "--epochs", case.epochs]
    return [*words, "--base", "dense", "--recompute", "none", "--cache-frozen", "off", "--answers", 0, "--quiet"]


def measure_time(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a search of full trials, of the same runs as commands, and of a search that prunes."""
    words = options(Case("json", arguments.rows, batch_rows=8), folder, arguments.threads)
    search = ["search", *words, "--max-steps", arguments.steps, "--trials", arguments.trials]
    whole_s = command(*search, "--prune", "none", "--sampler", "random", "--output", folder / "whole")
    commands_s = 0.0
    for trial in sorted((folder / "whole" / "trials").glob("[0-9][0-9][0-9]")):
        again = folder / "alone" / trial.name
        again.parent.mkdir(exist_ok=True)
        commands_s += command("train", trial / "config.toml", "--output", again, "--quiet")
        adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (trial, again)]
        if adapters[0] != adapters[1]:
            raise SystemExit(f"{trial.name}: the trial and the run made alone leave adapters that differ")
    pruned_s = command(*search, "--output", folder / "pruned")
    return {"trials": arguments.trials, "search_s": whole_s, "commands_s": commands_s, "pruned_search_s": pruned_s}


def measure_found(task: str, threads: int, folder: Path) -> dict[str, Any]:
    """What the default search finds, against every point of the stored grid."""
    case = Case(task, 104, batch_rows=8)
    grid, _ = stored_grids()[case.name]
    command("search", *options(case, folder, threads), "--output", folder / task)
    result = json.loads((folder / task / "search.json").read_text())
    best = min(run["best"] for run in grid.values())
    total = max(trial["steps"] for trial in result["all"])
    return {
        "grid_best": best,
        "search_best": result["loss"],
        "above": result["loss"] / best - 1,
        "runs": sum(trial["steps"] for trial in result["all"]) / total,
        "as_given": result["given_loss"],
        "rate": result["values"]["learning_rate"],
    }


def stored_grids() -> dict[str, tuple[dict[str, Any], float]]:
    """Runs of 16 rates by their rates, and the rate that `auto` chose there, by the case's name."""
    found = {}
    for name, runs in json.loads((HERE / "results" / "rates.json").read_text())["runs"].items():
        grid = {rate: run for rate in map("{:g}".format, FINE) if (run := runs.get(rate))}
        if len(grid) == len(FINE) and "auto" in runs:
            found[name] = grid, runs["auto"]["rate"]
    return found


class Replayed:
    """A study whose trials are read off the curves of a grid."""

    def __init__(self, found: dict[str, Any], total: int, stages: Sequence[Stage]) -> None:
        self.found, self.total, self.stages, self.all = found, total, stages, list[Trial]()

    def trials(self) -> list[Trial]:
        return list(self.all)

    def claim(self, trial: Trial) -> bool:
        return trial.number < len(self.all)

    def add(self, values: Values, seed: int, goal: int, repeats: int | None = None) -> Trial:
        self.all.append(Trial(len(self.all), values, seed, repeats, goal))
        return self.all[-1]

    def write(self, number: int, attributes: dict[str, Any]) -> None:
        self.all[number] = replace(self.all[number], **attributes)

    def run(self, trial: Trial) -> None:
        """Bring it to its goal."""
        curve = curve_at(self.found, float(trial.values["learning_rate"]))
        losses, steps = [], 0
        for stage in self.stages[: trial.goal]:
            steps = min(curve, key=lambda step: abs(step - stage.share * self.total))
            losses.append(min(loss for step, loss in curve.items() if step <= steps))
        self.write(trial.number, {"losses": tuple(losses), "done": trial.goal, "steps": steps})


def curve_at(found: dict[str, Any], rate: float) -> dict[int, float]:
    """Held-out losses by their steps, between the two rates of the grid that are next to this one."""
    grid = sorted((float(one), run["evaluations"]) for one, run in found.items() if "evaluations" in run)
    above = next((number for number, (one, _) in enumerate(grid) if one >= rate), len(grid) - 1)
    (low, one), (high, other) = grid[max(0, above - 1)], grid[above]
    part = 0.0 if low == high else min(max((math.log(rate / low)) / math.log(high / low), 0.0), 1.0)
    pairs = zip(one, other, strict=True)
    return {step: math.exp((1 - part) * math.log(x) + part * math.log(y)) for (step, x), (_, y) in pairs if step}


def replay(found: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    """The default search on stored curves."""
    total = max(run["steps"] for run in found.values())
    search = SearchOptions(over=(f"learning_rate={rate / BELOW:.4g}:{rate * ABOVE:.4g}:log",))
    schedule = Schedule(search, search.dimensions, {"learning_rate": rate}, seed)
    study: Any = Replayed(found, total, schedule.stages)
    while isinstance(trial := schedule.next(study, may_start=True), Trial):
        study.run(trial)
    best = min(run["best"] for run in found.values())
    chosen = best_of(study.all, schedule.last)
    assert chosen is not None
    return {
        "auto": study.all[0].losses[-1] / best - 1,
        "above": chosen.losses[-1] / best - 1,
        "rate": chosen.values["learning_rate"],
        "runs": sum(trial.steps for trial in study.all) / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "found", "replay"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "replay":
        for name, (grid, rate) in stored_grids().items():
            replays = [replay(grid, rate, seed) for seed in range(5)]
            print(name, *(f"{one['above']:+.2%} in {one['runs']:.2f} runs" for one in replays), sep="  ")
        return
    target = HERE / "results" / "search.json"
    with tempfile.TemporaryDirectory() as name:
        measured: dict[str, Any] = {"machine": describe_machine()}
        if arguments.what == "time":
            measured["time"] = measure_time(arguments, Path(name))
        else:
            for task in arguments.tasks:
                measured[task] = measure_found(task, arguments.threads, Path(name))
                print(task, measured[task], flush=True)
        stored: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps(stored | {arguments.what: measured}, indent=1) + "\n")
        print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
