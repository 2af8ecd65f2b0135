"""The demo task: turn an order in a sentence into one line of strict JSON, always with the same keys in the same order.

    Ada Berg from Oslo ordered 12 blue lamps.
    {"name": "Ada Berg", "item": "blue lamps", "quantity": 12, "city": "Oslo"}

All rows are drawn from a seed. Held-out rows share no sentence pattern and no name, item, number or city with the
training rows, nor any word of these. So the model has to learn the form of the answer and the roles of the parts of a
sentence, not the words.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

from backhand.errors import ResourceError, short_reason

SYSTEM = "JSON: name, item, quantity, city"
TRAIN_ROWS = 640
HELD_OUT_ROWS = 200
SHOTS = 3
ChatRow = dict[str, list[dict[str, Any]]]
"""A row of the form `messages`: system, user, assistant."""


def demo_rows(count: int, seed: int, *, held_out: bool = False) -> list[ChatRow]:
    """Return rows with distinct sentences. The same seed gives the same rows.

    Args:
        held_out: use the patterns and words that do not occur in training.
    """
    words = HELD_OUT if held_out else TRAINING
    random = Random(f"backhand demo {'held out' if held_out else 'training'} {seed}")
    rows: dict[str, ChatRow] = {}
    while len(rows) < count:
        # Patterns alternate, so that all have the same share of rows.
        pattern = words.patterns[len(rows) % len(words.patterns)]
        values = _draw(words, random)
        sentence = pattern.format(**values)
        contents = {"system": SYSTEM, "user": sentence, "assistant": json.dumps(values)}
        rows[sentence] = {"messages": [{"role": role, "content": content} for role, content in contents.items()]}
    shuffled = list(rows.values())
    random.shuffle(shuffled)
    return shuffled


def few_shot(row: ChatRow, examples: Sequence[ChatRow]) -> ChatRow:
    """Return the row with the sentences and answers of `examples` as earlier turns."""
    system, *turns = row["messages"]
    shown = [
        message | ({"weight": 0} if message["role"] == "assistant" else {})  # demonstrations carry no loss
        for example in examples
        for message in example["messages"][1:]
    ]
    return {"messages": [system, *shown, *turns]}


def write_demo_data(
    folder: str | Path, *, seed: int = 0, train_rows: int = TRAIN_ROWS, held_out_rows: int = HELD_OUT_ROWS
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `valid.jsonl` into `folder`, which is created if necessary.

    Raises:
        ResourceError: a file cannot be written.
    """
    folder = Path(folder)
    paths = folder / "train.jsonl", folder / "valid.jsonl"
    sides = demo_rows(train_rows, seed), demo_rows(held_out_rows, seed, held_out=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, sides, strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            "the rows of the demo cannot be written", where=str(folder), why=short_reason(error)
        ) from None
    return paths


def _draw(words: DemoWords, random: Random) -> dict[str, Any]:
    return {
        "name": f"{random.choice(words.first_names)} {random.choice(words.last_names)}",
        "item": f"{random.choice(words.adjectives)} {random.choice(words.nouns)}",
        "quantity": random.choice(words.quantities),
        "city": random.choice(words.cities),
    }


@dataclass(frozen=True)
class DemoWords:
    """Parts of sentences. A person has a first and a last name, an item an adjective and a plural noun."""

    patterns: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    cities: tuple[str, ...]
    quantities: tuple[int, ...]

    @classmethod
    def of(cls, table: dict[str, Any]) -> DemoWords:
        """Create the words from a table of demo_words.toml."""
        digits = table.pop("quantity_digits")
        lists = {name: tuple(words.split() if isinstance(words, str) else words) for name, words in table.items()}
        return cls(quantities=tuple(n for n in range(2, 100) if n % 10 in digits), **lists)


_TABLES = tomllib.loads(resources.files("backhand.data").joinpath("demo_words.toml").read_text(encoding="utf-8"))
TRAINING, HELD_OUT = DemoWords.of(_TABLES["training"]), DemoWords.of(_TABLES["held_out"])
