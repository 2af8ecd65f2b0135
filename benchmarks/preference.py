"""Training on pairs of answers, DPO: this project against TRL's DPOTrainer.

    python benchmarks/preference.py [--dtype bfloat16] [--pairs 160] [--repeats 3] [--model smollm2-135m | 0.5b]

Pairs, rate, schedule, rank, batch, dtype and one epoch are the same for all; each run is a process of its own, and the
peers take turns. A prompt is about three times as long as an answer. What is compared is pairs per second, from the
trainer's begin to its end: the reference's log-probabilities are part of it, whoever computes them when. `trl` is as
users run it, `trl-precomputed-tuned` at its best here (reference computed beforehand, no checkpointing, the allocator
and float32 route of ours), `backhand-answers` trains on as many tokens as answers, for the memory. `0.5b` is a model of
Qwen2's shape with random weights. Results are added to benchmarks/results/preference.json.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import CAPS, cap_instructions, describe_machine

HERE = Path(__file__).parent

PEERS = (
    "backhand",
    "backhand-answers",
    "trl",
    "trl-precomputed",
    "trl-precomputed-tuned",
    "trl-precomputed-tuned-openmp",
)
BETA = 0.1
_WORDS = (
    *("the", "order", "a", "parcel", "came", "late", "from", "Lisbon", "and", "we", "ask", "for", "price", "of", "two"),
    *("small", "boxes", "which", "were", "open", "when", "they", "arrived", "with", "note", "that", "says", "return"),
)


def write_pairs(path: Path, count: int, seed: int) -> None:
    """Pairs in TRL's conversational form: about 90 tokens of prompt, 30 of each answer, and the template's own."""
    draw = random.Random(seed)

    def said(least: int, most: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(least, most)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {
                "prompt": [{"role": "user", "content": said(70, 110)}],
                "chosen": [{"role": "assistant", "content": said(20, 30)}],
                "rejected": [{"role": "assistant", "content": said(25, 40)}],
            }
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# One run of one peer.


def run_backhand(task: dict[str, Any], output: Path, *, answers: bool = False) -> dict[str, Any]:
    """`backhand.train` as the command calls it; with `answers`, on both answers of each pair as rows of their own."""
    from peers import ALPHA, LEARNING_RATE, RANK

    import backhand
    from backhand.adapters.config import LoRAConfig
    from backhand.data.options import DataOptions
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
    from backhand.options.objectives import ObjectiveOptions

    data, batch_rows = task["data"], task["batch_rows"]
    if answers:
        rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
        split = [{"prompt": row["prompt"], "completion": row[side]} for row in rows for side in ("chosen", "rejected")]
        data, batch_rows = str(output / "answers.jsonl"), 2 * batch_rows
        Path(data).write_text("".join(json.dumps(row) + "\n" for row in split))
    start = time.perf_counter()
    summary = backhand.train(
        TrainConfig(
            model=ModelOptions(model=task["model"], dtype=task["dtype"]),
            data=DataOptions(data=(data,), eval_fraction=0.0),
            adapter=LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0),
            optimization=OptimizationOptions(
                epochs=1,
                batch_rows=batch_rows,
                micro_batch_rows=task.get("micro_batch_rows"),
                learning_rate=LEARNING_RATE,
                schedule="linear",
                warmup_steps=0,
            ),
            run=RunOptions(output=output / "run", seed=task["seed"], answers=0, save_every=10**6, quiet=True),
            objective=ObjectiveOptions() if answers else ObjectiveOptions(objective="dpo", beta=BETA),
        )
    )
    return {"train_s": time.perf_counter() - start, "first_loss": summary.first_loss, "last_loss": summary.last_loss}


def run_trl(task: dict[str, Any], output: Path, *, precomputed: bool, tuned: bool) -> dict[str, Any]:
    """TRL's DPOTrainer; as users run it, checkpointing is on and the reference computed at every step."""
    import datasets
    import peft
    import trl
    from peers import ALPHA, DTYPES, LEARNING_RATE, RANK, transformers_model, tune_process

    from backhand.nn.loading import open_model

    if tuned:
        tune_process()
    tokenizer = open_model(task["model"]).tokenizer()
    rows = datasets.load_dataset("json", data_files=task["data"], split="train", cache_dir=str(output / "cache"))
    model = transformers_model(task["model"], DTYPES[task["dtype"]])
    start = time.perf_counter()
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(output / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=task["batch_rows"],
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=0,
            beta=BETA,
            precompute_ref_log_probs=precomputed,
            gradient_checkpointing=not precomputed,
            max_length=1024,
            bf16=task["dtype"] == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            seed=task["seed"],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"train_s": time.perf_counter() - start, "first_loss": losses[0], "last_loss": losses[-1]}


def worker(peer: str, task: dict[str, Any], output: Path, threads: int) -> None:
    """Print the peer's result in JSON, on the last line."""
    import torch

    from backhand.cli.openmp_spin import adaptive_spinning

    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    with adaptive_spinning():
        if peer.startswith("backhand"):
            done = run_backhand(task, output, answers=peer.endswith("-answers"))
        else:
            done = run_trl(task, output, precomputed="-precomputed" in peer, tuned="-tuned" in peer)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**done, "peak_rss_bytes": peak_kib * 1024}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# All runs of all peers, in turns.


def run_peer(peer: str, task: dict[str, Any], output: Path, threads: int) -> dict[str, Any]:
    """One run in its own process. Raises RuntimeError where it fails, such as for memory."""
    command = [
        sys.executable,
        str(HERE / "preference.py"),
        "--worker",
        peer,
        json.dumps(task),
        str(output),
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=peer_environment(peer))
    if done.returncode:
        raise RuntimeError(f"{peer} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def token_counts(model: str, data: str, batch_rows: int) -> dict[str, int]:
    """Tokens of the pairs' prompts, once each, and of their answers; and those of an epoch, by what is shared.

    `whole_tokens` counts each answer after its prompt, `computed_tokens` shared beginnings once, as a batch does.
    """
    from backhand.data.options import DataOptions
    from backhand.data.packing import RowPacker, Sampler
    from backhand.data.prepare import prepare
    from backhand.nn.loading import open_model

    train, _ = prepare(DataOptions(data=(data,), eval_fraction=0.0), open_model(model).tokenizer(), purpose="pairs")
    packer, batches = RowPacker(train.examples, share_prefixes=True), Sampler(len(train.examples), batch_rows, 1)
    return {
        "pairs": len(train.examples),
        "prompt_tokens": sum(example.prompt_tokens for example in train.examples),
        "answer_tokens": sum(example.supervised_tokens for example in train.examples),
        "whole_tokens": sum(packer.lengths),
        "computed_tokens": sum(packer.packed_tokens(batches.rows_of(step)) for step in range(batches.steps_per_epoch)),
    }


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every peer's runs, and how they compare."""
    data, model = folder / "pairs.jsonl", arguments.model
    write_pairs(data, arguments.pairs, seed=1)
    if model in ("0.5b", "tiny"):
        from random_gguf import SHAPES, write_random_model

        model = str(write_random_model(folder / "0.5b.gguf", SHAPES[model]))
    task = {"model": model, "data": str(data), "batch_rows": arguments.batch_rows, "dtype": arguments.dtype}
    if arguments.micro_batch_rows:
        task["micro_batch_rows"] = arguments.micro_batch_rows
    found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in arguments.peers}
    for repeat in range(arguments.repeats):
        for peer in arguments.peers:
            try:
                output = folder / f"{peer}-{repeat}"
                found[peer].append(run_peer(peer, {**task, "seed": repeat}, output, arguments.threads))
            except RuntimeError as error:
                print(error, file=sys.stderr)  # the other peers' hours are not to be lost for one
    peers = {}
    for peer, runs in found.items():
        if runs:
            times = [run["train_s"] for run in runs]
            peers[peer] = {
                "train_s": {"min": min(times), "median": statistics.median(times), "max": max(times)},
                "pairs_per_s": arguments.pairs / statistics.median(times),
                "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs),
                "losses": [[run["first_loss"], run["last_loss"]] for run in runs],
            }
    ours = peers.get("backhand")
    ratios = {
        f"{what}_over_{peer}": ours[key] / row[key]
        for peer, row in peers.items()
        if ours and peer != "backhand"
        for what, key in (("speed", "pairs_per_s"), ("memory", "peak_rss_bytes"))
    }
    return {
        "machine": describe_machine(arguments.instructions),
        "workload": {"model": arguments.model, "dtype": arguments.dtype, "batch_rows": arguments.batch_rows}
        | ({"micro_batch_rows": arguments.micro_batch_rows} if arguments.micro_batch_rows else {})
        | token_counts(model, str(data), arguments.batch_rows),
        "peers": peers,
        "ratios": ratios,
    }


def main() -> None:
    """Parse, run, compare, store."""
    if sys.argv[1:2] == ["--worker"]:
        peer, task, output, threads = sys.argv[2:]
        worker(peer, json.loads(task), Path(output), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--micro-batch-rows", type=int, help="of this project; by its memory plan if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "preference.json")
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    arguments = parser.parse_args()
    cap_instructions(arguments.instructions)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    print(result["workload"])
    for peer, row in result["peers"].items():
        spread = row["train_s"]
        print(
            f"{peer:32} {row['pairs_per_s']:7.2f} pairs/s  {spread['min']:7.1f} {spread['median']:7.1f} "
            f"{spread['max']:7.1f} s  {row['peak_rss_bytes'] / 1e9:5.2f} GB  "
            + ", ".join(f"{first:.4f} → {last:.4f}" for first, last in row["losses"])
        )
    for name, value in result["ratios"].items():
        print(f"  {name:48} {value:6.2f}")
    stored = json.loads(arguments.output.read_text())["runs"] if arguments.output.exists() else []
    stored = [run for run in stored if (run["machine"], run["workload"]) != (result["machine"], result["workload"])]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"runs": [*stored, result]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
