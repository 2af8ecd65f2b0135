"""Every config field is used, neutral, or refused. Configs of well-known models give transformers' results."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import transformers

from backhand.errors import ArtifactError
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.families.config_fields import HEADLESS
from backhand.nn.families.family import LayerConfig, RotaryConfig, ShortConv
from backhand.nn.families.family_parsing import FAMILIES, UnsupportedModel, decoder_config, predicts_tokens
from backhand.nn.families.mixed_families import OF_MAMBA, WITHOUT_EXPERTS
from backhand.nn.families.neutral_fields import NEUTRAL
from tests.support.peer_faults import COMPUTED_VARIANTS
from tests.support.tiny_models import VARIANTS, full_logits, randomise, tiny_config, tiny_documents, tiny_model


def _changed(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 or 3
    if isinstance(value, float):
        return value * 2 + 0.25
    if isinstance(value, str):
        return value + "_x"
    if isinstance(value, dict):
        return {**copy.deepcopy(value), "rope_type": "axial"}
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
        ("qwen3_5_text", {}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("mixtral", {}),
        ("granite", {}),
        ("granitemoehybrid", {}),
        ("granite4-h", {"position_embedding_type": "rope"}),
        ("granite4-experts", {"position_embedding_type": "rope"}),
        ("bamba", {}),
        ("falcon_h1", {"mamba_rms_norm": True, "mamba_d_ssm": None, "mamba_d_head": 20}),
        ("lfm2", {}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
        ("olmo2", {}),
        ("olmo3", {}),
        ("exaone4", {}),
        ("ministral3", {}),
        ("glm", {}),
        ("glm4", {}),
        ("phi3-longrope", {}),
        ("gemma3_text", {"sliding_window_pattern": 3}),
        ("gemma2", {}),
    ],
)
def test_no_field_of_transformers_is_ignored_unless_neutral(variant: str, overrides: dict[str, Any]) -> None:
    config = {**tiny_config(variant, **overrides).to_dict(), **overrides}
    # layer_types would win over the fields from which they follow.
    patterns = ("layer_types", "_sliding_window_pattern", "no_rope_layers")[
        config["model_type"] == "granitemoehybrid" :
    ]
    silent_on_types = {key: value for key, value in config.items() if key not in patterns}
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
    silent -= {*(WITHOUT_EXPERTS if config.get("num_local_experts") == 0 else ())}
    assert silent <= {*NEUTRAL, *(OF_MAMBA if variant == "granitemoehybrid" else ())}


@pytest.mark.parametrize("variant", COMPUTED_VARIANTS)
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
    if tiny_config(variant).model_type == "granitemoehybrid":
        changes |= {"router_aux_loss_coef": 0.3}
        changes |= {} if variant == "granite4-experts" else {"intermediate_size": 99, "num_experts_per_tok": 3}
    if variant in ("granitemoehybrid", "granite4-nope"):
        changes |= {"mamba_d_state": 8, "mamba_chunk_size": 3, "mamba_d_conv": 3, "mamba_proj_bias": True}
    model = tiny_model(variant, **changes)
    # The padding token decides nothing but which row of a trained embedding stays as it is.
    plain = dataclasses.replace(decoder_config(tiny_config(variant).to_dict()), padding_id=changes["pad_token_id"])
    assert decoder_config(model.config.to_dict()) == plain
    assert torch.equal(full_logits(model, document), expected)


@pytest.mark.parametrize("variant", [one for one in VARIANTS if not one.startswith(("gemma4", "nemotron"))])
def test_old_and_new_spelling_of_rotary_fields_agree(variant: str) -> None:
    config = tiny_config(variant).to_dict()
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    parameters = copy.deepcopy(config["rope_parameters"])
    if "full_attention" in parameters:
        if variant == "gemma3_text":
            old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    old["rope_theta"] = parameters.pop("rope_theta")
    if parameters["rope_type"] == "default" and "partial_rotary_factor" in parameters:
        old["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    old["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    assert decoder_config(old) == decoder_config(config)
    if old["rope_scaling"]:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
        assert decoder_config(old) == decoder_config(config)


def test_layer_types_and_their_patterns_agree() -> None:
    for variant in ("qwen2-window", "gemma3_text", "olmo3", "exaone4"):
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


_LFM2_1B = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_use_swiglu": True,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_use_xavier_init": True,
    "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "tie_embedding": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 65536,
}
"""In the manner of its first files."""


def test_lfm2_of_an_older_transformers() -> None:
    parsed = decoder_config(_LFM2_1B)
    attends = [index for index, layer in enumerate(parsed.layers) if layer.mixer == "attention"]
    assert attends == [2, 5, 8, 10, 12, 14]
    assert (parsed.intermediate_size, parsed.tied_head, parsed.short_conv) == (8192, True, ShortConv(3))
    assert (parsed.head_dim, parsed.norm_eps, parsed.rotary) == (64, 1e-5, (RotaryConfig(1e6),))
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(_LFM2_1B))
    assert decoder_config(theirs.to_dict()) == parsed
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    weights = empty_weights(parsed, torch.float32, "meta")
    assert {name: tuple(view.shape) for name, view in named_views(weights, parsed)} == shapes


def test_granite_4_as_its_older_configs_state_it() -> None:
    """`attention` for every layer, fields of Mamba that mean nothing, and what no model reads."""
    config = tiny_config("granitemoehybrid").to_dict()
    older = config | {"layer_types": ["attention"] * 3, "normalization_function": "rmsnorm", "init_method": "mup"}
    parsed = decoder_config(older)
    assert parsed == decoder_config(config) and "init_method" in parsed.notes[0]
    assert [layer.rotary for layer in parsed.layers] == [0] * 3
    for other in ("nope", None):
        turned = decoder_config({**older, "position_embedding_type": other})
        assert [layer.rotary for layer in turned.layers] == [None] * 3


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"block_auto_adjust_ff_dim": False, "block_ff_dim": 999}, 999),
        ({"block_ffn_dim_multiplier": 1.3, "intermediate_size": 1000}, 1024),
        ({"block_multiple_of": 100, "intermediate_size": 1000}, 700),
        ({"block_ffn_dim_multiplier": None, "intermediate_size": 1000}, 666),
    ],
)
def test_the_width_of_lfm2s_mlp(changes: dict[str, Any], width: int) -> None:
    assert decoder_config({"model_type": "lfm2", **changes}).intermediate_size == width


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("granite4-h", {"layer_types": ["mamba", "sliding_attention"] * 2}, ["full_attention and linear_attention"]),
        ("bamba", {"partial_rotary_factor": 1.0}, ["partial_rotary_factor = 1.0"]),
        ("falcon_h1", {"projectors_bias": True}, ["projectors_bias = True"]),
        ("nemotron_h", {"layers_block_type": ["mlp", "moe"]}, ["layers_block_type = ", "no blocks of kind moe"]),
        ("nemotron_h", {"layers_block_type": None}, ["hybrid_override_pattern", "no blocks of kind moe"]),
        ("nemotron_h", {"mlp_hidden_act": "silu", "mamba_hidden_act": "gelu"}, ["mlp_hidden_act", "mamba_hidden_act"]),
        ("lfm2", {"layer_types": ["conv", "sliding_attention", "conv", "conv"]}, ["full_attention and conv"]),
        ("llama", {"rope_scaling": {"rope_type": "axial"}}, ["rope_scaling.rope_type = 'axial'"]),
        ("llama", {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_theta = "]),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "truncate": False}}},
            ["truncate = False"],
        ),
        ("olmo3", {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters.rope_type"]),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_scaling.type = 'dynamic'"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ("llama", {"head_dim": 13, "hidden_act": "gelu"}, ["head_dim = 13", "hidden_act = 'gelu'"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "GGUF"]),
        ("llama", {"quantization": {"bits": 4}}, ["quantization", "GGUF"]),
        ("llama", {"is_causal": False}, ["is_causal = False"]),
        ("llama", {"sliding_window": 8}, ["sliding_window = 8"]),
        ("llama", {"per_layer_config": {"1": {"hidden_size": 3}}}, ["per_layer_config"]),
        ("mistral", {"layer_types": ["full_attention"] * 3}, ["layer_types"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ["sliding_window"]),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5}, ["sliding_window"]),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, ["linear_attention"]),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0"]),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping = 30.0"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
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


def test_longrope_has_one_list_or_two() -> None:
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
    assert parsed.length_limits == () and parsed.rotary[0].attention_factor == 1.0
    parsed = decoder_config({**config, "rope_parameters": {**rule, "long_factor": [2.0] * 7, "attention_factor": None}})
    assert parsed.length_limits == (16,)
    assert parsed.rotary[0].attention_factor == (1 + math.log(8) / math.log(16)) ** 0.5  # 128 positions of 16
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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mamba_n_groups": 4}, "6 Mamba heads of 20 in 4 groups do not fit a width of 120"),
        ({"mamba_d_head": 12}, "6 Mamba heads of 12 in 1 groups"),
        ({"mamba_n_heads": 0}, "mamba_n_heads = 0"),
        ({"time_step_limit": [0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.2, "1"]}, "time_step_limit"),
        ({"time_step_limit": [0.2, 0.1]}, "time_step_limit"),
        ({"attn_layer_indices": ["1"]}, "attn_layer_indices"),
        ({"mlp_multipliers": [1.0]}, "mlp_multipliers"),
        ({"n_groups": 4}, "6 Mamba heads cannot share 4 groups"),
        ({"layers_block_type": "mlp"}, "layers_block_type is not a list"),
    ],
)
def test_sizes_of_mamba_that_no_model_has_are_errors(changes: dict[str, Any], named: str) -> None:
    of = {"attn_layer_indices": "bamba", "mlp_multipliers": "falcon_h1"}
    of |= dict.fromkeys(("n_groups", "layers_block_type"), "nemotron_h")
    variant = of.get(*changes, "granite4-h")
    with pytest.raises(ArtifactError, match=named):
        decoder_config({**tiny_config(variant).to_dict(), **changes})


@pytest.mark.parametrize("limits", [None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]])
def test_no_limits_of_the_time_step_in_any_spelling(limits: object) -> None:
    config = decoder_config({**tiny_config("bamba-steps").to_dict(), "time_step_limit": limits})
    assert config.ssm is not None and config.ssm.time_steps is None


def test_nemotron_h_as_its_older_configs_state_it() -> None:
    """A pattern of letters, Mamba's fields under older names, and a number of layers that is not read."""
    config = tiny_config("nemotron_h").to_dict()
    older = {key: value for key, value in config.items() if key != "layers_block_type"}
    older |= {"hybrid_override_pattern": "M-*M-", "num_hidden_layers": 52, "mamba_n_groups": older.pop("n_groups")}
    older["mamba_d_conv"] = older.pop("conv_kernel")
    assert decoder_config(older) == decoder_config(config)


def test_widths_of_mamba_heads_follow_from_the_hidden_size() -> None:
    config = tiny_config("bamba").to_dict()
    assert decoder_config(config | {"mamba_d_head": "auto"}) == decoder_config(config)


def test_phi3_as_its_older_configs_state_it() -> None:
    """longrope under its older names, part of the features and the original length outside the rule."""
    new = tiny_config("phi3-longrope").to_dict()
    parameters = dict(new.pop("rope_parameters"))
    old = {**new, "rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    old["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    del parameters["rope_type"]
    for name in ("su", "yarn", "longrope"):
        parsed = decoder_config({**old, "rope_scaling": {**parameters, "type": name}})
        assert parsed == decoder_config(tiny_config("phi3-longrope").to_dict())
        theirs = transformers.AutoConfig.for_model(
            **copy.deepcopy({**old, "rope_scaling": {**parameters, "type": name}})
        )
        assert decoder_config(theirs.to_dict()) == parsed
    with pytest.raises(UnsupportedModel, match="no model of this type has linear angles"):
        decoder_config({**old, "rope_scaling": {"type": "linear", "factor": 2.0}})
    with pytest.raises(UnsupportedModel, match="7 features of 14 cannot be rotated in pairs"):
        decoder_config({**old, "rope_scaling": None, "partial_rotary_factor": 0.5})


def test_half_of_glms_features_turn_where_a_config_is_silent() -> None:
    config = tiny_config("glm4").to_dict()
    rule = {"rope_type": "default", "rope_theta": 1e4}
    for head_dim, stated, features in ((16, {}, 8), (16, {"partial_rotary_factor": 1.0}, None)):
        (parsed,) = decoder_config({**config, "head_dim": head_dim, "rope_parameters": {**rule, **stated}}).rotary
        assert (parsed.features, parsed.interleaved) == (features, True)
    with pytest.raises(UnsupportedModel, match="7 features of 14 cannot be rotated in pairs"):
        decoder_config({**config, "rope_parameters": rule})


def test_ministral3_that_says_nothing_of_its_angles_has_those_of_its_class() -> None:
    default = transformers.AutoConfig.for_model("ministral3")
    parsed = decoder_config({"model_type": "ministral3"})
    assert dataclasses.replace(parsed, eos_token_ids=(2,)) == decoder_config(default.to_dict())
    assert parsed.query_scaling == (0.1, 16384)
    assert parsed.rotary[0].attention_factor == 1.0


def test_queries_grow_by_the_original_length_of_any_rule() -> None:
    config = tiny_config("ministral3").to_dict()
    plain = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.2}
    parsed = decoder_config({**config, "rope_parameters": {**plain, "original_max_position_embeddings": 12}})
    assert parsed.query_scaling == (0.2, 12)
    with pytest.raises(ArtifactError, match="original_max_position_embeddings is missing"):
        decoder_config({**config, "rope_parameters": plain})


def test_unknown_families_are_named() -> None:
    with pytest.raises(UnsupportedModel, match="'roberta'"):
        decoder_config({"model_type": "roberta"})
    with pytest.raises(UnsupportedModel, match="'gemma3': the engine knows bamba, "):
        decoder_config({"model_type": "gemma3", "text_config": _GEMMA3_1B})
    assert set(FAMILIES) == {tiny_config(variant).model_type for variant in VARIANTS}


def test_tiny_models_are_random_where_it_matters() -> None:
    for variant in VARIANTS:
        model = tiny_model(variant)
        for name, parameter in model.named_parameters():
            assert parameter.std() > 0.05, name
        other = tiny_model(variant, seed=1)
        randomise(other, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_with_a_head_is_known_by_few_fields(variant: str) -> None:
    config = tiny_config(variant).to_dict()
    assert predicts_tokens(config) is decoder_config(config).has_head is True
    assert predicts_tokens({**config, "model_type": "none"}) is None


def test_an_encoder_is_known_by_few_fields() -> None:
    both = tiny_config("gemma3_text", use_bidirectional_attention=True).to_dict()
    headless = {**tiny_config("llama").to_dict(), HEADLESS: True}
    for config in (both, headless, transformers.BertConfig().to_dict(), transformers.ModernBertConfig().to_dict()):
        assert predicts_tokens(config) is decoder_config(config).has_head is False
