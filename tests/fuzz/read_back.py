"""Kinds of files that Backhand wrote and reads back: those of a run directory."""

from __future__ import annotations

import json
import random
from pathlib import Path

from backhand.report.train import train
from fuzz.mutate import mutated_bytes, mutated_json
from support.tiny_run import TinyRun

RUN_FILES = ("status.json", "facts.json", "summary.json", "metrics.jsonl", "proofs.jsonl", "answers.jsonl")


def make_run(place: Path) -> Path:
    """A finished run with held-out rows whose answers are labels."""
    tiny = TinyRun(place)
    rows = [{"prompt": f"the user asks {i} names", "completion": "json" if i % 2 else "list"} for i in range(6)]
    tiny.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.held_out.write_text(tiny.rows.read_text())
    train(tiny.config(place / "run", answers=2, max_steps=2, eval_every=1))
    return place / "run"


def run_file(draw: random.Random, run: Path) -> tuple[str, bytes]:
    """The name of one of a run's files, and its bytes with one JSON value or a few bytes changed."""
    name = draw.choice([*RUN_FILES, "config.toml"])
    data = (run / name).read_bytes()
    if name == "config.toml" or draw.random() < 0.1:
        return name, mutated_bytes(draw, data)
    if name.endswith(".json"):
        return name, mutated_json(draw, json.loads(data)).encode("utf-8", "surrogatepass")
    lines = data.decode().splitlines()
    number = draw.randrange(len(lines))
    lines[number] = mutated_json(draw, json.loads(lines[number]))
    return name, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
