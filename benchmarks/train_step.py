"""One training step on the same batch: this project against PEFT, and against its matrix products alone.

    python benchmarks/train_step.py [--dtype bfloat16 float32] [--rows 4] [--length 256] [--steps 7]
    python benchmarks/train_step.py --instructions avx2 --dtype float32 --output benchmarks/results/train_step_avx2.json
    python benchmarks/train_step.py --model 1.5b --add --output benchmarks/results/shapes.json
    python benchmarks/train_step.py --long-row 8192 --model 0.5b --dtype bfloat16 --threads 1 --seconds 300

Every peer runs in its own process; the processes take turns, so that drift of the machine hits all alike, and of the
two steps of a turn the second is timed. Before a time is believed, all peers must agree on the first loss and have a
gradient norm above zero. Peers that are tuned have what a run of ours sets for itself, the ceiling too: the allocator,
large pages, the route of float32 products. The medians, spreads and ratios, with machine and versions, go to
benchmarks/results/train_step.json; with --add in addition to the results of other workloads. With one thread, times are
processor time, which other processes on the machine hardly change. A model is a file, a directory, a known name, the
shape of one in random_gguf.py, or granite-4-h (random_hybrid.py).

--long-row measures one row and adds it to benchmarks/results/long_rows.json. Its peers are never in memory at the same
time: each turn starts a new process. A peer whose memory does not suffice is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import CAPS, cap_instructions, describe_machine
from random_gguf import SHAPES, write_random_model
from random_hybrid import NAME as HYBRID
from random_hybrid import write_random_hybrid

HERE = Path(__file__).parent
PEERS = (
    "backhand",
    "peft",
    "peft-tuned",
    "peft-tuned-openmp",
    "peft-checkpointing",
    "backhand-recompute-mlp",
    "backhand-recompute-block",
    "backhand-transformers",
    "products-alone",
)
LONG_ROW_PEERS = ("backhand", "peft-tuned", "products-alone")
# Relative difference of the first step's loss that two dtypes' roundings allow.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


class EndedError(Exception):
    """A peer's process ended without an answer."""


class Worker:
    """A peer's process."""

    def __init__(self, peer: str, workload: dict[str, Any], threads: int) -> None:
        self.peer = peer
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), peer, json.dumps(workload), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=peer_environment(peer),
        )
        self.loading = self._answer()
        self.loaded_bytes = self.loading["loaded_bytes"]
        self.steps: list[dict[str, float]] = []

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EndedError(f"{self.peer} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self) -> None:
        """One step, recorded."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self._answer())

    def timed_step(self, clock: str) -> float:
        """Return the seconds of the second of two steps by a clock, `step_s` or `processor_s`.

        A process that has waited for the others pays in its first step for what was taken from it meanwhile: its code
        and data in the caches, and in a virtual machine, once it has waited some seconds, 3 µs for each page of 4 KiB.
        A run waits for nobody.
        """
        self.step()
        self.step()
        return self.steps[-1][clock]

    def yield_memory(self) -> None:
        """Let the system end this process first if memory does not suffice.

        A limit on the process's memory would keep the heap from large pages (`kernels.large_pages`).
        """
        Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("1000")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def check_parity(workers: list[Worker], dtype: str) -> None:
    """All trainers agree on the first loss, and have a gradient."""
    trainers = [w for w in workers if w.peer != "products-alone"]
    expected = trainers[0].steps[0]["loss"]
    for worker in trainers:
        first = worker.steps[0]
        if not first["grad_norm"] > 0:
            raise SystemExit(f"{worker.peer}: gradient norm {first['grad_norm']} in the first step")
        if abs(first["loss"] / expected - 1) > LOSS_TOLERANCE[dtype]:
            raise SystemExit(f"{worker.peer}: first loss {first['loss']}, {trainers[0].peer} has {expected}")


def measure(dtype: str, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved steps of all peers in one dtype."""
    workload = {"model": model, "rows": arguments.rows, "length": arguments.length, "dtype": dtype}
    workers = [Worker(peer, workload, arguments.threads) for peer in arguments.peers]
    for _ in range(arguments.warmup):
        for worker in workers:
            worker.step()
    times: dict[str, list[float]] = {worker.peer: [] for worker in workers}
    for _ in range(arguments.steps):
        for worker in workers:
            times[worker.peer].append(worker.timed_step(clock(arguments)))
    for worker in workers:
        worker.close()
    return summary(workers, times, dtype, arguments)


def measure_long_row(dtype: str, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Third steps of all peers in one dtype, with one process at a time. No turn starts after `--seconds`."""
    workload = {"model": model, "rows": 1, "length": arguments.length, "dtype": dtype}
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {peer: [] for peer in arguments.peers}
    began = time.monotonic()
    for turn in range(arguments.steps):
        if turn > 0 and time.monotonic() - began > arguments.seconds:
            break
        for peer in list(times):
            try:
                workers[peer] = worker = Worker(peer, workload, arguments.threads)
                worker.yield_memory()
                worker.step()  # after which a run gives unused memory back, which the next step faults in again
                times[peer].append(worker.timed_step(clock(arguments)))
                worker.close()
            except EndedError as error:
                if peer == "backhand":
                    raise
                print(f"left out: {error}", file=sys.stderr)
                workers.pop(peer, None)
                del times[peer]
    return summary(list(workers.values()), times, dtype, arguments)


def clock(arguments: argparse.Namespace) -> str:
    """Return the name of the clock: processor time with one thread, otherwise elapsed time."""
    return "processor_s" if arguments.threads == 1 else "step_s"


def summary(
    workers: list[Worker], times: dict[str, list[float]], dtype: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the results of one dtype, after a check that they belong to the same training step."""
    check_parity(workers, dtype)
    tokens = arguments.rows * arguments.length
    results = {}
    for worker in workers:
        median = statistics.median(times[worker.peer])
        results[worker.peer] = {
            "step_s": {"min": min(times[worker.peer]), "median": median, "max": max(times[worker.peer])},
            "tokens_per_s": tokens / median,
            "memory_above_model_bytes": int(worker.steps[-1]["peak_bytes"]) - worker.loaded_bytes,
            "first_loss": worker.steps[0]["loss"],
            "last_loss": worker.steps[-1]["loss"],
            "first_grad_norm": worker.steps[0]["grad_norm"],
        }
    workload = {"model": arguments.model, "rows": arguments.rows, "length": arguments.length, "dtype": dtype}
    workload["threads"] = arguments.threads
    return {"workload": workload, "peers": results, "ratios": ratios(results, times)}


def ratios(results: dict[str, Any], times: dict[str, list[float]]) -> dict[str, float]:
    """Speed and memory against each peer that was measured, and the share of the ceiling.

    A speed ratio is the median over the rounds of that round's ratio: what slows the machine for a while slows all
    peers of a round.
    """

    def speed_over(peer: str, ours: str = "backhand") -> float:
        return statistics.median(theirs / own for own, theirs in zip(times[ours], times[peer], strict=True))

    found = {}
    for peer in ("peft", "peft-tuned", "peft-tuned-openmp", "peft-checkpointing"):
        if peer in results:
            name = peer.replace("-", "_")
            found[f"speed_over_{name}"] = speed_over(peer)
            found[f"memory_over_{name}"] = (
                results["backhand"]["memory_above_model_bytes"] / results[peer]["memory_above_model_bytes"]
            )
    if "backhand-transformers" in results:
        memory = results["backhand-transformers"]["memory_above_model_bytes"]
        for peer in ("backhand", "peft", "peft-tuned", "peft-tuned-openmp"):
            if peer in results:
                name = peer.replace("-", "_")
                found[f"transformers_speed_over_{name}"] = speed_over(peer, "backhand-transformers")
                found[f"transformers_memory_over_{name}"] = memory / results[peer]["memory_above_model_bytes"]
    if "products-alone" in results:
        found["share_of_all_products"] = speed_over("products-alone")
    return found


def show(result: dict[str, Any]) -> None:
    """A plain table."""
    print(f"\n{result['workload']}")
    print(f"{'peer':26} {'tokens/s':>9} {'step s: min':>12} {'median':>8} {'max':>8} {'MiB above model':>16}")
    for peer, row in result["peers"].items():
        step = row["step_s"]
        print(
            f"{peer:26} {row['tokens_per_s']:9.0f} {step['min']:12.3f} {step['median']:8.3f} {step['max']:8.3f}"
            f" {row['memory_above_model_bytes'] / 2**20:16.0f}"
        )
    for name, value in result["ratios"].items():
        print(f"  {name:34} {value:6.2f}")


def main() -> None:
    """Parse, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "train_step.json")
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    parser.add_argument("--add", action="store_true", help="leave what --output has of other workloads")
    parser.add_argument("--long-row", type=int, metavar="TOKENS", help=f"one row; peers: {' '.join(LONG_ROW_PEERS)}")
    parser.add_argument("--seconds", type=float, default=300, help="of --long-row, for each dtype: start no turn later")
    arguments = parser.parse_args()
    run_one = measure
    if arguments.long_row is not None:
        arguments.rows, arguments.length, arguments.add, run_one = 1, arguments.long_row, True, measure_long_row
        arguments.output = HERE / "results" / "long_rows.json"
    arguments.peers = arguments.peers or list(PEERS if arguments.long_row is None else LONG_ROW_PEERS)
    cap_instructions(arguments.instructions)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model == HYBRID:
            model = str(write_random_hybrid(Path(folder) / model))
        elif model in SHAPES:
            model = str(write_random_model(Path(folder) / f"{model}.gguf", SHAPES[model]))
        try:
            runs = [run_one(dtype, model, arguments) for dtype in arguments.dtype]
        except EndedError as error:
            raise SystemExit(str(error)) from None
    for run in runs:
        show(run)
    machine = describe_machine(arguments.instructions)
    results: dict[str, Any] = {"machine": machine, "runs": runs}
    if arguments.add:
        results = {"runs": added(arguments.output, [{"machine": machine, **run} for run in runs])}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def added(path: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of a file and these, which replace runs of the same workload and instructions."""

    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        machine = run["machine"]
        return machine["processor"], machine.get("capped_to"), run["workload"]

    measured = [key(run) for run in runs]
    before = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return [run for run in before if key(run) not in measured] + runs


if __name__ == "__main__":
    main()
