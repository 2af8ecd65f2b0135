"""Hugging Face directories give transformers' own tensors, and every damage is an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backhand.errors import ArtifactError
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import fill, open_model
from backhand.nn.loading.huggingface import HuggingFaceDirectory
from tests.support.in_memory import InMemoryModel, experts_apart
from tests.support.odd_texts import ODD_TEXTS
from tests.support.tiny_models import VARIANTS, save_tiny, tiny_model
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_equal_transformers(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tiny_model(variant, dtype=dtype), tmp_path, tokenizer=False)
    source = open_model(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    expected = experts_apart(expected, source.config["model_type"])
    if source.config["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert set(source.tensor_names()) == set(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        loaded = source.load(name)
        assert loaded.dtype == dtype
        assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_decoder_is_filled_with_one_rounding(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(variant)
    source = open_model(save_tiny(model, tmp_path, tokenizer=False, max_shard_size="60KB"))
    config = decoder_config(source.config)
    weights = empty_weights(config, dtype)
    fill(source, named_views(weights, config))
    expected = experts_apart(model.state_dict(), model.config.model_type)
    for name, view in named_views(weights, config):
        assert torch.equal(view, expected[name].to(dtype)), name


def test_tensors_come_in_the_order_of_the_header(tmp_path: Path) -> None:
    """Not in that of a set, with which two merges of the same model would differ in their bytes."""
    file = save_tiny(tiny_model("llama"), tmp_path, tokenizer=False) / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert open_model(tmp_path).tensor_names() == tuple(opened.keys())


def test_shards_equal_one_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = open_model(save_tiny(model, tmp_path / "whole", tokenizer=False))
    shards = open_model(save_tiny(model, tmp_path / "shards", tokenizer=False, max_shard_size="60KB"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert set(shards.tensor_names()) == set(whole.tensor_names())
    assert all(torch.equal(shards.load(name), whole.load(name)) for name in whole.tensor_names())


def test_a_model_saved_without_its_head_has_the_same_names(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert set(source.tensor_names()) == set(expected)
    assert all(torch.equal(source.load(name), tensor) for name, tensor in expected.items())


def test_one_file_goes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    save_tiny(tiny_model("llama", seed=1), tmp_path, tokenizer=False, max_shard_size="60KB")
    save_tiny(tiny_model("llama", seed=2), tmp_path / "whole", tokenizer=False)
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors.index.json").exists()
    source = open_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(source.load(name), tensor) for name, tensor in theirs.items())


def test_tokenizer_template_and_stop_tokens(tmp_path: Path) -> None:
    source = open_model(save_tiny(tiny_model("llama"), tmp_path))
    tokenizer = source.tokenizer()
    assert tokenizer(list(ODD_TEXTS)).input_ids == tiny_tokenizer()(list(ODD_TEXTS)).input_ids
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert source.tokenizer() is tokenizer
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17]}))
    again = open_model(tmp_path)
    assert again.generation_config == {"eos_token_id": [2, 17]}
    assert again.stop_token_ids() == (0, 2, 17)


def _damage(directory: Path, kind: str) -> None:
    index = directory / "model.safetensors.index.json"
    shard = min(directory.glob("model-*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]
    match kind:
        case "no config":
            (directory / "config.json").rename(directory / "config.txt")
        case "config no json":
            (directory / "config.json").write_text('{"model_type": ')
        case "config no object":
            (directory / "config.json").write_text("[1, 2]")
        case "config no text":
            (directory / "config.json").write_bytes(b"\xff\xfe\x00")
        case "missing shard":
            shard.unlink()
        case "truncated shard":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "half header":
            shard.write_bytes(shard.read_bytes()[:50])
        case "empty shard":
            shard.write_bytes(b"")
        case "garbage shard":
            shard.write_bytes(b"\xff" * 1000)
        case "lfs pointer":
            shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        case "tensor elsewhere":
            first, second = sorted(set(weight_map.values()))[:2]
            swapped = {name: second if file == first else file for name, file in weight_map.items()}
            index.write_text(json.dumps({"weight_map": swapped}))
        case "path in index":
            index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
        case "no weight map":
            index.write_text("{}")
        case "no weights":
            index.unlink()
        case "pickle":
            index.unlink()
            (directory / "pytorch_model.bin").write_bytes(b"\x80")
        case "int8":
            tensors = load_file(shard)
            save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, shard)
        case "other shape":
            tensors = load_file(shard)
            save_file({name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()}, shard)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("no config", "config.json"),
        ("config no json", "config.json is not JSON"),
        ("config no object", "config.json is not a JSON object"),
        ("config no text", "config.json is not JSON"),
        ("missing shard", "model-00001-of-.* missing|missing: model-00001-of-"),
        ("truncated shard", "model-00001-of-.*safetensors is damaged"),
        ("half header", "model-00001-of-.*safetensors is damaged"),
        ("empty shard", "model-00001-of-.*safetensors is damaged"),
        ("garbage shard", "model-00001-of-.*safetensors is damaged"),
        ("lfs pointer", "git-lfs pointer"),
        ("tensor elsewhere", "places .* in this file, which does not contain it"),
        ("path in index", "weight_map"),
        ("no weight map", "weight_map"),
        ("no weights", "neither model.safetensors nor"),
        ("pickle", r"pickle files \(pytorch_model.bin\)"),
        ("int8", "stored as int8"),
        ("other shape", "has shape .* asks for"),
    ],
)
def test_damage_is_named(kind: str, named: str, tmp_path: Path) -> None:
    save_tiny(tiny_model("llama"), tmp_path, tokenizer=False, max_shard_size="60KB")
    _damage(tmp_path, kind)
    config = decoder_config(tiny_model("llama").config.to_dict())
    with pytest.raises(ArtifactError, match=named) as raised:
        fill(HuggingFaceDirectory(tmp_path), named_views(empty_weights(config, torch.float32), config))
    assert str(tmp_path) in str(raised.value)


def test_every_misfit_is_listed_before_anything_is_written() -> None:
    model = tiny_model("llama")
    tensors = model.state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(7)
    config = decoder_config(model.config.to_dict())
    weights = empty_weights(config, torch.float32)
    for _, view in named_views(weights, config):
        view.fill_(-1)
    with pytest.raises(ArtifactError) as raised:
        fill(InMemoryModel(model.config.to_dict(), tensors), named_views(weights, config))
    text = str(raised.value)
    assert "model.layers.1.mlp.up_proj.weight (76, 60) is missing" in text
    assert "model.norm.weight has shape (7,), and the configuration asks for (60,)" in text
    assert all(bool((view == -1).all()) for _, view in named_views(weights, config))


def test_one_tensor_of_another_shape_or_name_is_an_error(tmp_path: Path) -> None:
    source = open_model(save_tiny(tiny_model("llama"), tmp_path, tokenizer=False))
    with pytest.raises(ArtifactError, match=r"model.norm.weight has shape \(60,\)"):
        source.load_into("model.norm.weight", torch.empty(1, 60))
    for call in (source.load, source.shape):
        with pytest.raises(ArtifactError, match=r"no tensor model\.nothing"):
            call("model.nothing")


@pytest.mark.parametrize(
    "content",
    [None, {"tokenizer.json": "{}"}, {"tokenizer.json": "{"}, {"tokenizer_config.json": '{"tokenizer_class": "X"}'}],
)
def test_tokenizers_that_cannot_be_read_are_errors(content: dict[str, Any] | None, tmp_path: Path) -> None:
    save_tiny(tiny_model("llama"), tmp_path, tokenizer=False)
    for name, text in (content or {}).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ArtifactError, match="tokenizer") as raised:
        open_model(tmp_path).tokenizer()
    assert str(tmp_path) in str(raised.value)
