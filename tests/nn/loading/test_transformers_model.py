from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from backhand.errors import ArtifactError
from backhand.nn.loading import open_model
from backhand.nn.loading.transformers_model import load_transformers_model
from tests.support.in_memory import InMemoryModel
from tests.support.tiny_models import full_logits, save_tiny, tiny_documents, tiny_model

DOCUMENT = tiny_documents([9])[0]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_tiny(tiny_model("qwen3"), tmp_path)


def test_a_directory_gives_the_saved_model(directory: Path) -> None:
    loaded = load_transformers_model(open_model(directory), dtype=torch.float32)
    assert torch.equal(full_logits(loaded, DOCUMENT), full_logits(tiny_model("qwen3", attention="sdpa"), DOCUMENT))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("variant", ["llama3", "gemma3_text"])
def test_tensors_of_any_source_give_the_model(variant: str) -> None:
    model = tiny_model(variant, attention="sdpa")
    source = InMemoryModel(model.config.to_dict(), model.state_dict())
    loaded = load_transformers_model(source, dtype=torch.float32)
    assert torch.equal(full_logits(loaded, DOCUMENT), full_logits(model, DOCUMENT))
    narrow = load_transformers_model(source, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_a_model_the_engine_does_not_know(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=101, n_embd=24, n_layer=2, n_head=3, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_transformers_model(open_model(tmp_path), dtype=torch.float32)
    document = DOCUMENT % 101
    torch.testing.assert_close(full_logits(loaded, document), full_logits(model, document))


def test_loading_prints_nothing(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_transformers_model(open_model(directory), dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()  # elsewhere they stay as they were


def test_missing_weights_are_not_made_up(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 weights .* model.layers.1.mlp.up_proj.weight"):
        load_transformers_model(open_model(directory), dtype=torch.float32)
    model = tiny_model("llama")
    partial = {name: tensor for name, tensor in model.state_dict().items() if "norm" not in name}
    with pytest.raises(ArtifactError, match="7 weights"):
        load_transformers_model(InMemoryModel(model.config.to_dict(), partial), dtype=torch.float32)


@pytest.mark.parametrize("model_type", ["no-such-architecture", "bert"])
def test_what_transformers_cannot_load_is_an_error(directory: Path, model_type: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = model_type
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError) as caught:
        load_transformers_model(open_model(directory), dtype=torch.float32)
    assert caught.value.where == str(directory)
