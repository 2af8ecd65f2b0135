"""A whole fine-tuning on short instruction rows: this project against TRL's SFTTrainer.

    python benchmarks/finetune.py [--dtype bfloat16] [--rows 320] [--repeats 3]

Rows, epochs, rate, schedule, rank, batch, dtype and the end are the same for all; each run is a process of its own,
and the peers take turns. What is compared is real tokens (padding not counted) per second of training, and the loss on
held-out rows, which one evaluator measures for every adapter. Results go to benchmarks/results/finetune.json.
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
PEERS = (
    "backhand",
    "backhand-unshared",
    "backhand-transformers",
    "trl",
    "trl-no-checkpointing",
    "trl-no-checkpointing-tuned",
    "trl-no-checkpointing-tuned-openmp",
    "trl-packing-tuned",
)
# Without a variable-length kernel packing attends over whole packs, several times slower than the rest: once is enough.
MEASURED_ONCE = ("trl-packing-tuned",)


def run_peer(peer: str, task: dict[str, Any], output: Path, threads: int) -> dict[str, Any]:
    """One run in its own process; its result, the last line of its output.

    Raises:
        RuntimeError: the run failed, such as for memory.
    """
    command = [sys.executable, str(HERE / "finetune_worker.py"), peer, json.dumps(task), str(output), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=peer_environment(peer))
    if done.returncode:
        raise RuntimeError(f"{peer} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def held_out_loss(model: str, adapter: str | None, data: str, dtype: str) -> float:
    """Mean nats per supervised token, by this project's evaluation for every peer's adapter."""
    from backhand.data.options import DataOptions
    from backhand.loop.evaluate import evaluate
    from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
    from backhand.options.config import ModelOptions

    result = evaluate(
        EvaluateOptions(
            model=ModelOptions(model=model, dtype=dtype),
            data=DataOptions(data=(data,), eval_fraction=0.0),
            run=EvaluateRunOptions(adapter=None if adapter is None else Path(adapter), completions=False),
        )
    )
    score = result.base if adapter is None else result.adapted
    return float(score.loss)


def token_counts(model: str, data: str) -> dict[str, int]:
    """Real and supervised tokens of the training rows."""
    from backhand.data.options import DataOptions
    from backhand.data.prepare import prepare
    from backhand.nn.loading import open_model

    train, _ = prepare(DataOptions(data=(data,), eval_fraction=0.0), open_model(model).tokenizer())
    return {
        "rows": len(train.examples),
        "tokens": sum(len(example.input_ids) for example in train.examples),
        "supervised_tokens": sum(int(example.supervised.sum()) for example in train.examples),
    }


def main() -> None:
    """Parse, run, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--held-out-rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "finetune.json")
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    arguments = parser.parse_args()
    cap_instructions(arguments.instructions)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    show(result)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs of all peers, in turns."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    write_rows(train, arguments.rows, seed=1)
    write_rows(held_out, arguments.held_out_rows, seed=2)
    task = {
        "model": arguments.model,
        "train": str(train),
        "held_out": str(held_out),
        "epochs": arguments.epochs,
        "batch_rows": arguments.batch_rows,
        "dtype": arguments.dtype,
    }
    counts = token_counts(arguments.model, str(train))
    tokens = counts["tokens"] * arguments.epochs
    seconds: dict[str, list[float]] = {peer: [] for peer in arguments.peers}
    losses: dict[str, list[float]] = {peer: [] for peer in arguments.peers}
    peak_bytes: dict[str, list[int]] = {peer: [] for peer in arguments.peers}
    for repeat in range(arguments.repeats):
        for peer in arguments.peers:
            if repeat and peer in MEASURED_ONCE:
                continue
            try:
                done = run_peer(peer, {**task, "seed": repeat}, folder / f"{peer}-{repeat}", arguments.threads)
            except RuntimeError as error:
                # The other peers' hours are not to be lost for one.
                print(error, file=sys.stderr)
                continue
            seconds[peer].append(done["train_s"])
            peak_bytes[peer].append(done["peak_rss_bytes"])
            losses[peer].append(held_out_loss(arguments.model, done["adapter"], str(held_out), arguments.dtype))
    peers = {
        peer: {
            "train_s": {"min": min(times), "median": statistics.median(times), "max": max(times)},
            "tokens_per_s": tokens / statistics.median(times),
            "held_out_loss": losses[peer],
            "peak_rss_bytes": statistics.median(peak_bytes[peer]),
        }
        for peer, times in seconds.items()
        if times
    }
    others = [peer for peer in peers if peer.startswith("trl")]
    ratios = {}
    for name, prefix in (("backhand", ""), ("backhand-transformers", "transformers_")):
        if name not in peers:
            continue
        ours = peers[name]["tokens_per_s"]
        over = {f"{prefix}speed_over_{peer}": ours / peers[peer]["tokens_per_s"] for peer in others}
        ratios |= over | {f"{prefix}speed_over_best_trl": min(over.values(), default=float("nan"))}
    return {
        "machine": describe_machine(arguments.instructions),
        "workload": {**{k: v for k, v in task.items() if k not in ("train", "held_out")}, **counts},
        "base_held_out_loss": held_out_loss(arguments.model, None, str(held_out), arguments.dtype),
        "peers": peers,
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    """A plain table."""
    print(result["workload"], f"base held-out loss {result['base_held_out_loss']:.4f}")
    print(f"{'peer':34} {'tokens/s':>9} {'train s: min':>12} {'median':>8} {'max':>8} {'GB':>6}  held-out losses")
    for peer, row in result["peers"].items():
        spread = row["train_s"]
        losses = ", ".join(f"{loss:.4f}" for loss in row["held_out_loss"])
        print(
            f"{peer:34} {row['tokens_per_s']:9.0f} {spread['min']:12.2f} {spread['median']:8.2f} {spread['max']:8.2f}"
            f" {row['peak_rss_bytes'] / 1e9:6.2f}  {losses}"
        )
    for name, value in result["ratios"].items():
        print(f"  {name:44} {value:6.2f}")


if __name__ == "__main__":
    main()
