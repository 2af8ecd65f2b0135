"""What hostile commands are tried on: a tiny model as a directory and as a GGUF file, an adapter, rows, a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.tiny_adapters import save_tiny_adapter
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import write_rows


class World:
    """Good files, made once; nothing in here is changed."""

    def __init__(self, place: Path) -> None:
        model = tiny_model("llama-tied", num_hidden_layers=2)
        self.model = save_tiny(model, place / "model")
        self.gguf = write_tiny_gguf(tiny_model("llama", num_hidden_layers=2), place / "tiny.gguf")
        self.adapter = save_tiny_adapter(model, place / "adapter", alpha=8)
        self.rows = write_rows(place / "rows.jsonl", 6, seed=0)

    def train(self, output: str, *more: object, steps: int = 2) -> list[object]:
        """The words of a short run."""
        words = ["train", "--model", self.model, "--data", self.rows, "--output", output, "--quiet"]
        return [*words, "--max-steps", steps, "--threads", 1, "--dtype", "float32", "--batch-rows", 2, *more]

    def ask(self, *more: object) -> list[object]:
        """The words of a question."""
        return ["generate", "--prompt", "what is", "--max-new-tokens", 2, "--threads", 1, "--dtype", "float32", *more]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("hostile"))


def linked(source: Path, target: Path, *, without: str) -> Path:
    """The files of a directory in another one, as links, but one."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != without:
            os.link(path, target / path.name)
    return target
