"""Decisions against other programs, in turns: training against classifiers, and deciding against llama.cpp's server.

    python benchmarks/decisions.py train [--rows 300] [--words 300] [--dtype bfloat16] [--output FILE]
    python benchmarks/decisions.py decide ADAPTER DECISION.gguf [--states 1000] [--output FILE]
    python benchmarks/decisions.py agree ADAPTER DECISION.gguf [--states 200] [--label float32] [--output FILE]

`train`: rows with a state of 300 words and three questions, on SmolLM2. The other side is transformers and
PEFT with `AutoModelForSequenceClassification`, which needs a classifier per question: each of its steps is three
forward and backward passes of the states alone, without a prompt, padded to the longest one. Both sides adapt all
linear layers at rank 16 with AdamW, 8 rows per step. Both compute 8 rows at once, which is the default of Backhand for
rows of this size and of transformers' `Trainer`, or the same number of `--micro-batch`.

`decide`: an adapter trained with `--objective decide`, and the file that `backhand export --to gguf --decision` wrote.
Both programs read this file, and use the same number of threads. States are decided in groups of 64, which llama.cpp's
server receives one by one, as its API takes one state per request.

`agree`: the largest difference between a probability of the server and one of `backhand decide` with the adapter. The
server keeps keys and values in float32, so that the file alone makes the difference. It is stored under the label.

In `train` and `decide`, each side is a process of its own, and the sides take turns, so that other load concerns both
alike. The figures are medians over the turns. They are stored with the load of the machine in
benchmarks/results/decisions_train.json and decisions_decide.json, next to those of other numbers of words or states.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from machine import describe_machine

HERE = Path(__file__).parent
BATCH_ROWS, GROUP_STATES, RANK = 8, 64, 16
WORDS = {
    "billing": ("invoice", "refund", "charge", "card", "payment"),
    "delivery": ("parcel", "courier", "address", "box", "tracking"),
    "technical": ("login", "error", "screen", "update", "crash"),
}
COMMON = (
    "please",
    "help",
    "me",
    "with",
    "this",
    "because",
    "the",
    "order",
    "from",
    "last",
    "week",
    "was",
    "not",
    "what",
)
QUESTIONS = {
    "team": {"type": "choice", "instructions": "Which team should answer?", "criteria": dict.fromkeys(WORDS)},
    "urgent": {"type": "noul", "instructions": "Is a reply needed today?"},
    "mood": {"type": "score", "instructions": "How upset is the writer?", "criteria": ["calm", "annoyed", "furious"]},
}


def write_rows(path: Path, count: int, words_per_row: int) -> None:
    """Write rows with answers to three questions."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            team, urgent, mood = draw.choice(sorted(WORDS)), draw.random() < 0.4, draw.randrange(3)
            words = [draw.choice((*WORDS[team], *COMMON)) for _ in range(words_per_row)]
            words += ["urgent"] * urgent + ["!"] * mood
            answers = {"team": team, "urgent": urgent, "mood": mood}
            file.write(json.dumps({"state": " ".join(words), "questions": QUESTIONS, "answers": answers}) + "\n")


def resident_peak() -> int:
    """Return the peak resident size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def train_with_backhand(rows: Path, given: argparse.Namespace) -> None:
    """Run `backhand.train`, which makes a step for each line of standard input, and answer with its time."""
    import backhand

    released = 0.0

    def after_step(record: Mapping[str, Any]) -> bool:
        nonlocal released
        if "loss" not in record:
            return True
        if released:
            report_turn(BATCH_ROWS, released)
        else:
            print(json.dumps({"ready": True}), flush=True)  # the first step compiles kernels
        more = bool(sys.stdin.readline())
        released = time.perf_counter()
        return more

    with tempfile.TemporaryDirectory() as folder:
        backhand.train(
            data=rows,
            model="smollm2-135m",
            objective="decide",
            dtype=given.dtype,
            threads=given.threads,
            rank=RANK,
            batch_rows=BATCH_ROWS,
            micro_batch_rows=given.micro_batch,
            eval_fraction=0.0,
            answers=0,
            max_steps=1000,
            quiet=True,
            output=Path(folder) / "run",
            callbacks=[after_step],
        )


def classifier_trainer(rows: Path, given: argparse.Namespace) -> Callable[[int], int]:
    """Return a function that makes one step of transformers and PEFT, with a classifier per question."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    from backhand.nn.loading import open_model
    from backhand.nn.loading.transformers_model import load_transformers_model

    torch.set_num_threads(given.threads)
    source, dtype = open_model("smollm2-135m"), getattr(torch, given.dtype)
    tokenizer, whole = source.tokenizer(), load_transformers_model(source, dtype=dtype)
    model = AutoModelForSequenceClassification.from_config(whole.config).to(dtype)
    model.base_model.load_state_dict(whole.base_model.state_dict())
    model.config.pad_token_id = tokenizer.pad_token_id
    del whole
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="SEQ_CLS")
    model.config.num_labels = model.num_labels = 3
    model.score = torch.nn.Linear(model.config.hidden_size, 3, bias=False, dtype=dtype)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((one for one in adapted.parameters() if one.requires_grad), lr=2e-4)
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    teams = sorted(WORDS)

    def step(number: int) -> int:
        start = number * BATCH_ROWS % len(lines)
        group = lines[start : start + BATCH_ROWS]
        for question in QUESTIONS:
            for first in range(0, BATCH_ROWS, given.micro_batch):
                some = group[first : first + given.micro_batch]
                batch = tokenizer([line["state"] for line in some], return_tensors="pt", padding=True)
                answers = [line["answers"][question] for line in some]
                labels = torch.tensor([teams.index(one) if question == "team" else int(one) for one in answers])
                loss = adapted(**batch, labels=labels).loss
                (loss * len(some) / BATCH_ROWS).backward()
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return len(group)

    return step


def _states(count: int) -> list[str]:
    draw = random.Random(1)
    every = [word for words in WORDS.values() for word in words] + [*COMMON]
    return [" ".join(draw.choices(every, k=40)) for _ in range(count)]


def backhand_decider(adapter: Path, file: Path, threads: int, states: int) -> Callable[[int], int]:
    """Return a function that decides a group of states and returns their number."""
    import torch

    from backhand.adapters.record import read_record
    from backhand.data.decisions import Asked, DecisionRow
    from backhand.data.options import TemplateOptions
    from backhand.generation.completer import EngineCompleter
    from backhand.generation.loading import LoadedModel
    from backhand.loop.decide import Decider
    from backhand.nn.decoder.decoder import Decoder
    from backhand.nn.loading import open_model

    torch.set_num_threads(threads)
    record = read_record(json.loads((adapter / "backhand.json").read_text(encoding="utf-8")), str(adapter))
    source = open_model(str(file))
    decoder = Decoder.from_source(source, dtype=torch.float32, device=torch.device("cpu"))
    loaded = LoadedModel(EngineCompleter(decoder), source.tokenizer(), (), decisions=record.decisions)
    decider = Decider.of(loaded, TemplateOptions(), GROUP_STATES)
    asked = tuple(Asked(question, None) for question in decider.questions.values())
    rows = [DecisionRow(state, asked, "state") for state in _states(states)]

    def turn(number: int) -> int:
        start = number * GROUP_STATES % len(rows)
        return len(list(decider.answers(rows[start : start + GROUP_STATES])))

    return turn


def llama_cpp_server(file: Path, threads: int, *, exact: bool = False) -> Any:
    """Return llama.cpp's server with this file.

    Args:
        exact: keep keys and values in float32 instead of float16.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = params.n_batch = params.n_ubatch = 2048
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def _questions(adapter: Path) -> dict[str, Any]:
    record = json.loads((adapter / "backhand.json").read_text(encoding="utf-8"))
    questions: dict[str, Any] = record["decisions"]["questions"]
    return questions


def agreement(adapter: Path, file: Path, threads: int, states: int) -> dict[str, Any]:
    """Return the number of decided questions, and the largest and the mean difference of a probability."""
    import backhand

    server, questions, rows = llama_cpp_server(file, threads, exact=True), _questions(adapter), _states(states)
    ours = backhand.decide(states=rows, adapter=adapter, model="smollm2-135m", dtype="float32", threads=threads)
    differences = []
    for state, mine in zip(rows, ours, strict=True):
        theirs = server.handle_systemone({"state": state, "questions": questions})["answers"]
        for name, answer in mine.items():
            if "noul" in answer:
                differences.append(abs(answer["noul"] - theirs[name]["noul"]))
            else:
                pairs = ((p, theirs[name]["probabilities"][key]) for key, p in answer["probabilities"].items())
                differences.append(max(abs(one - other) for one, other in pairs))
    return {"decisions": len(differences), "largest": max(differences), "mean": statistics.mean(differences)}


def llama_cpp_decider(adapter: Path, file: Path, threads: int, states: int) -> Callable[[int], int]:
    """The same for llama.cpp's server."""
    server, questions, rows = llama_cpp_server(file, threads), _questions(adapter), _states(states)

    def turn(number: int) -> int:
        start = number * GROUP_STATES % len(rows)
        group = rows[start : start + GROUP_STATES]
        for state in group:
            server.handle_systemone({"state": state, "questions": questions})
        return len(group)

    return turn


def serve(turn: Callable[[int], int]) -> None:
    """Take one turn for each line of standard input, and answer with its time."""
    turn(0)  # the first turn compiles kernels
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        report_turn(turn(int(line)), began)


def report_turn(count: int, began: float) -> None:
    """Print the speed of a turn that has just ended, and the memory of this process."""
    print(json.dumps({"per_s": count / (time.perf_counter() - began), "peak_bytes": resident_peak()}), flush=True)


def in_turns(commands: dict[str, list[str]], turns: int) -> dict[str, Any]:
    """Return the median speed of each side and its peak memory."""
    sides = {
        name: subprocess.Popen([sys.executable, __file__, *command], stdin=-1, stdout=-1, text=True)
        for name, command in commands.items()
    }
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}

    def read(name: str) -> dict[str, Any]:
        output = sides[name].stdout
        assert output is not None
        while not (line := output.readline()).startswith("{"):
            if not line:
                raise RuntimeError(f"{name} has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    for name in sides:
        read(name)
    for number in range(1, turns + 1):
        for name, process in sides.items():
            assert process.stdin is not None
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            answers[name].append(read(name))
    for process in sides.values():
        process.communicate()
    return {
        name: {
            "per_s": round(statistics.median(one["per_s"] for one in answers[name]), 3),
            "peak_bytes": int(max(one["peak_bytes"] for one in answers[name])),
        }
        for name in sides
    }


SIDES = ("train-backhand", "train-peft", "by-backhand", "by-llama")


def main() -> None:
    """Run a comparison, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "decide", "agree", *SIDES))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--words", type=int, default=300, help="words of a state to train on")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model to train")
    parser.add_argument("--micro-batch", type=int, default=BATCH_ROWS, help="rows to train on at once")
    parser.add_argument("--states", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--label", default="float32", help="name of the file's type")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.what == "train-backhand":
        train_with_backhand(*given.paths, given)
    elif given.what == "train-peft":
        serve(classifier_trainer(*given.paths, given))
    elif given.what in ("by-backhand", "by-llama"):
        made = backhand_decider if given.what == "by-backhand" else llama_cpp_decider
        serve(made(*given.paths, given.threads, given.states))
    elif given.what == "agree":
        store_agreement(given, agreement(*given.paths, given.threads, given.states))
    else:
        compare(given)


def store_agreement(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the differences, and store them next to those of other files."""
    output = given.output or HERE / "results" / "decisions_agree.json"
    whole = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"files": {}}
    whole["machine"] = describe_machine()
    whole["files"][given.label] = found
    print(json.dumps(found, indent=1))
    output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def compare(given: argparse.Namespace) -> None:
    """Compare the two sides, and print the result."""
    with tempfile.TemporaryDirectory() as folder:
        if given.what == "train":
            rows = Path(folder) / "rows.jsonl"
            write_rows(rows, given.rows, given.words)
            sides = {"backhand": "train-backhand", "transformers + PEFT": "train-peft"}
            more = ["--dtype", given.dtype, "--threads", str(given.threads), "--micro-batch", str(given.micro_batch)]
            commands = {name: [side, str(rows), *more] for name, side in sides.items()}
        else:
            more = [*map(str, given.paths), "--threads", str(given.threads), "--states", str(given.states)]
            commands = {"backhand": ["by-backhand", *more], "llama.cpp": ["by-llama", *more]}
        result = in_turns(commands, given.turns)
    ours, theirs = result.values()
    result["speed-up"] = round(ours["per_s"] / theirs["per_s"], 2)
    result["memory"] = round(ours["peak_bytes"] / theirs["peak_bytes"], 2)
    output = given.output or HERE / "results" / f"decisions_{given.what}.json"
    whole = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"runs": {}}
    trained = f"states of {given.words} words, {given.dtype}, {given.micro_batch} rows at once"
    case = trained if given.what == "train" else f"{given.states:,} states"
    whole["machine"] = describe_machine()
    whole["runs"][case] = {"load": os.getloadavg()[0], "turns": given.turns, "figures": result}
    print(json.dumps(whole, indent=1))
    output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
