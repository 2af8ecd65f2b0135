"""Training a reranker against transformers and PEFT, in turns.

    python benchmarks/reranking.py [--dtype bfloat16] [--steps 6] [--queries 4] [--negatives 8] [--repeats 3]

All peers have the same queries, documents, prompt, loss (pointwise), rank, rate, dtype and threads. Each run is a
process of its own.

    backhand    rank: the documents of a query share its prompt, and rows are packed without padding
    peft        transformers and PEFT as rerankers are trained with them: pairs padded on the left, one batch per step
    peft-tuned  the same at its best here: a micro-batch per query, the head at the last position alone, a fused
                optimizer, the allocator and float32 route of Backhand

The seconds are those of the steps, without loading. Memory is the peak of the process. The losses of the first step are
stored, so that it can be seen that all peers train the same. Results go to benchmarks/results/reranking.json.
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

from baking import words
from environment import peer_environment
from machine import CAPS, cap_instructions, describe_machine

HERE = Path(__file__).parent
PEERS = ("backhand", "peft", "peft-tuned")


def run_backhand(task: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train with `backhand.train`, as the command does."""
    from peers import ALPHA, LEARNING_RATE, RANK

    import backhand
    from backhand.adapters.config import LoRAConfig
    from backhand.data.options import DataOptions
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
    from backhand.options.objectives import ObjectiveOptions

    losses: list[float] = []
    summary = backhand.train(
        TrainConfig(
            model=ModelOptions(model=task["model"], dtype=task["dtype"]),
            data=DataOptions(data=(task["data"],), eval_fraction=0.0),
            adapter=LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0),
            optimization=OptimizationOptions(
                epochs=1, batch_rows=task["queries"], learning_rate=LEARNING_RATE, warmup_steps=0
            ),
            run=RunOptions(output=output / "run", seed=task["seed"], answers=0, save_every=10**6, quiet=True),
            objective=ObjectiveOptions(objective="rank"),
        ),
        callbacks=[lambda record: losses.append(record["loss"]) if "loss" in record else None],
    )
    return {"seconds": summary.train_s, "losses": losses}


def encoded_rows(task: dict[str, Any]) -> list[tuple[list[list[int]], list[float]]]:
    """Return the prompts and targets of each row in the order of the steps of Backhand."""
    from backhand.data.options import DataOptions
    from backhand.data.packing import Sampler
    from backhand.data.prepare import prepare
    from backhand.data.ranking_examples import RankingFormat
    from backhand.nn.loading import open_model

    tokenizer = open_model(task["model"]).tokenizer()
    data = DataOptions(data=(task["data"],), eval_fraction=0.0)
    rows, _ = prepare(data, tokenizer, purpose="rankings", text_format=RankingFormat())
    sampler = Sampler(len(rows.examples), task["queries"], task["seed"])
    order = [number for step in range(sampler.steps_per_epoch) for number in sampler.rows_of(step)]
    examples = [rows.examples[number] for number in order]
    return [
        ([one.input_ids[:-1].tolist() for one in example.documents[::2]], list(example.ranking.targets))
        for example in examples
        if example.ranking is not None
    ]


def run_peft(task: dict[str, Any], *, tuned: bool) -> dict[str, Any]:
    """Train with transformers, PEFT and autograd."""
    import peft
    import torch
    from peers import ALPHA, DTYPES, LEARNING_RATE, RANK, transformers_model, tune_process
    from torch.nn.functional import binary_cross_entropy_with_logits

    from backhand.nn.loading import open_model

    if tuned:
        tune_process()
    tokenizer = open_model(task["model"]).tokenizer()
    yes, no = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ("yes", "no"))
    rows = encoded_rows(task)
    config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers_model(task["model"], DTYPES[task["dtype"]]), config)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=tuned or None)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=task["steps"])
    losses, began = [], time.perf_counter()
    for start in range(0, len(rows), task["queries"]):
        step = rows[start : start + task["queries"]]
        pairs = sum(len(prompts) for prompts, _ in step)
        total = 0.0
        for group in [[row] for row in step] if tuned else [step]:
            prompts = [prompt for of_row, _ in group for prompt in of_row]
            targets = torch.tensor([target for _, of_row in group for target in of_row])
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            kept = {"logits_to_keep": 1} if tuned else {}
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits[:, -1].float()
            loss = binary_cross_entropy_with_logits(logits[:, yes] - logits[:, no], targets, reduction="sum") / pairs
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"seconds": time.perf_counter() - began, "losses": losses}


def worker(peer: str, task: dict[str, Any], output: Path, threads: int) -> None:
    """Print the result of a peer in JSON, on the last line."""
    import torch

    from backhand.cli.openmp_spin import adaptive_spinning

    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    with adaptive_spinning():
        done = run_backhand(task, output) if peer == "backhand" else run_peft(task, tuned=peer == "peft-tuned")
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**done, "peak_rss_bytes": peak_kib * 1024}), flush=True)


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all peers in turns, and return their results with the ratios to Backhand's."""
    draw = random.Random(1)
    data = folder / "rows.jsonl"
    rows = [
        {
            "query": words(draw, arguments.query_words),
            "documents": [words(draw, arguments.document_words) for _ in range(1 + arguments.negatives)],
            "labels": [1] + [0] * arguments.negatives,
        }
        for _ in range(arguments.queries * arguments.steps)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"model": arguments.model, "data": str(data), "dtype": arguments.dtype}
    task |= {"queries": arguments.queries, "steps": arguments.steps}
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
    peers = {
        peer: {name: statistics.median(run[name] for run in runs) for name in ("seconds", "peak_rss_bytes")}
        | {"first_loss": runs[0]["losses"][0], "runs": runs}
        for peer, runs in found.items()
        if runs
    }
    ratios = {
        f"{what} to {peer}": row[key] / peers["backhand"][key]
        for peer, row in peers.items()
        if "backhand" in peers and peer != "backhand"
        for what, key in (("speed", "seconds"), ("memory of the peer", "peak_rss_bytes"))
    }
    sizes = {name: getattr(arguments, name) for name in ("negatives", "query_words", "document_words")}
    return {"workload": {**task, **sizes}, "peers": peers, "ratios": ratios}


def main() -> None:
    """Parse, run, compare, store."""
    if sys.argv[1:2] == ["--worker"]:
        peer, task, output, threads = sys.argv[2:]
        worker(peer, json.loads(task), Path(output), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--queries", type=int, default=4, help="queries per step")
    parser.add_argument("--negatives", type=int, default=8, help="per query, next to one positive")
    parser.add_argument("--query-words", type=int, default=12)
    parser.add_argument("--document-words", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "reranking.json")
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
