"""A base model that is damaged, incomplete or of another kind: our error, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backhand.errors import BackhandError
from backhand.training.run import train
from tests.support.fault_table import documented
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun

WEIGHTS = "model.safetensors"


def sharded(directory: Path) -> Path:
    return save_tiny(tiny_model("llama-tied", num_hidden_layers=2), directory, max_shard_size="60KB")


def whole(directory: Path) -> Path:
    return save_tiny(tiny_model("llama-tied", num_hidden_layers=2), directory)


def gguf(directory: Path) -> Path:
    directory.mkdir()
    write_tiny_gguf(tiny_model("llama-tied", num_hidden_layers=2), directory / "model.gguf")
    return directory / "model.gguf"


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def edited_config(model: Path, **values: object) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return model


def weights_cut(directory: Path) -> Path:
    cut(whole(directory) / WEIGHTS, 0.7)
    return directory


def header_cut(directory: Path) -> Path:
    cut(whole(directory) / WEIGHTS, 0.001)
    return directory


def weights_empty(directory: Path) -> Path:
    (whole(directory) / WEIGHTS).write_bytes(b"")
    return directory


def weights_garbage(directory: Path) -> Path:
    path = whole(directory) / WEIGHTS
    path.write_bytes(b"\x93" * 64 + path.read_bytes()[64:])
    return directory


def weights_missing(directory: Path) -> Path:
    (whole(directory) / WEIGHTS).unlink()
    return directory


def shard_missing(directory: Path) -> Path:
    min(sharded(directory).glob("model-*.safetensors")).unlink()
    return directory


def tensor_of_another_shape(directory: Path) -> Path:
    path = whole(directory) / WEIGHTS
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": torch.zeros(7)}, path, metadata={"format": "pt"})
    return directory


def weights_nan(directory: Path) -> Path:
    path = whole(directory) / WEIGHTS
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def wrong_architecture(directory: Path) -> Path:
    return edited_config(whole(directory), model_type="vit", architectures=["ViTForImageClassification"])


def unknown_architecture(directory: Path) -> Path:
    return edited_config(whole(directory), model_type="not_a_model", architectures=["NotAModel"])


def no_tokenizer(directory: Path) -> Path:
    return save_tiny(tiny_model("llama-tied", num_hidden_layers=2), directory, tokenizer=False)


def no_chat_template(directory: Path) -> Path:
    whole(directory)
    for name in ("chat_template.jinja", "chat_template.json"):
        (directory / name).unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    return directory


def gguf_cut(directory: Path) -> Path:
    path = gguf(directory)
    cut(path, 0.6)
    return path


def gguf_header_cut(directory: Path) -> Path:
    path = gguf(directory)
    cut(path, 0.01)
    return path


def gguf_of_another_kind(directory: Path) -> Path:
    path = gguf(directory)
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0whale", 1))
    return path


Break = Callable[[Path], Path]
BROKEN: tuple[tuple[Break, int, str], ...] = (
    (weights_cut, 4, WEIGHTS),
    (header_cut, 4, WEIGHTS),
    (weights_empty, 4, WEIGHTS),
    (weights_garbage, 4, WEIGHTS),
    (weights_missing, 4, "model"),
    (shard_missing, 4, "model-"),
    (tensor_of_another_shape, 4, "model.norm.weight"),
    (weights_nan, 6, "model.norm.weight"),
    (wrong_architecture, 4, "vit"),
    (unknown_architecture, 4, "not_a_model"),
    (no_tokenizer, 4, "tokenizer"),
    (no_chat_template, 3, "chat template"),
    (gguf_cut, 4, "model.gguf"),
    (gguf_header_cut, 4, "model.gguf"),
    (gguf_of_another_kind, 4, "whale"),
)


@pytest.mark.parametrize(("break_it", "code", "named"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_a_broken_model_is_named(break_it: Break, code: int, named: str, tiny: TinyRun, tmp_path: Path) -> None:
    model = break_it(tmp_path / "model")
    rows = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "a number"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(BackhandError) as caught:
        train(tiny.config(tmp_path / "run", model=str(model), data=(str(rows),), eval_data=()))
    assert caught.value.exit_code == code, str(caught.value)
    assert named in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run" / "adapter").exists()
    if code != 6:  # that one is found by a guard, whose proof is part of the run
        assert not (tmp_path / "run").exists()


def test_the_page_counts_the_models() -> None:
    assert documented("a model that is damaged, incomplete or of another kind") == len(BROKEN)
