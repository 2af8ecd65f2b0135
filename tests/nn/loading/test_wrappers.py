"""The text model of an image model opens alone, and computes the same as the image model without images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family_parsing import FAMILIES, decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.transformers_model import load_transformers_model
from backhand.nn.loading.wrappers import WRAPPERS, text_name, unwrap_config
from tests.support.tiny_models import full_logits, tiny_config, tiny_documents
from tests.support.tiny_wrappers import KINDS, save_wrapper, tiny_wrapper

DOCUMENT = tiny_documents([21], vocab_size=299)[0]


@pytest.mark.parametrize("modules_names", [False, True], ids=["as-saved", "by-module"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_model_computes_what_the_whole_does(kind: str, modules_names: bool, tmp_path: Path) -> None:
    whole = tiny_wrapper(kind)
    source = open_model(save_wrapper(whole, tmp_path, modules_names=modules_names))
    assert source.wrapper is not None
    assert source.wrapper.model_type == kind.partition(",")[0]
    assert source.config["model_type"] in FAMILIES
    assert not [
        name for name in source.tensor_names() if "vision" in name or "projector" in name or "connector" in name
    ]
    expected = full_logits(whole, DOCUMENT)
    ours = Decoder.from_source(source, dtype=torch.float32).logits(DOCUMENT)
    assert float((ours - expected).norm() / expected.norm()) < 2e-5
    theirs = load_transformers_model(source, dtype=torch.float32)
    assert not [name for name, _ in theirs.named_parameters() if "vision" in name]
    assert float((full_logits(theirs, DOCUMENT) - expected).norm() / expected.norm()) < 2e-5


def test_the_text_model_stays_one_if_it_is_quantized_on_reading(tmp_path: Path) -> None:
    path = save_wrapper(tiny_wrapper("gemma3"), tmp_path)
    wrapper = open_model(path).wrapper
    assert wrapper is not None
    assert open_model(path, quantize="q8_0").wrapper == wrapper, "adapters have the names of the whole model"


@pytest.mark.parametrize("kind", ["mistral3", "llava"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_says_whether_its_head_is_the_embedding(kind: str, tied: bool, tmp_path: Path) -> None:
    whole = tiny_wrapper(kind, tied=tied)
    source = open_model(save_wrapper(whole, tmp_path))
    assert source.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in source.tensor_names()) is not tied
    expected = full_logits(whole, DOCUMENT)
    ours = Decoder.from_source(source, dtype=torch.float32).logits(DOCUMENT)
    assert float((ours - expected).norm() / expected.norm()) < 2e-5


def test_names_of_both_kinds_of_checkpoint() -> None:
    inner = "layers.3.self_attn.q_proj.weight"
    for name in (f"language_model.model.{inner}", f"model.language_model.{inner}", f"model.text_model.{inner}"):
        assert text_name(name) == f"model.{inner}"
    assert text_name("language_model.lm_head.weight") == text_name("lm_head.weight") == "lm_head.weight"
    for name in ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", "model.visual.blocks.0.attn.qkv.weight"):
        assert text_name(name) is None


def test_a_short_text_config_has_the_defaults_of_its_class() -> None:
    """Gemma 3 4B's config on the hub has five fields, and the end tokens in the outer config."""
    config, wrapper = unwrap_config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "torch_dtype": "bfloat16",
            "vision_config": {"model_type": "siglip_vision_model"},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert wrapper is not None
    assert wrapper.wrapped_name("model.layers.0.mlp.up_proj") == "model.language_model.layers.0.mlp.up_proj"
    parsed = decoder_config(config)
    assert (parsed.vocab_size, parsed.num_heads, parsed.num_key_value_heads, parsed.head_dim) == (262_208, 8, 4, 256)
    assert parsed.tied_head
    assert parsed.padding_id == 0
    assert parsed.eos_token_ids == (1, 106)
    assert [layer.window for layer in parsed.layers[:6]] == [1024] * 5 + [None]
    assert dict(parsed.rotary[0].scaling or ()) == {"rope_type": "linear", "factor": 8.0}
    assert parsed.rotary[1].scaling is None
    assert parsed.notes == ()


def test_models_without_a_text_config_are_as_they_are() -> None:
    config = tiny_config("llama").to_dict()
    assert unwrap_config(config) == (config, None)
    assert unwrap_config({"model_type": "gemma3"}) == ({"model_type": "gemma3"}, None)
    assert unwrap_config({"model_type": "unheard_of", "text_config": {}}) == (
        {"model_type": "unheard_of", "text_config": {}},
        None,
    )


def test_every_wrapper_that_the_engine_could_take_is_tried_here() -> None:
    """The others' text models are of families that it does not know."""
    assert {kind.partition(",")[0] for kind in KINDS} <= set(WRAPPERS)


def test_stop_tokens_are_those_of_the_whole(tmp_path: Path) -> None:
    save_wrapper(tiny_wrapper("gemma3"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["eos_token_id"]
    path.write_text(json.dumps({**config, "eos_token_id": [5, 9]}))
    assert {5, 9} <= set(open_model(tmp_path).stop_token_ids())
