"""Training on rewards: a step against TRL's GRPOTrainer; and sampling compared with llama.cpp's batched decoding.

    python benchmarks/rewards.py [--dtype bfloat16] [--steps 6] [--group 8] [--prompts 4] [--repeats 3]
    python benchmarks/rewards.py --sampling [--answers 8 16] [--tokens 64] [--rounds 5]

Prompts, groups, longest answer, reward, rate, rank, loss (dapo, one update, no divergence), dtype and threads are the
same for all; each run is a process of its own, and the peers take turns. A step is sampling, judging and training; the
reward is the share of even token ids, so that no two answers are alike. `trl` is as users run it, `trl-tuned` at its
best here (no checkpointing, the allocator and float32 route of ours). With `--sampling` several answers to one prompt
of about 100 tokens are drawn at temperature 1, all of the full length, by `generation.sampling` and by llama.cpp's
server with as many slots, from the same file; tokens/s of all answers together, the prompt's own pass included on both
sides. Results go to benchmarks/results/rewards.json and rewards_sampling.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import CAPS, cap_instructions, describe_machine
from preference import _WORDS

HERE = Path(__file__).parent
PEERS = ("backhand", "trl", "trl-tuned")
SAMPLERS = ("backhand", "llama.cpp")
_REWARD = """
def evens(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]
"""


def prompt(draw: random.Random) -> str:
    """About 100 tokens."""
    return "Go on with this: " + " ".join(draw.choice(_WORDS) for _ in range(90))


# ---------------------------------------------------------------------------------------------------------------------
# Steps.


def run_backhand(task: dict[str, Any], output: Path) -> dict[str, Any]:
    """`backhand.train` as the command calls it."""
    from peers import ALPHA, LEARNING_RATE, RANK

    import backhand
    from backhand.adapters.config import LoRAConfig
    from backhand.data.options import DataOptions
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
    from backhand.options.objectives import ObjectiveOptions
    from backhand.options.rewards import RewardOptions

    moments = [time.perf_counter()]
    steps: list[dict[str, Any]] = []

    def collect(record: Any) -> None:
        if "loss" in record:
            moments.append(time.perf_counter())
            steps.append(dict(record))

    backhand.train(
        TrainConfig(
            model=ModelOptions(model=task["model"], dtype=task["dtype"]),
            data=DataOptions(data=(task["data"],), eval_fraction=0.0),
            adapter=LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0),
            optimization=OptimizationOptions(
                max_steps=task["steps"], batch_rows=task["prompts"], learning_rate=LEARNING_RATE, warmup_steps=0
            ),
            run=RunOptions(output=output / "run", seed=task["seed"], answers=0, save_every=10**6, quiet=True),
            objective=ObjectiveOptions(objective="grpo"),
            rewards=RewardOptions(
                reward=(f"{task['reward']}:evens",), group=task["group"], max_new_tokens=task["new_tokens"]
            ),
        ),
        callbacks=[collect],
    )
    return _told(moments, [step["completion_tokens"] for step in steps], [step["reward"] for step in steps])


def run_trl(task: dict[str, Any], output: Path, *, tuned: bool) -> dict[str, Any]:
    """TRL's GRPOTrainer with transformers' own sampling."""
    import datasets
    import peft
    import transformers
    import trl
    from peers import ALPHA, DTYPES, LEARNING_RATE, RANK, transformers_model, tune_process

    from backhand.nn.loading import open_model

    if tuned:
        tune_process()
    scope: dict[str, Any] = {}
    exec(_REWARD, scope)
    moments: list[float] = []

    class Moments(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    answers = task["group"] * task["prompts"]
    trainer = trl.GRPOTrainer(
        model=transformers_model(task["model"], DTYPES[task["dtype"]]),
        reward_funcs=scope["evens"],
        args=trl.GRPOConfig(
            output_dir=str(output / "trl"),
            max_steps=task["steps"],
            per_device_train_batch_size=answers,
            num_generations=task["group"],
            max_completion_length=task["new_tokens"],
            temperature=1.0,
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
        train_dataset=datasets.load_dataset("json", data_files=task["data"], split="train", cache_dir=str(output)),
        processing_class=open_model(task["model"]).tokenizer(),
        callbacks=[Moments()],
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    moments.append(time.perf_counter())
    trainer.train()
    log = [line for line in trainer.state.log_history if "reward" in line]
    return _told(moments, [line["completions/mean_length"] for line in log], [line["reward"] for line in log])


def _told(moments: list[float], lengths: list[float], rewards: list[float]) -> dict[str, Any]:
    """The first step compiles and is left out."""
    took = [end - begin for begin, end in itertools.pairwise(moments[1:])]
    return {
        "step_s": statistics.median(took),
        "steps_s": took,
        "answer_tokens": statistics.mean(lengths),
        "rewards": rewards,
    }


def worker(peer: str, task: dict[str, Any], output: Path, threads: int) -> None:
    """Print the peer's result in JSON, on the last line."""
    import torch

    from backhand.cli.openmp_spin import adaptive_spinning

    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    with adaptive_spinning():
        done = run_backhand(task, output) if peer == "backhand" else run_trl(task, output, tuned=peer.endswith("tuned"))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**done, "peak_rss_bytes": peak_kib * 1024}), flush=True)


def compare_steps(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every peer's runs, in turns."""
    draw = random.Random(1)
    data, reward = folder / "prompts.jsonl", folder / "evens.py"
    rows = [{"prompt": [{"role": "user", "content": prompt(draw)}]} for _ in range(8 * arguments.prompts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text(_REWARD)
    task = {"model": arguments.model, "data": str(data), "reward": str(reward), "dtype": arguments.dtype}
    task |= {name: getattr(arguments, name) for name in ("steps", "group", "prompts", "new_tokens")}
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
        peer: {
            "step_s": statistics.median(run["step_s"] for run in runs),
            # Seconds for as many tokens: answers are drawn, and their lengths differ.
            "token_s": statistics.median(run["step_s"] / run["answer_tokens"] for run in runs),
            "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs),
            "runs": runs,
        }
        for peer, runs in found.items()
        if runs
    }
    ours = peers.get("backhand")
    ratios = {
        f"{what}_over_{peer}": row[key] / ours[key] if what == "speed" else ours[key] / row[key]
        for peer, row in peers.items()
        if ours and peer != "backhand"
        for what, key in (("speed", "token_s"), ("memory", "peak_rss_bytes"))
    }
    return {"workload": task, "peers": peers, "ratios": ratios}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling.


def backhand_sampler(model: str, answers: int, tokens: int, threads: int) -> Callable[[], float]:
    """Sample this many answers in one call; return tokens per second."""
    import torch

    from backhand.generation.sampling import sample
    from backhand.nn.compute import default_dtype
    from backhand.nn.decoder.decoder import Decoder
    from backhand.nn.loading import open_model

    torch.set_num_threads(threads)
    source = open_model(model)
    decoder = Decoder.from_source(source, dtype=default_dtype(torch.device("cpu")), quantized=False)
    ids = source.tokenizer()(prompt(random.Random(2)))["input_ids"]

    def answer() -> float:
        began = time.perf_counter()
        found = sample(decoder, [ids] * answers, range(answers), max_new_tokens=tokens, stop_ids=())
        return sum(len(one.tokens) for one in found) / (time.perf_counter() - began)

    return answer


def llama_cpp_sampler(model: str, answers: int, tokens: int, threads: int) -> Callable[[], float]:
    """The same by llama.cpp's server, a slot for each answer."""
    import xllamacpp

    from backhand.nn.loading import open_model

    params = xllamacpp.CommonParams()
    params.model.path = str(open_model(model).path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 512 * answers, answers, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    body = {"prompt": prompt(random.Random(2)), "n_predict": tokens, "temperature": 1.0, "ignore_eos": True}
    body |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "cache_prompt": True}

    def one(seed: int) -> int:
        headers = {"Content-Type": "application/json"}
        data = json.dumps({**body, "seed": seed}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(server.listening_address + "/completion", data, headers)
        ) as got:
            return int(json.load(got)["timings"]["predicted_n"])

    def answer() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(answers) as pool:
            said = sum(pool.map(one, range(answers)))
        return said / (time.perf_counter() - began)

    return answer


def serve(peer: str, model: str, answers: int, tokens: int, threads: int) -> None:
    """One batch for each line read."""
    from backhand.cli.openmp_spin import adaptive_spinning

    sampler = backhand_sampler if peer == "backhand" else llama_cpp_sampler
    answer = sampler(model, answers, tokens, threads)
    answer()  # warm
    print("ready", flush=True)
    with adaptive_spinning():
        for _ in sys.stdin:
            print(json.dumps(answer()), flush=True)
    os._exit(0)  # taking llama.cpp's server down may wait for its own thread for ever


def compare_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both samplers in turns, for each number of answers."""
    result: dict[str, Any] = {}
    for answers in arguments.answers:
        workers = {}
        for peer in SAMPLERS:
            command = [sys.executable, __file__, "--serve", peer, arguments.model, str(answers)]
            command += [str(arguments.tokens), str(arguments.threads)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            workers[peer] = subprocess.Popen(command, text=True, env=peer_environment(peer), **pipes)
        found: dict[str, list[float]] = {peer: [] for peer in SAMPLERS}
        for peer, one in workers.items():
            assert one.stdout is not None
            if one.stdout.readline() != "ready\n":
                raise SystemExit(f"{peer} ended with exit code {one.wait()}")
        for _ in range(arguments.rounds):
            for peer, one in workers.items():
                assert one.stdin is not None and one.stdout is not None
                print(file=one.stdin, flush=True)
                found[peer].append(float(one.stdout.readline()))
        for one in workers.values():
            assert one.stdin is not None
            one.stdin.close()
            one.wait()
        medians = {peer: statistics.median(rates) for peer, rates in found.items()}
        result[str(answers)] = {
            "tokens_per_s": medians,
            "ratio": medians["backhand"] / medians["llama.cpp"],
            "all": found,
        }
    return result


def main() -> None:
    """Parse, run, compare, store."""
    if sys.argv[1:2] == ["--worker"]:
        peer, task, output, threads = sys.argv[2:]
        worker(peer, json.loads(task), Path(output), int(threads))
        return
    if sys.argv[1:2] == ["--serve"]:
        peer, model, *numbers = sys.argv[2:]
        serve(peer, model, *map(int, numbers))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--sampling", action="store_true", help="only sampling, compared with llama.cpp")
    parser.add_argument("--answers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--instructions", choices=sorted(CAPS), help="use no newer ones than these")
    arguments = parser.parse_args()
    cap_instructions(arguments.instructions)
    if arguments.sampling:
        result = compare_sampling(arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = compare_steps(arguments, Path(folder))
    print(json.dumps(result.get("ratios", result), indent=2))
    usual = HERE / "results" / ("rewards_sampling.json" if arguments.sampling else "rewards.json")
    output = arguments.output or usual
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": describe_machine(arguments.instructions), **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
