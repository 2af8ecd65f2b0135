"""Every config field is used, neutral, or refused; well-known models' configs give what transformers computes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers

from backhand.errors import ArtifactError
from backhand.nn.family import LayerConfig, RotaryConfig
from backhand.nn.family_parsing import FAMILIES, UnsupportedModel, decoder_config
from support.tiny_models import VARIANTS, full_logits, randomise, tiny_config, tiny_documents, tiny_model

_NEUTRAL_HERE = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
}


def _changed(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2
    if isinstance(value, float):
        return value * 2 + 0.25
    if isinstance(value, str):
        return value + "_x"
    if isinstance(value, dict):
        return {**copy.deepcopy(value), "rope_type": "yarn"}
    if isinstance(value, list):
        return [*value[:-1], "chunked_attention"]
    return 3


def _fields_of_classes(model_type: str) -> set[str]:
    """What a config class of transformers declares, whether or not a saved file has it."""
    return set(transformers.AutoConfig.for_model(model_type).to_dict())


_WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("llama", {}),
        ("llama3", {}),
        ("mistral", {}),
        ("qwen2", _WINDOWED),
        ("qwen3", _WINDOWED),
        ("gemma3_text", {"sliding_window_pattern": 3}),
    ],
)
def test_no_field_of_transformers_is_ignored_unless_neutral(variant: str, overrides: dict[str, Any]) -> None:
    config = {**tiny_config(variant, **overrides).to_dict(), **overrides}
    # layer_types would win over the fields from which they follow.
    silent_on_types = {
        key: value for key, value in config.items() if key not in ("layer_types", "_sliding_window_pattern")
    }
    base = decoder_config(silent_on_types)
    assert base == decoder_config(config)
    silent = set()
    for key in (_fields_of_classes(config["model_type"]) | set(silent_on_types)) - {
        "model_type",
        "_sliding_window_pattern",
    }:
        try:
            result = decoder_config({**silent_on_types, key: _changed(config.get(key))})
        except ArtifactError:
            continue
        if result == base:
            silent.add(key)
    assert silent <= _NEUTRAL_HERE


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_neutral_leaves_the_logits_of_transformers_alone(variant: str) -> None:
    document = tiny_documents([11])[0]
    expected = full_logits(tiny_model(variant), document)
    changes: dict[str, Any] = {
        "initializer_range": 0.3,
        "use_cache": False,
        "bos_token_id": 5,
        "pad_token_id": 7,
        "output_hidden_states": True,
        "temperature": 0.3,
        "max_length": 5,
        "unsloth_fixed": True,
    }
    if tiny_config(variant).model_type == "llama":
        changes["pretraining_tp"] = 2
    model = tiny_model(variant, **changes)
    # The padding token decides nothing but which row of a trained embedding stays as it is.
    plain = dataclasses.replace(decoder_config(tiny_config(variant).to_dict()), padding_id=changes["pad_token_id"])
    assert decoder_config(model.config.to_dict()) == plain
    assert torch.equal(full_logits(model, document), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_old_and_new_spelling_of_rotary_fields_agree(variant: str) -> None:
    config = tiny_config(variant).to_dict()
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    parameters = copy.deepcopy(config["rope_parameters"])
    if "full_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    old["rope_theta"] = parameters.pop("rope_theta")
    old["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    assert decoder_config(old) == decoder_config(config)
    if old["rope_scaling"]:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
        assert decoder_config(old) == decoder_config(config)


def test_layer_types_and_their_patterns_agree() -> None:
    for variant in ("qwen2-window", "gemma3_text"):
        config = tiny_config(variant).to_dict()
        without = {key: value for key, value in config.items() if key != "layer_types"}
        if variant == "gemma3_text":
            without["sliding_window_pattern"] = 3
        assert decoder_config(without) == decoder_config(config)
        assert {layer.window for layer in decoder_config(config).layers} == {None, 8}


_SMOLLM2 = {
    "_name_or_path": "/fsx/model",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}

_GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}


def test_smollm2() -> None:
    parsed = decoder_config(_SMOLLM2)
    assert (parsed.num_heads, parsed.num_key_value_heads, parsed.head_dim) == (9, 3, 64)
    assert parsed.rotary == (RotaryConfig(100000.0),)
    assert parsed.attention_scaling == 0.125
    assert parsed.tied_head
    assert parsed.eos_token_ids == (2,)
    assert parsed.layers == (LayerConfig(),) * 30


def test_gemma3_of_an_older_transformers() -> None:
    parsed = decoder_config(_GEMMA3_1B)
    assert [layer.window for layer in parsed.layers[:7]] == [512, 512, 512, 512, 512, None, 512]
    assert [parsed.rotary[layer.rotary].theta for layer in parsed.layers[4:7]] == [1e4, 1e6, 1e4]
    assert parsed.tied_head
    assert parsed.eos_token_ids == (1, 106)
    assert parsed.attention_scaling == 1 / 16
    # √1152 as float32 has it.
    assert parsed.embedding_scaling == torch.tensor(1152**0.5).item()


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling.rope_type = 'yarn'"]),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_scaling.type = 'dynamic'"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ("llama", {"attention_dropout": 0.1, "hidden_act": "gelu"}, ["attention_dropout = 0.1", "hidden_act = 'gelu'"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "GGUF"]),
        ("llama", {"residual_multiplier": 0.22}, ["residual_multiplier = 0.22"]),
        ("llama", {"new_flag": False}, ["new_flag = False"]),
        ("llama", {"head_dim": 13}, ["head_dim = 13"]),
        ("mistral", {"layer_types": ["full_attention"] * 3}, ["layer_types"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ["sliding_window"]),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, ["linear_attention"]),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0"]),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping = 30.0"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters.rope_type"]),
    ],
)
def test_what_the_engine_lacks_is_listed_with_its_value(
    variant: str, changes: dict[str, Any], named: list[str]
) -> None:
    config = {**tiny_config(variant).to_dict(), **changes}
    if "rope_scaling" in changes:
        del config["rope_parameters"]
    with pytest.raises(UnsupportedModel) as raised:
        decoder_config(config)
    assert raised.value.exit_code == 4
    for text in named:
        assert text in str(raised.value)


def test_longrope_is_taken_only_with_one_list_and_no_attention_factor() -> None:
    config = tiny_config("llama").to_dict()
    factors = [1.0 + j / 2 for j in range(7)]
    rule: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": list(factors),
        "attention_factor": 1.0,
        "original_max_position_embeddings": 16,
    }
    parsed = decoder_config({**config, "rope_parameters": rule})
    assert dict(parsed.rotary[0].scaling or ())["short_factor"] == tuple(factors)
    with pytest.raises(UnsupportedModel, match="long_factor"):
        decoder_config({**config, "rope_parameters": {**rule, "long_factor": [2.0] * 7}})
    with pytest.raises(UnsupportedModel, match="attention_factor"):
        decoder_config({**config, "rope_parameters": {**rule, "attention_factor": None}})
    for key in ("short_factor", "long_factor"):
        with pytest.raises(ArtifactError, match=rf"{key} = .* is not a list of 7 positive numbers"):
            decoder_config({**config, "rope_parameters": {**rule, key: factors[:-1]}})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "60"}, "hidden_size = '60'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers = 1099511627776"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 4}, "6 heads cannot share 4"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ],
)
def test_values_that_no_model_has_are_errors(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ArtifactError, match=named):
        decoder_config({**tiny_config("llama").to_dict(), **changes})


def test_unknown_families_are_named() -> None:
    with pytest.raises(UnsupportedModel, match="'bert'"):
        decoder_config({"model_type": "bert"})
    with pytest.raises(UnsupportedModel, match="image model"):
        decoder_config({"model_type": "gemma3", "text_config": _GEMMA3_1B})
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}


def test_tiny_models_are_random_where_it_matters() -> None:
    for variant in VARIANTS:
        model = tiny_model(variant)
        for name, parameter in model.named_parameters():
            assert parameter.std() > 0.05, name
        other = tiny_model(variant, seed=1)
        randomise(other, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
