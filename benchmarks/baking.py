"""Prompt baking and self-distillation against TRL's SDFTTrainer, in turns.

    python benchmarks/baking.py [--dtype bfloat16] [--steps 8] [--prompts 8] [--context 500] [--repeats 3]

All peers have the same prompts, the same context in front of the teacher's prompts, and the same longest answer, rank,
rate, dtype and threads. The loss is KL(teacher ‖ model) over the whole vocabulary. Each run is a process of its own.

    backhand          bake: the teacher samples one answer to each prompt, once, and its states are stored
    backhand-student  sdft: the model samples new answers in each step; teacher's prompt and loss are SDFTTrainer's
    trl               SDFTTrainer as users run it
    trl-tuned         the same at its best here: no checkpointing, the allocator and float32 route of Backhand

A run goes twice over the prompts. Its seconds are all of training without loading: for Backhand from the teacher's
first answer to the end of the run, for TRL `trainer.train()`. Backhand's `loading_s`, from the call to the first
answer, are stored as well. Memory is the peak of the process. Results go to benchmarks/results/baking.json.
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
from preference import _WORDS

HERE = Path(__file__).parent
TEMPLATE = "{privileged_context}\n\n{prompt}"
PEERS = ("backhand", "backhand-student", "trl", "trl-tuned")


def words(draw: random.Random, count: int) -> str:
    """Return random words, each of about one token."""
    return " ".join(draw.choice(_WORDS) for _ in range(count))


def seconds_since(wall: float, cpu: float) -> dict[str, float]:
    """Return the seconds of the clock and of the processor since a time."""
    return {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def run_backhand(task: dict[str, Any], output: Path, *, student: bool) -> dict[str, Any]:
    """Train with `backhand.train`, as the command does."""
    from peers import ALPHA, LEARNING_RATE, RANK

    import backhand
    from backhand.adapters.config import LoRAConfig
    from backhand.data.options import DataOptions
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
    from backhand.options.objectives import ObjectiveOptions
    from backhand.options.rewards import RewardOptions
    from backhand.training import trainer as runs

    losses: list[float] = []
    loading = time.perf_counter()
    began: list[float] = []
    teach = runs.teach  # type: ignore[attr-defined]

    def teach_and_note_the_time(*given: Any) -> Any:
        began.extend((time.perf_counter(), time.process_time()))
        return teach(*given)

    runs.teach = teach_and_note_the_time  # type: ignore[assignment,attr-defined]
    summary = backhand.train(
        TrainConfig(
            model=ModelOptions(model=task["model"], dtype=task["dtype"]),
            data=DataOptions(data=(task["data"],), eval_fraction=0.0, max_length=4096),
            adapter=LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0),
            optimization=OptimizationOptions(
                epochs=2, batch_rows=task["prompts"], learning_rate=LEARNING_RATE, warmup_steps=0
            ),
            run=RunOptions(output=output / "run", seed=task["seed"], answers=0, save_every=10**6, quiet=True),
            objective=(
                ObjectiveOptions(objective="sdft", divergence="forward", teacher_prompt_template=TEMPLATE)
                if student
                else ObjectiveOptions(objective="bake", context=task["context"])
            ),
            rewards=RewardOptions(max_new_tokens=task["new_tokens"]),
        ),
        callbacks=[lambda record: losses.append(record["loss"]) if "loss" in record else None],
    )
    figures = {"loading_s": began[0] - loading, "answer_tokens": summary.supervised_tokens, "losses": losses}
    return {**seconds_since(*began), **figures}


def run_trl(task: dict[str, Any], output: Path, *, tuned: bool) -> dict[str, Any]:
    """Train with TRL's SDFTTrainer and transformers' own sampling."""
    import datasets
    import peft
    from peers import ALPHA, DTYPES, LEARNING_RATE, RANK, transformers_model, tune_process
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from backhand.nn.loading import open_model

    if tuned:
        tune_process()
    rows = [json.loads(line) for line in Path(task["data"]).read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": row["prompt"], "privileged_context": task["context"]} for row in rows]
    trainer = SDFTTrainer(
        model=transformers_model(task["model"], DTYPES[task["dtype"]]),
        args=SDFTConfig(
            output_dir=str(output / "trl"),
            num_train_epochs=2,
            per_device_train_batch_size=task["prompts"],
            num_generations=1,
            max_prompt_length=None,
            max_completion_length=task["new_tokens"],
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            teacher_prompt_template=TEMPLATE,
            learning_rate=LEARNING_RATE,
            warmup_steps=0,
            gradient_checkpointing=not tuned,
            bf16=task["dtype"] == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            seed=task["seed"],
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=open_model(task["model"]).tokenizer(),
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    began = time.perf_counter(), time.process_time()
    trainer.train()
    seconds = seconds_since(*began)
    log = [line for line in trainer.state.log_history if "loss" in line]
    lengths = [line["completions/mean_length"] * task["prompts"] for line in log if "completions/mean_length" in line]
    return {**seconds, "answer_tokens": sum(lengths), "losses": [line["loss"] for line in log]}


def worker(peer: str, task: dict[str, Any], output: Path, threads: int) -> None:
    """Print the result of a peer in JSON, on the last line."""
    import torch

    from backhand.cli.openmp_spin import adaptive_spinning

    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    with adaptive_spinning():
        if peer.startswith("backhand"):
            done = run_backhand(task, output, student=peer.endswith("student"))
        else:
            done = run_trl(task, output, tuned=peer.endswith("tuned"))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**done, "peak_rss_bytes": peak_kib * 1024}), flush=True)


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all peers in turns, and return their results with the ratios to Backhand's."""
    draw = random.Random(1)
    data = folder / "prompts.jsonl"
    count = arguments.prompts * arguments.steps // 2
    context = f"Answer with these words: {words(draw, arguments.context)}"
    demonstration = {"completion": [{"role": "assistant", "content": context}]}  # of sdft; bake does not read it
    asked = [[{"role": "user", "content": f"Go on with this: {words(draw, 12)}"}] for _ in range(count)]
    rows = [{"prompt": prompt, **demonstration} for prompt in asked]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"model": arguments.model, "data": str(data), "dtype": arguments.dtype}
    task |= {"context": context, "prompts": arguments.prompts, "new_tokens": arguments.new_tokens}
    found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in arguments.peers}
    for repeat in range(arguments.repeats):
        for peer in arguments.peers:
            command = [sys.executable, __file__, "--worker", peer, json.dumps({**task, "seed": repeat})]
            command += [str(folder / f"{peer}-{repeat}"), str(arguments.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=peer_environment(peer))
            if done.returncode:
                print(f"{peer} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}", file=sys.stderr)
            else:
                found[peer].append(json.loads(done.stdout.strip().splitlines()[-1]))
    figures = ("seconds", "cpu_s", "answer_tokens", "peak_rss_bytes")
    peers = {
        peer: {name: statistics.median(run[name] for run in runs) for name in figures} | {"runs": runs}
        for peer, runs in found.items()
        if runs
    }
    ratios = {
        f"{what} of {ours} to {peer}": peers[ours][key] / row[key] if what == "memory" else row[key] / peers[ours][key]
        for ours in ("backhand", "backhand-student")
        for peer, row in peers.items()
        if ours in peers and peer.startswith("trl")
        for what, key in (("speed", "seconds"), ("speed by processor time", "cpu_s"), ("memory", "peak_rss_bytes"))
    }
    workload = {name: value for name, value in task.items() if name != "data"}
    return {
        "workload": {**workload, "steps": arguments.steps, "context": f"{arguments.context} words"},
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
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, half of them per epoch")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--context", type=int, default=500, help="words of the context")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "baking.json")
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    arguments = parser.parse_args()
    cap_instructions(arguments.instructions)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    print(json.dumps(result["ratios"], indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": describe_machine(arguments.instructions), **result}, indent=2) + "\n"
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
