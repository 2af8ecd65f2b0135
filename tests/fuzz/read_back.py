"""Kinds of files that Backhand wrote and reads back: those of a run, and prepared rows."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backhand.data import prepared_cache
from backhand.data.stored_examples import RECORD
from backhand.options.objectives import ObjectiveOptions
from backhand.report.train import train
from backhand.training.reference import _checksum
from tests.fuzz.kinds import Case, World
from tests.fuzz.mutate import ODD_NUMBERS, mutated_bytes, mutated_json
from tests.support.tiny_run import StopAfter, TinyRun, write_pairs

RUN_FILES = ("status.json", "facts.json", "summary.json", "metrics.jsonl", "proofs.jsonl", "answers.jsonl")
_RUN, _STOPPED, _ROWS_CACHE = "finished", "stopped", "rows_cache"


def make_run(place: Path) -> Path:
    """A finished run with held-out rows whose answers are labels."""
    tiny = TinyRun(place)
    rows = [{"prompt": f"the user asks {i} names", "completion": "json" if i % 2 else "list"} for i in range(6)]
    tiny.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.held_out.write_text(tiny.rows.read_text())
    train(tiny.config(place / "run", answers=2, max_steps=2, eval_every=1))
    return place / "run"


def make_files(world: World) -> None:
    """Make a finished run, a run of pairs that was stopped in its third step, and prepared rows of `world.rows`."""
    from backhand.cli.main import main

    place = world.model.parent
    make_run(place / _RUN)
    tiny = TinyRun(place / _STOPPED)
    write_pairs(tiny.rows, 8)
    write_pairs(tiny.held_out, 3, seed=1)
    config = tiny.config(place / _STOPPED / "run", max_steps=4, save_every=1, micro_batch_rows=2, eval_every=4)
    with pytest.raises(StopAfter.Stopped):
        train(replace(config, objective=ObjectiveOptions(objective="dpo")), callbacks=[StopAfter(3)])
    prepared_cache.LEAST_BYTES = 1
    os.environ[prepared_cache.VARIABLE] = str(place / _ROWS_CACHE)
    assert main([*_prepare(world)[:-1], str(place / "made")]) == 0
    os.environ[prepared_cache.VARIABLE] = "out"  # of a case; there are none but where a case has one


def _prepare(world: World) -> tuple[str, ...]:
    """A command that prepares the rows and makes one step on them."""
    options = "--max-steps", "1", "--threads", "1", "--eval-fraction", "0", "--quiet", "--output", "out/run"
    return "train", "--model", str(world.model), "--data", str(world.rows), *options


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


def report_case(draw: random.Random, world: World) -> Case:
    """A run of which `report` reads one damaged file."""
    run = world.model.parent / _RUN / "run"
    name, data = run_file(draw, run)
    return Case({f"r/{name}": data}, ("report", "r", "--output", "out/report.html"), {}, {"r": run})


def resume_case(draw: random.Random, world: World) -> Case:
    """A stopped run of pairs that goes on with one damaged file, its checksum right as a rule."""
    run = world.model.parent / _STOPPED / "run"
    match draw.randrange(3):
        case 0:
            name, data = draw.choice(["status.json", "facts.json", "metrics.jsonl", "proofs.jsonl"]), b""
            data = mutated_bytes(draw, (run / name).read_bytes())
        case 1:
            name = "reference.json"
            stored = json.loads((run / name).read_bytes())
            values = {key: value for key, value in stored.items() if key not in ("digest", "sum")}
            changed = _changed(draw, values)
            if isinstance(changed, dict):
                changed = {"digest": stored["digest"], "sum": _checksum(changed), **changed}
            data = json.dumps(changed).encode()
        case _:
            name = "checkpoints/step-2/manifest.json"
            manifest = json.loads((run / name).read_bytes())
            del manifest["manifest_sha256"]
            changed = _changed(draw, manifest)
            body = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
            if isinstance(changed, dict):
                changed["manifest_sha256"] = hashlib.sha256(body).hexdigest()
            data = json.dumps(changed).encode()
    command = ("train", "--resume", "--quiet", "--output", "out")
    return Case({f"out/{name}": data}, command, {}, {"out": run})


def kept_rows_case(draw: random.Random, world: World) -> Case:
    """Prepared rows whose header, tokens or records are others, with the digest of what they are."""
    (path,) = (world.model.parent / _ROWS_CACHE).iterdir()
    whole = path.read_bytes()
    line, arrays = whole[32:].split(b"\n", 1)
    header = json.loads(line)
    records = np.frombuffer(arrays[4 * header["tokens"] :], RECORD).copy()
    tokens = arrays[: 4 * header["tokens"]]
    match draw.randrange(4):
        case 0:
            line = mutated_json(draw, header).encode("utf-8", "surrogatepass")
        case 1:
            tokens = mutated_bytes(draw, tokens)
        case 2:
            name = draw.choice(
                ["begin", "tokens", "source_bytes", "place", "label", "supervised", "input_tokens", "highest"]
            )
            number = draw.choice([one for one in ODD_NUMBERS if isinstance(one, int)]) * draw.choice([1, -1])
            width = 8 * RECORD[name].itemsize
            records[name][draw.randrange(len(records))] = (number + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
        case _:
            records = np.frombuffer(draw.randbytes(records.nbytes), RECORD)
    data = line + b"\n" + tokens + records.tobytes()
    stated = hashlib.sha256(data).digest() if draw.random() < 0.9 else whole[:32]
    return Case({f"out/{path.name}": stated + data}, _prepare(world), {})


def _changed(draw: random.Random, value: Mapping[str, Any]) -> Any:
    try:
        return json.loads(mutated_json(draw, value))
    except (ValueError, RecursionError):
        return None


KINDS = {"report": report_case, "resume": resume_case, "kept_rows": kept_rows_case}
