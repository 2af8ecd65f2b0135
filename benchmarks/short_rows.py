"""Short instruction rows for the fine-tuning benchmark: about 50 tokens with the chat template, 3 of them supervised.

The task can be learned and cannot be answered by the base: which shelf code belongs to a kind of thing that a sentence
names.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

_SHELVES = {
    "A1": ("apple", "pear", "plum", "cherry", "melon", "grape"),
    "B2": ("hammer", "saw", "drill", "wrench", "chisel", "pliers"),
    "C3": ("shirt", "scarf", "jacket", "glove", "sock", "belt"),
    "D4": ("novel", "atlas", "diary", "poem", "comic", "lexicon"),
}
_ASKED = (
    "A {adjective} {thing} came in with the {time} delivery from {place}. On which shelf does it go?",
    "{place} has sent us one {adjective} {thing} this {time}; name the shelf where it belongs.",
    "Please tell me the shelf for the {adjective} {thing} that {place} returned this {time}.",
)
_ADJECTIVES = ("small", "heavy", "red", "old", "shiny", "cheap", "broken", "rare")
_TIMES = ("morning", "evening", "noon", "week", "month")
_PLACES = ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Perth", "Turin", "Accra")


def write_rows(path: Path, count: int, seed: int) -> None:
    """JSON lines in the prompt / completion form that TRL and this project both read."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            shelf = draw.choice(sorted(_SHELVES))
            asked = draw.choice(_ASKED).format(
                adjective=draw.choice(_ADJECTIVES),
                thing=draw.choice(_SHELVES[shelf]),
                time=draw.choice(_TIMES),
                place=draw.choice(_PLACES),
            )
            row = {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": shelf}],
            }
            file.write(json.dumps(row) + "\n")
