"""Whole training runs that take a fraction of a second: a tiny model in a directory, few rows, a configuration."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from backhand.adapters.config import LoRAConfig
from backhand.data.options import DataOptions
from backhand.loop.observers import Observer
from backhand.loop.state import PROGRESS_FILE, STATE_FILE
from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
from backhand.runs.checkpoint import load_checkpoint
from backhand.training.run import train
from tests.support.tiny_models import save_tiny, tiny_model

_WORDS = "the user asks assistant answers in json a list of names and one number is for what"


class TinyRun:
    """A model directory and rows, made once; `config` describes a run over them.

    Args:
        directory: where to make them.
    """

    def __init__(self, directory: Path) -> None:
        self.model = save_tiny(tiny_model("llama-tied", num_hidden_layers=2), directory / "model")
        self.rows = write_rows(directory / "rows.jsonl", 11, seed=0)
        self.held_out = write_rows(directory / "held_out.jsonl", 4, seed=1)

    def config(self, output: Path, **options: Any) -> TrainConfig:
        """A run of two epochs of three steps each, on one thread in float32, evaluated at its end; options go to the
        part that has them.

        No held-out row is answered: that took a third of the run.
        """
        config = TrainConfig(
            model=ModelOptions(model=str(self.model), dtype="float32", threads=1),
            data=DataOptions(data=(str(self.rows),), eval_data=(str(self.held_out),)),
            adapter=LoRAConfig(rank=3, alpha=5.0),
            optimization=OptimizationOptions(epochs=2, batch_rows=4, learning_rate=3e-3),
            run=RunOptions(output=output, quiet=True, answers=0, eval_every=6),
        )
        return with_options(config, **options)


def with_options(config: TrainConfig, **options: Any) -> TrainConfig:
    """The configuration with options replaced, each in the part that has a field of its name."""
    for name, value in options.items():
        parts = ("model", "data", "adapter", "optimization", "run", "objective", "rewards")
        part = next(part for part in parts if hasattr(getattr(config, part), name))
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config


def write_pairs(path: Path, count: int, seed: int = 0, *, labelled: bool = False) -> Path:
    """Rows of one prompt with two answers each, the chosen one short; or each answer a row with its label."""
    draw = random.Random(seed)

    def said(words: int) -> str:
        return " ".join(draw.choice(_WORDS.split()) for _ in range(words))

    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"the user asks {said(draw.randint(2, 5))}"}]
        good, bad = ([{"role": "assistant", "content": said(draw.randint(1, 3) * times)}] for times in (1, 2))
        if labelled:
            side = bool(number % 3)
            rows.append({"prompt": prompt, "completion": good if side else bad, "label": side})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class StopAfter(Observer):
    """Ends a run like a crash: an exception out of nowhere once a step is done."""

    class Stopped(BaseException):
        """Not one of ours, and no error of a callback, after which a run without a checkpoint is removed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, record: Any) -> None:
        if record["step"] == self.step:
            self.stop()

    def stop(self) -> None:
        raise self.Stopped


class KillAfter(StopAfter):
    """Ends the process by SIGKILL once a step is done."""

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(config: TrainConfig, step: int) -> None:
    """In a process of its own: train, and be killed once this step is done, before anything is saved of it."""
    train(config, callbacks=[KillAfter(step)])


def write_rows(path: Path, count: int, *, seed: int, words: tuple[int, int] = (2, 8), completion: int = 3) -> Path:
    """Prompts of so many random words (the second number excluded), and completions."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = " ".join(draw.choices(_WORDS.split(), k=draw.randrange(*words)))
            file.write(
                json.dumps({"prompt": prompt, "completion": " ".join(draw.choices(_WORDS.split(), k=completion))})
                + "\n"
            )
    return path


def final_bits(run: Path) -> dict[str, bytes]:
    """Everything that must be equal after two runs: the adapter, values and moments, counters without times, losses."""
    checkpoints = [path for path in (run / "checkpoints").iterdir() if path.name.startswith("step-")]
    newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("step-")))
    contents = load_checkpoint(newest, int(newest.name.removeprefix("step-"))).contents
    progress = json.loads(contents[PROGRESS_FILE])
    del progress["train_s"]
    bits = {file.name: file.read_bytes() for file in sorted((run / "adapter").iterdir())}
    bits |= {"state": contents[STATE_FILE], "progress": json.dumps(progress, sort_keys=True).encode()}
    timed = ("tokens_per_s", "rss_bytes", "time_s")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    bits["metrics"] = json.dumps([{k: v for k, v in line.items() if k not in timed} for line in lines]).encode()
    return bits
