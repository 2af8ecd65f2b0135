"""Adapting the upper third of the layers, with the hidden states below kept and without, and all layers for comparison.

    python benchmarks/upper_layers.py [--tasks short faq pirate tickets] [--layers last:10] [--repeats 3]
    python benchmarks/upper_layers.py --tasks short --rows 96 --repeats 2
    python benchmarks/upper_layers.py --tasks short --instructions avx512bf16 --add

`backhand train`, three epochs, each run a process of its own, in turns: all layers; upper layers with
`--cache-frozen off`; the same with `--cache-frozen memory`. The last two must leave the same adapter, bit for bit,
before a time is believed. `short` are the rows of finetune.py, the others those of docs/recipes. Seconds are those of
the training steps (`train_s` of summary.json), in which a row's hidden states are computed, kept and looked at; ratios
are medians over the rounds. Results go to benchmarks/results/upper_layers.json, one of `places` for each machine with
its instructions and options; with --add in addition to the results of other machines, instructions, options and tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import CAPS, cap_instructions, describe_machine
from short_rows import write_rows

HERE = Path(__file__).parent
RECIPES = HERE.parent / "docs" / "recipes"
TASKS = ("short", "faq", "pirate", "tickets")
PEERS = ("all-layers", "computed", "kept")


def files_of(task: str, rows: int, folder: Path) -> tuple[Path, Path]:
    """Training and held-out rows."""
    if task != "short":
        return RECIPES / f"{task}.jsonl", RECIPES / f"{task}_held_out.jsonl"
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    write_rows(train, rows, seed=1)
    write_rows(held_out, 32, seed=2)
    return train, held_out


def run_peer(peer: str, files: tuple[Path, Path], output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; its summary, and its adapter's bytes.

    Raises:
        RuntimeError: the run failed.
    """
    words = ["train", "--data", files[0], "--eval-data", files[1], "--output", output, "--model", arguments.model]
    words += ["--epochs", arguments.epochs, "--batch-rows", arguments.batch_rows, "--learning-rate", 1e-3]
    words += ["--dtype", arguments.dtype, "--threads", arguments.threads, "--answers", 0, "--quiet"]
    words += ["--eval-every", 10**6]  # before the first step and after the last
    if peer != "all-layers":
        words += ["--layers", arguments.layers, "--cache-frozen", "off" if peer == "computed" else "memory"]
    command = [sys.executable, "-m", "backhand", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=peer_environment("backhand"))
    if done.returncode:
        raise RuntimeError(f"{peer} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "adapter_bytes": (output / "adapter" / "adapter_model.safetensors").read_bytes()}


def measure(task: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs of a task, in turns."""
    files = files_of(task, arguments.rows, folder)
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in PEERS}
    for repeat in range(arguments.repeats):
        for peer in PEERS:
            runs[peer].append(run_peer(peer, files, folder / f"{task}-{peer}-{repeat}", arguments))
        if runs["kept"][-1]["adapter_bytes"] != runs["computed"][-1]["adapter_bytes"]:
            raise SystemExit(f"{task}: what was kept and what was computed leave adapters that differ")
    seconds = {peer: [run["train_s"] for run in found] for peer, found in runs.items()}
    peers = {
        peer: {
            "train_s": {"min": min(times), "median": statistics.median(times), "max": max(times)},
            "tokens_per_s": runs[peer][0]["tokens"] / statistics.median(times),
            "held_out_loss": runs[peer][0]["best_eval_loss"],
            "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs[peer]),
        }
        for peer, times in seconds.items()
    }
    ratios = {
        f"kept_over_{peer.replace('-', '_')}": statistics.median(
            theirs / ours for ours, theirs in zip(seconds["kept"], seconds[peer], strict=True)
        )
        for peer in PEERS
        if peer != "kept"
    }
    first = runs["kept"][0]
    tokens = {"rows": first["rows"], "tokens": first["tokens"], "supervised_tokens": first["supervised_tokens"]}
    workload = {"task": task, "base_held_out_loss": first["base_eval_loss"], **tokens}
    return {"workload": workload, "peers": peers, "ratios": ratios}


def show(result: dict[str, Any]) -> None:
    """A plain table."""
    print(f"\n{result['workload']}")
    print(f"{'':12} {'tokens/s':>9} {'train s: min':>12} {'median':>8} {'max':>8} {'peak GiB':>9} {'held-out':>9}")
    for peer, row in result["peers"].items():
        spread = row["train_s"]
        print(
            f"{peer:12} {row['tokens_per_s']:9.1f} {spread['min']:12.2f} {spread['median']:8.2f} {spread['max']:8.2f}"
            f" {row['peak_rss_bytes'] / 2**30:9.2f} {row['held_out_loss']:9.4f}"
        )
    for name, value in result["ratios"].items():
        print(f"  {name:28} {value:6.2f}")


def main() -> None:
    """Parse, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="last:10")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=160, help="of the task `short`")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "upper_layers.json")
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    parser.add_argument("--add", action="store_true", help="leave what --output has of other machines and tasks")
    arguments = parser.parse_args()
    cap_instructions(arguments.instructions)
    described = {name: getattr(arguments, name) for name in ("model", "layers", "dtype", "epochs", "batch_rows")}
    place: dict[str, Any] = {"machine": describe_machine(arguments.instructions), "options": described}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for task in arguments.tasks:
            runs.append(measure(task, arguments, Path(folder)))
            show(runs[-1])
    stored: list[dict[str, Any]] = []
    if arguments.add and arguments.output.exists():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))["places"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = {"places": with_runs(stored, place, runs)}
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def with_runs(stored: list[dict[str, Any]], place: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is stored, with these runs in the place of those of the same tasks on this machine with these options."""
    measured = [run["workload"]["task"] for run in runs]
    here = [other for other in stored if all(other[name] == value for name, value in place.items())]
    before = [run for other in here for run in other["runs"] if run["workload"]["task"] not in measured]
    return [*(other for other in stored if other not in here), {**place, "runs": [*before, *runs]}]


if __name__ == "__main__":
    main()
