"""Kinds of `make fuzz`: the directory of a finished search with one damaged file, and configurations in YAML."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.fuzz.kinds import Case, World, text_bytes
from tests.fuzz.mutate import ODD_TEXTS, mutated_bytes, mutated_json

_SEARCH = "search"


def make_search(world: World) -> Path:
    """Run a search of three trials next to the model of `world`, unless there is one; return its directory."""
    from backhand.cli.main import main

    place = world.model.parent / _SEARCH
    if not (place / "search.json").exists():
        words = ["--model", str(world.model), "--data", str(world.rows), "--output", str(place), "--trials", "3"]
        words += ["--eval-fraction", "0.5", "--max-steps", "8", "--batch-rows", "2", "--over", "rank=2,4"]
        if main(["search", *words, "--threads", "1", "--dtype", "float32", "--quiet"]):
            raise SystemExit("the search of good files fails")
    return place


def search_case(draw: random.Random, world: World) -> Case:
    """A finished search, one file of which is damaged."""
    search = make_search(world)
    name, data = damaged_file(draw, search)
    command = ("search", "--resume", "--output", "out", "--quiet")
    if draw.random() < 0.3:
        command = (*command, "--trials", "4")
    return Case({f"out/{name}": data}, command, {}, {"out": search})


def damaged_file(draw: random.Random, search: Path) -> tuple[str, bytes]:
    """Choose a file of a search, its own files more often than those of its trials; return its name and new bytes."""
    own = [search / name for name in ("study.journal", "rows.json", "search.toml")]
    path = draw.choice(own if draw.random() < 0.5 else sorted(path for path in search.rglob("*") if path.is_file()))
    data = path.read_bytes()
    kind = draw.random()
    if kind < 0.5 and path.suffix in (".journal", ".jsonl") and data:
        lines = data.splitlines()
        at = draw.randrange(len(lines))
        match draw.randrange(4):
            case 0 | 1:
                lines[at] = text_bytes(mutated_json(draw, json.loads(lines[at])))
            case 2:
                del lines[at : at + draw.choice([1, 1, 5])]
            case 3:
                lines.insert(at, draw.choice(lines))
        data = b"".join(line + b"\n" for line in lines)
    elif kind < 0.7 and path.suffix == ".json":
        data = text_bytes(mutated_json(draw, json.loads(data)))
    else:
        data = draw.choice([b"", b"{", b"[]", b"null", bytes(len(data)), *[mutated_bytes(draw, data)] * 5])
    return str(path.relative_to(search)), data


_GOOD_YAML = """\
model: {model: smollm2-135m, threads: 1}
data:
  data: [absent.jsonl]
  template_args: {enable_thinking: false, n: 3}
optimization:
  learning_rate: 1e-3   # YAML 1.1 reads text here
  schedule: 'cosine'
rank: 8
system: |
  Two
  lines
eval_data:
"""
_PIECES = (
    *("[", "{", "- ", "? ", "a: ", ": ", ", ", "]", "}", "&a ", "*a", "!!t ", "!", "<<: ", "---\n", "%YAML 1.1\n"),
    *("|\n", ">\n", "'", '"', "#", "\n", "  ", "\t", "1e-4", "1_", "0x", "1:1", "2001-01-01", "null", "~", ".inf"),
)


def yaml_case(draw: random.Random, world: World) -> Case:
    """A configuration in YAML: damaged, or pieces of the language repeated and joined."""
    kind = draw.random()
    if kind < 0.4:
        data = mutated_bytes(draw, _GOOD_YAML.encode())
    elif kind < 0.7:
        pieces = [draw.choice([*_PIECES, *ODD_TEXTS]) for _ in range(draw.choice([1, 5, 40]))]
        data = text_bytes("".join(piece * draw.choice([1, 1, 1, 2, 9, 300]) for piece in pieces))
    else:
        pattern = "".join(draw.choices(_PIECES, k=draw.choice([1, 1, 2, 3])))
        data = text_bytes(draw.choice(["", "a: ", "[", _GOOD_YAML]) + pattern * (draw.choice([10, 2**12, 2**16]) // 4))
    name = draw.choice(["run.yaml", "run.yml"])
    return Case({name: data}, ("train", name), {})
