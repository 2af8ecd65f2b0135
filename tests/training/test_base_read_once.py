"""A run reads each tensor of its base once, before its first step; a dense base is never read again."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as StorageType

from backhand.loop.observers import Observer
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.huggingface import HuggingFaceDirectory
from backhand.training.run import train
from tests.support.processes import run
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model
from tests.support.tiny_run import TinyRun, final_bits

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 4}
CASES = [
    (kind, base, learning_rate)
    for kind, base in (("directory", "dense"), ("gguf", "dense"), ("gguf", "quantized"))
    for learning_rate in (1e-3, "auto")
]


def base_of(kind: str, tiny: TinyRun, directory: Path) -> Path:
    if kind == "directory":
        return tiny.model
    return write_tiny_gguf(tiny_model("llama", **_SIZES), directory / "tiny.gguf", storage=StorageType.Q8_0)


class Reads(Observer):
    """Names of the base's tensors in the order in which their data is asked for, and how many there were at a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.before_steps: list[int] = []
        for source, method in (
            (HuggingFaceDirectory, "load"),
            (HuggingFaceDirectory, "stored_parts"),
            (GGUFModel, "load"),
            (GGUFModel, "load_into"),
            (GGUFModel, "stored_parts"),
        ):
            self._note(monkeypatch, source, method)

    def _note(self, monkeypatch: pytest.MonkeyPatch, source: type, method: str) -> None:
        real = getattr(source, method)

        def noted(this: Any, name: str, *others: Any) -> Any:
            self.names.append(name)
            return real(this, name, *others)

        monkeypatch.setattr(source, method, noted)

    def stepped(self, record: Any) -> None:
        self.before_steps.append(len(self.names))

    def stretches(self) -> list[str]:
        """The names, each once for a stretch of reads of nothing else."""
        return [name for name, _ in itertools.groupby(self.names)]


@pytest.mark.parametrize(("kind", "base", "learning_rate"), CASES)
def test_every_tensor_is_read_in_one_stretch_before_the_first_step(
    kind: str, base: str, learning_rate: float | str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantized base is also mapped into a few blocks that are measured, and stays mapped for the steps."""
    model, reads = base_of(kind, tiny, tmp_path), Reads(monkeypatch)
    config = tiny.config(
        tmp_path / "run",
        model=str(model),
        base=base,
        learning_rate=learning_rate,
        answers=2,
        micro_batch_rows=4,
        recompute="none",
    )
    train(config, callbacks=[reads])
    assert reads.before_steps[0] == reads.before_steps[-1] == len(reads.names), "nothing is read in a step, or after it"
    if base == "dense":
        stretches = reads.stretches()
        assert len(stretches) == len(set(stretches)), stretches


class Truncates(Observer):
    """Cuts the base's file short after the first step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def stepped(self, record: Any) -> None:
        if record["step"] == 1:
            os.truncate(self.file, 4096)


def train_while_the_file_is_cut(config: Any, file: Path) -> None:
    """In a process of its own: a bus error would end it."""
    train(config, callbacks=[Truncates(file)])


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_dense_base_may_be_cut_short_while_it_trains(kind: str, tiny: TinyRun, tmp_path: Path) -> None:
    model = base_of(kind, tiny, tmp_path)
    if kind == "directory":
        model = shutil.copytree(model, tmp_path / "model")
    file = model / "model.safetensors" if kind == "directory" else model
    options = {"model": str(model), "base": "dense", "answers": 2}
    train(tiny.config(tmp_path / "straight", **options))
    assert run(train_while_the_file_is_cut, tiny.config(tmp_path / "run", **options), file) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
    assert final_bits(tmp_path / "run")["state"] == final_bits(tmp_path / "straight")["state"]
