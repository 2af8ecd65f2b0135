"""Answering one prompt from a quantized file: this project on its blocks and on dense weights, and llama.cpp.

    python benchmarks/generation.py [--model smollm2-135m] [--tokens 64] [--rounds 5]

Each peer runs in a process of its own and answers the same prompt greedily, in turns, so that drift of the machine hits
all alike; the same number of threads each. Tokens/s of the answer (the prompt's own pass is not counted), as medians
over the rounds, and their ratios go to benchmarks/results/generation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import describe_machine

from backhand.cli.openmp_spin import adaptive_spinning

HERE = Path(__file__).parent
PROMPT = "The history of the world begins with"
PEERS = ("backhand-quantized", "backhand-dense", "llama.cpp")


def backhand(model: str, tokens: int, threads: int, *, quantized: bool) -> Callable[[], float]:
    """Answers once a call; tokens a second."""
    import torch

    from backhand.generation.completer import EngineCompleter
    from backhand.nn.compute import default_dtype
    from backhand.nn.decoder.decoder import Decoder
    from backhand.nn.loading import open_model

    torch.set_num_threads(threads)
    source = open_model(model)
    dtype = default_dtype(torch.device("cpu"))
    completer = EngineCompleter(Decoder.from_source(source, dtype=dtype, quantized=quantized))
    prompt = source.tokenizer()(PROMPT)["input_ids"]

    def answer() -> float:
        moments: list[float] = []

        def choose(_rows: Any, logits: torch.Tensor) -> list[int]:
            moments.append(time.perf_counter())
            return [int(logits[0].argmax())]

        completer.complete([prompt], choose, lambda _row, _token: False, max_new_tokens=tokens)
        return (len(moments) - 1) / (moments[-1] - moments[0])

    return answer


def llama_cpp(model: str, tokens: int, threads: int) -> Callable[[], float]:
    """The same by llama.cpp's own server and its own timing."""
    import xllamacpp

    from backhand.nn.loading import open_model

    params = xllamacpp.CommonParams()
    params.model.path = str(open_model(model).path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 512, 1, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    body = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True}

    def answer() -> float:
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return float(json.load(response)["timings"]["predicted_per_second"])

    return answer


def serve(peer: str, model: str, tokens: int, threads: int) -> None:
    """One answer for each line read."""
    if peer == "llama.cpp":
        answer = llama_cpp(model, tokens, threads)
    else:
        answer = backhand(model, tokens, threads, quantized=peer == "backhand-quantized")
    answer()  # warm
    print("ready", flush=True)
    with adaptive_spinning():
        for _ in sys.stdin:
            print(json.dumps(answer()), flush=True)
    os._exit(0)  # taking llama.cpp's server down may wait for its own thread for ever


def main() -> None:
    """Parse, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "generation.json")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.model, arguments.tokens, arguments.threads)
        return
    workers = {}
    for peer in PEERS:
        command = [sys.executable, __file__, "--serve", peer, "--model", arguments.model]
        command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=peer_environment(peer),
        )
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            raise SystemExit(f"{peer} ended with exit code {worker.wait()}")
        workers[peer] = worker
    found: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for _ in range(arguments.rounds):
        for peer, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            print(file=worker.stdin, flush=True)
            found[peer].append(float(worker.stdout.readline()))
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    ours = found["backhand-quantized"]
    ratios = {
        f"quantized_over_{peer.replace('-', '_').replace('.', '_')}": statistics.median(
            mine / theirs for mine, theirs in zip(ours, found[peer], strict=True)
        )
        for peer in PEERS[1:]
    }
    rates = {peer: {"min": min(r), "median": statistics.median(r), "max": max(r)} for peer, r in found.items()}
    for peer, rate in rates.items():
        print(f"{peer:24} {rate['median']:8.1f} tokens/s  ({rate['min']:.1f} to {rate['max']:.1f})")
    for name, ratio in ratios.items():
        print(f"  {name:40} {ratio:6.2f}")
    workload = {"model": arguments.model, "tokens": arguments.tokens, "threads": arguments.threads}
    stored = {"machine": describe_machine(), "workload": workload, "tokens_per_s": rates, "ratios": ratios}
    arguments.output.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
