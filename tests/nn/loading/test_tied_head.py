"""A stored head that differs from the embedding is a separate matrix, whatever the config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from backhand.interop.merging import merge_command
from backhand.interop.options import MergeOptions
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model, tied_head
from tests.support.in_memory import InMemoryModel
from tests.support.tiny_adapters import adapted, save_tiny_adapter
from tests.support.tiny_models import full_logits, save_tiny, tiny_documents, tiny_model

_EMBEDDING = "model.embed_tokens.weight"
_TIED = {"llama-tied": {}, "gemma3_text": {"query_pre_attn_scalar": 14, "tie_word_embeddings": True}}


def _with_head(variant: str, directory: Path, head: Any, *, silent: bool = False) -> Path:
    """Write a directory with the stored head `head(embedding)`, whose config ties the head or does not mention it."""
    save_tiny(tiny_model(variant, **_TIED[variant]), directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = head(tensors[_EMBEDDING].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    if silent:
        del config["tie_word_embeddings"]
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def _other(embedding: Tensor) -> Tensor:
    return torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5)) / embedding.shape[1] ** 0.5


def _theirs(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("variant", "silent"), [("llama-tied", False), ("gemma3_text", False), ("gemma3_text", True)])
def test_another_head_is_kept_and_computed_with_as_in_transformers(variant: str, silent: bool, tmp_path: Path) -> None:
    directory = _with_head(variant, tmp_path / "base", _other, silent=silent)
    document = tiny_documents([19])[0]
    expected = full_logits(_theirs(directory), document)
    source = open_model(directory)
    assert "lm_head.weight" in source.tensor_names() and source.config["tie_word_embeddings"] is False
    assert not decoder_config(source.config).tied_head
    tensors = {name: source.load(name) for name in source.tensor_names()}
    memory = InMemoryModel(json.loads((directory / "config.json").read_text()), tensors)
    for one in (source, memory):
        assert _distance(Decoder.from_source(one, dtype=torch.float32).logits(document), expected) < 1e-5


@pytest.mark.parametrize(("variant", "silent"), [("llama-tied", False), ("gemma3_text", True)])
def test_the_embedding_once_more_is_left_out(variant: str, silent: bool, tmp_path: Path) -> None:
    directory = _with_head(variant, tmp_path, lambda embedding: embedding, silent=silent)
    source = open_model(directory)
    assert "lm_head.weight" not in source.tensor_names() and decoder_config(source.config).tied_head
    config = json.loads((directory / "config.json").read_text())
    for copied in (True, False):
        embedding = source.load(_EMBEDDING)
        tensors = {_EMBEDDING: embedding, "lm_head.weight": embedding.clone() if copied else embedding}
        assert InMemoryModel(config, tensors).tensor_names() == (_EMBEDDING,)


@pytest.mark.parametrize("row", [0, 150, 306])
def test_one_other_number_in_any_block_is_enough(row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(embedding: Tensor) -> Tensor:
        embedding[row, 7] += 1e-3
        return embedding

    monkeypatch.setattr(tied_head, "_BLOCK_ELEMENTS", 60 * 50)
    directory = _with_head("llama-tied", tmp_path, changed)
    assert "lm_head.weight" in open_model(directory).tensor_names()


def test_a_head_of_another_shape_is_not_taken_for_the_embedding(tmp_path: Path) -> None:
    source = open_model(_with_head("llama-tied", tmp_path, lambda _: torch.zeros(3, 3)))
    assert source.shape("lm_head.weight") == (3, 3)


@pytest.mark.parametrize("name", ["merged", "merged.gguf"])
def test_a_merged_model_keeps_such_a_head(name: str, tmp_path: Path) -> None:
    base = _with_head("llama-tied", tmp_path / "base", _other)
    model = _theirs(base)
    adapter = save_tiny_adapter(model, tmp_path / "adapter")
    output = tmp_path / name
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(base), quiet=True))
    document = tiny_documents([19])[0]
    expected = full_logits(adapted(_theirs(base)), document)
    assert _distance(Decoder.from_source(open_model(output), dtype=torch.float32).logits(document), expected) < 1e-5
    if output.is_dir():
        assert _distance(full_logits(_theirs(output), document), expected) < 1e-5
