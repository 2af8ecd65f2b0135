"""A search against the commands that it takes the place of, and what it finds against a grid of 16 rates.

    python benchmarks/search.py time [--trials 12] [--rows 120] [--threads 2]
    python benchmarks/search.py grid [--tasks tickets pirate json arithmetic text] [--steps 48]
    python benchmarks/search.py replay

`time`: one `backhand search --prune none --sampler random` of twelve trials, then the same twelve runs as twelve
commands, `backhand train trials/NAME/config.toml`. Each must leave the trial's adapter bit for bit before a time is
believed. With the default pruning beside it. `grid`: on each task 16 rates from 1e-4 to 1e-2, every run to its end
(they share one model, as trials do), and the default search of as many steps a run: by how much its best held-out
loss is above the grid's, and how many runs' steps it had trained by then, the comparison with the options as given
apart. `replay`: the same question put to the curves that benchmarks/rates.py has stored, between whose rates losses are
interpolated: the default search proposes, prunes and promotes as it does, and no model runs. Results go to
benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
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
from rates import FINE

from backhand.search.command import ABOVE, BELOW
from backhand.search.options import SearchOptions
from backhand.search.schedule import Schedule, Stage
from backhand.search.space import Values
from backhand.search.study import Trial

HERE = Path(__file__).parent
RECIPES = HERE.parent / "docs" / "recipes"
TASKS = ("tickets", "pirate", "json", "arithmetic", "text")
POINTS = 16
LOWEST, HIGHEST = 1e-4, 1e-2


def rows_of(task: str, folder: Path, rows: int) -> tuple[Path, Path]:
    """Training and held-out rows of a task."""
    if task in ("tickets", "pirate"):
        return RECIPES / f"{task}.jsonl", RECIPES / f"{task}_held_out.jsonl"
    draw = random.Random(0)
    if task == "json":
        from backhand.data.demo_task import demo_rows

        found: list[dict[str, Any]] = [dict(row) for row in demo_rows(rows + rows // 2, seed=0)]
    elif task == "arithmetic":
        pairs = draw.sample([(a, b) for a in range(2, 100) for b in range(2, 100)], rows + rows // 2)
        found = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs]
    else:
        pages = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted(HERE.parent.glob("docs/*.md")))
        texts = [" ".join(text.split()) for text in pages.split("\n\n") if 200 < len(text) < 2000 and text[0].isalpha()]
        found = [{"text": text[:300]} for text in draw.sample(texts, min(len(texts), rows + rows // 2))]
    held_out = len(found) // 3
    paths = folder / f"{task}.jsonl", folder / f"{task}_held_out.jsonl"
    for path, part in zip(paths, (found[held_out:], found[:held_out]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths


def command(*words: object) -> float:
    """Run `backhand` in a process of its own; return the seconds. Raises RuntimeError if it failed."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "backhand", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=peer_environment("backhand"))
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def options(task: str, folder: Path, arguments: argparse.Namespace) -> list[object]:
    """Of every run of a task."""
    train, held_out = rows_of(task, folder, arguments.rows)
    words: list[object] = ["--data", train, "--eval-data", held_out, "--model", arguments.model, "--answers", 0]
    words += ["--threads", arguments.threads, "--batch-rows", 8, "--max-length", 96, "--max-rows", arguments.rows]
    return [*words, "--max-steps", arguments.steps, "--quiet"]


def measure_time(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a search of full trials, of the same runs as commands, and of a search that prunes."""
    words = options("json", folder, arguments)
    search = ["search", *words, "--trials", arguments.trials]
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


def measure_grid(task: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the default search finds, against every point of a grid."""
    words = options(task, folder, arguments)
    over = ["--over", f"learning_rate={LOWEST}:{HIGHEST}:log"]
    grid, found = folder / f"{task}-grid", folder / f"{task}-search"
    command("search", *words, *over, "--sampler", "grid", "--trials", POINTS, "--prune", "none", "--output", grid)
    command("search", *words, "--output", found)
    points = [trial for trial in json.loads((grid / "search.json").read_text())["all"] if trial["number"]]
    result = json.loads((found / "search.json").read_text())
    best = min(trial["losses"][-1] for trial in points)
    steps = sum(trial["steps"] for trial in result["all"])
    first = result["all"][0]
    beside = 0 if result["best"] == 0 else arguments.steps - _steps_at_first_stage(first, arguments.steps)
    return {
        "grid": sorted((trial["values"]["learning_rate"], trial["losses"][-1]) for trial in points),
        "grid_best": best,
        "search_best": result["loss"],
        "above": result["loss"] / best - 1,
        "runs": (steps - beside) / arguments.steps,
        "as_given": result["given_loss"],
        "rate": result["values"]["learning_rate"],
    }


class Replayed:
    """A study whose trials are read off the curves of a grid."""

    def __init__(self, found: dict[str, Any], total: int, stages: Sequence[Stage]) -> None:
        self.found, self.total, self.stages, self.all = found, total, stages, list[Trial]()

    def trials(self) -> list[Trial]:
        return list(self.all)

    def hold(self, trial: Trial) -> bool:
        return trial.number < len(self.all)

    def begin(self, values: Values, seed: int, goal: int, repeats: int | None = None) -> Trial:
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
    while isinstance(trial := schedule.next(study, may_begin=True), Trial):
        study.run(trial)
    best = min(run["best"] for run in found.values())
    ended = [trial for trial in study.all if trial.done == schedule.last]
    chosen = min(ended, key=lambda trial: trial.losses[-1])
    return {
        "grid_best": best,
        "auto": study.all[0].losses[-1] / best - 1,
        "above": chosen.losses[-1] / best - 1,
        "rate": chosen.values["learning_rate"],
        "runs": sum(trial.steps for trial in study.all) / total,
    }


def _steps_at_first_stage(trial: dict[str, Any], steps: int) -> int:
    return -(-steps // 8) if trial["done"] == 3 else int(trial["steps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "grid", "replay"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "replay":
        curves = json.loads((HERE / "results" / "rates.json").read_text())["runs"]
        for name, found in curves.items():
            grid = {rate: run for rate in map("{:g}".format, FINE) if (run := found.get(rate))}
            if len(grid) == POINTS and "auto" in found:
                told = [replay(grid, found["auto"]["rate"], seed) for seed in range(5)]
                print(name, *(f"{one['above']:+.2%} in {one['runs']:.2f} runs" for one in told), sep="  ")
        return
    target = HERE / "results" / "search.json"
    stored: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    stored["machine"] = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.what == "time":
            stored["time"] = measure_time(arguments, folder)
            print(json.dumps(stored["time"], indent=1))
        else:
            for task in arguments.tasks:
                stored.setdefault("grid", {})[task] = measured = measure_grid(task, arguments, folder)
                print(
                    task, f"above the grid's best by {measured['above']:.2%}, {measured['runs']:.2f} runs", flush=True
                )
    target.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
