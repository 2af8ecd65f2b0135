"""Every field that transformers declares or reads is classified. Fields that it does not read change nothing."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_type_hints

import pytest
import torch
import transformers
from transformers import modeling_rope_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from backhand.nn.families import config_fields
from backhand.nn.families.config_fields import READ_OUTSIDE_CLASS, config_class
from backhand.nn.families.family_parsing import FAMILIES, FIXED, NEUTRAL, QUANTIZED, UnsupportedModel, decoder_config
from backhand.nn.families.mixed_families import OF_MAMBA, UNUSED_BY_NEMOTRON, WITHOUT_EXPERTS
from backhand.nn.families.rotary import _READ_BY_A_RULE, SCALING_RULES
from tests.support.tiny_models import full_logits, tiny_config, tiny_documents, tiny_model

FOREIGN: dict[str, Any] = {
    "max_sequence_length": 4096,
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "mm_hidden_size": 1152,
    "use_flash_attn": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"},
    "quantization": None,
    "_model_name_or_path": "somebody/model",
    "unk_token_id": 0,
    "flash_attention": {"version": 2},
    "model_max_length": 2048,
    "seq_length": 512,
    "num_experts_per_tok": 2,
    "residual_multiplier": 0.22,
    "rope_interleaved": True,
}
"""What people's configs hold and no model of the supported families reads."""


def foreign(family: str) -> dict[str, Any]:
    """Those of them that this family does not read."""
    read = {
        "granite": {"residual_multiplier"},
        "granitemoehybrid": {"residual_multiplier", "num_experts_per_tok"},
        "mixtral": {"num_experts_per_tok"},
        "qwen3_moe": {"num_experts_per_tok"},
        "gpt_oss": {"num_experts_per_tok"},
        "nemotron_h": {"num_experts_per_tok"},
    }
    return {key: value for key, value in FOREIGN.items() if key not in read.get(family, ())}


# Neither neutral nor fixed, and read by no family: a config that holds one is refused.
_IN_THE_WAY = {
    "attention_chunk_size", "compression_config", "default_rope_type", "default_theta", "per_layer_config",
    "kv_sharing_modes", "decoder", "generator", "text_config", "_rope_type_labels", "_heterogeneity_spec",
    "number_of_conv_states",
}  # fmt: skip
_IN_THE_WAY_OF: dict[str, set[str]] = {
    "llama": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "mistral": {"sliding_window_pattern", "rope_local_base_freq"},
    "qwen2": {"sliding_window_pattern", "rope_local_base_freq"},
    "qwen3": {"sliding_window_pattern", "rope_local_base_freq"},
    "qwen3_moe": {"sliding_window_pattern", "rope_local_base_freq"},
    "mixtral": {"sliding_window_pattern", "rope_local_base_freq"},
    "gpt_oss": {"sliding_window_pattern", "rope_local_base_freq"},
    "gemma3_text": {"original_max_position_embeddings"},
    "gemma2": {"sliding_window_pattern", "rope_local_base_freq"},
    "gemma4_text": {
        "sliding_window_pattern",
        "rope_local_base_freq",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_scaling",
    },
    "olmo2": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "olmo3": {"sliding_window_pattern", "rope_local_base_freq", "original_max_position_embeddings"},
    "exaone4": {"rope_local_base_freq"},
    "ministral3": {"sliding_window_pattern", "rope_local_base_freq"},
    "glm": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "glm4": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "phi3": {"sliding_window_pattern", "rope_local_base_freq"},
    "smollm3": {"sliding_window_pattern", "rope_local_base_freq"},
    "granite": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "granitemoehybrid": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "lfm2": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "qwen3_5_text": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq"},
    "falcon_h1": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq", "layer_types"},
    "nemotron_h": {"sliding_window_pattern", "rope_local_base_freq", "original_max_position_embeddings"},
    "bamba": {"sliding_window", "sliding_window_pattern", "rope_local_base_freq", "layer_types"},
}
"""Names of other families' fields that shared code looks for; nobody has shown that these families do not mind."""


class _Watched(config_fields.ConfigFields):
    """Fields that say which of them the parser asked for."""

    asked: set[str]

    def value(self, key: str) -> object:
        if not self._prefix:
            _Watched.asked.add(key)
        return super().value(key)


def asked_for(family: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Top-level fields that this family's parser uses, in two models of different kinds."""
    _Watched.asked = set()
    monkeypatch.setattr("backhand.nn.families.family_parsing.ConfigFields", _Watched)
    windowed: dict[str, Any] = {}
    if family in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
        windowed = {"use_sliding_window": True, "sliding_window": 8}
    if family == "exaone4":
        windowed = {"layer_types": None}
    for changes in ({}, windowed):
        decoder_config({**tiny_config(family).to_dict(), **changes})
    return _Watched.asked


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_transformers_is_used_neutral_or_in_the_way(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that a new transformers version declares fails here until somebody has looked at it."""
    declared = config_class(family)
    assert declared is not None
    classed = asked_for(family, monkeypatch) | set(NEUTRAL) | set(FIXED) | set(QUANTIZED)
    classed |= {"granitemoehybrid": {*OF_MAMBA, *WITHOUT_EXPERTS}, "nemotron_h": {*UNUSED_BY_NEMOTRON}}.get(
        family, set()
    )
    assert set(declared.fields) - classed == set()
    assert set(READ_OUTSIDE_CLASS) - classed == (_IN_THE_WAY | _IN_THE_WAY_OF[family]) - classed
    monkeypatch.undo()
    for key in sorted(set(READ_OUTSIDE_CLASS) - classed):
        with pytest.raises(UnsupportedModel, match=f"{key} = "):
            decoder_config({**tiny_config(family).to_dict(), key: 3})


def _attributes_read(family: str) -> tuple[type[transformers.PreTrainedConfig], set[str]]:
    """Names that transformers asks a config for while it makes a model and runs it in both modes."""
    config = tiny_config(family)
    known: type[transformers.PreTrainedConfig] = type(config)
    read: set[str] = set()

    def watch(self: object, name: str) -> object:
        read.add(name)
        return known.__getattribute__(self, name)

    watched = type(known.__name__, (known,), {"__getattribute__": watch, "__module__": known.__module__})
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    # torch's kernel has no cap of the scores, and no sinks.
    for attention in ("eager",) if family in ("gemma2", "gpt_oss") else ("eager", "sdpa"):
        own = watched(**values)
        own._attn_implementation = attention
        model = MODEL_FOR_CAUSAL_LM_MAPPING[known](own)
        ids = torch.arange(24).view(2, 12)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return known, read


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attribute_that_transformers_reads_is_known(family: str) -> None:
    known, read = _attributes_read(family)
    declared = config_class(family)
    assert declared is not None
    private = {"_attn_implementation_internal", "_experts_implementation_internal", "_output_attentions"}
    names = {name for name in read if not name.startswith("__")} - private
    assert {name for name in names if not declared.reads(name)} - {"_name_or_path"} == set()
    # What is not a field, and not a method or property of the class either, must be in the list.
    plain = {name for name in names if name not in declared.fields and not _is_code(known, name)}
    assert plain - READ_OUTSIDE_CLASS - set(NEUTRAL) - _OF_THE_CLASS - set(known.attribute_map) == set()


_OF_THE_CLASS = {"attribute_map", "sub_configs", "sub_configs_defaults", "ignore_keys_at_rope_validation"}
"""Attributes of configuration classes that no released config sets; one that does is refused."""


def _is_code(known: type, name: str) -> bool:
    found = inspect.getattr_static(known, name, None)
    return callable(found) or isinstance(found, property | classmethod | staticmethod) or name == "model_type"


def test_every_legacy_name_that_configs_are_converted_from_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that configuration classes take out of what they do not declare."""
    generation = set(transformers.GenerationConfig._get_default_generation_params())
    for family in FAMILIES:
        declared = config_class(family)
        assert declared is not None
        module = inspect.getmodule(type(tiny_config(family)))
        assert module is not None
        sources = [inspect.getsource(module), inspect.getsource(modeling_rope_utils.RotaryEmbeddingConfigMixin)]
        sources.append(inspect.getsource(transformers.PreTrainedConfig.__post_init__))
        taken = {key for text in sources for key in re.findall(r"kwargs\.(?:get|pop)\(\s*\"(\w+)\"", text)}
        known = set(NEUTRAL) | generation | asked_for(family, monkeypatch)
        known |= set(UNUSED_BY_NEMOTRON) if family == "nemotron_h" else set()
        assert {key for key in taken if not declared.reads(key)} - known == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_foreign_fields_are_noted_once_and_change_nothing(family: str) -> None:
    config = tiny_config(family).to_dict()
    plain = decoder_config(config)
    assert plain.notes == ()
    others = foreign(family)
    result = decoder_config({**config, **others})
    assert result == plain
    (note,) = result.notes
    # auto_map is neutral, and null says nothing.
    assert note.startswith(f"the configuration has {len(others) - 2} fields that no {family} model")
    assert "max_sequence_length" in note


@pytest.mark.parametrize("family", FAMILIES)
def test_foreign_fields_change_nothing_in_transformers(family: str) -> None:
    document = tiny_documents([11])[0]
    expected = full_logits(tiny_model(family), document)
    assert torch.equal(full_logits(tiny_model(family, **foreign(family)), document), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_have_the_defaults_of_the_class(family: str) -> None:
    """A config of nothing but its type is the model that transformers makes of it."""
    stated = {"num_local_experts": 0} if family == "granitemoehybrid" else {}  # the default has experts
    stated |= {"layers_block_type": ["mlp", "full_attention"]} if family == "nemotron_h" else {}
    default = transformers.AutoConfig.for_model(family, **stated)
    ours = decoder_config({"model_type": family, **stated})
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(default, name), name
    # LFM2's MLP is two thirds as wide as its config says, Granite 4's is that of shared experts.
    others = {"lfm2": 8192, "granitemoehybrid": 1024}
    assert ours.intermediate_size == others.get(family, default.intermediate_size)
    assert len(ours.layers) == default.num_hidden_layers
    assert ours.num_key_value_heads == default.num_key_value_heads
    eps = {"lfm2": "norm_eps", "nemotron_h": "layer_norm_epsilon"}.get(family, "rms_norm_eps")
    assert ours.norm_eps == getattr(default, eps)
    assert ours.tied_head == default.tie_word_embeddings
    default.allow_global_per_layer_attribute_access = True
    assert ours.head_dim == (getattr(default, "head_dim", None) or default.hidden_size // default.num_attention_heads)


def test_attention_dropout_is_noted() -> None:
    (note,) = decoder_config({**tiny_config("llama").to_dict(), "attention_dropout": 0.1}).notes
    assert note.startswith("attention_dropout = 0.1 stays off")


def test_names_of_rotary_parameters_are_those_of_transformers() -> None:
    declared = set(get_type_hints(modeling_rope_utils.RopeParameters))
    assert declared <= set(_READ_BY_A_RULE)


@pytest.mark.parametrize("rule", SCALING_RULES)
def test_what_a_rotary_rule_does_not_read_changes_nothing(rule: str) -> None:
    own: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 3.0},
        "proportional": {"factor": 3.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "longrope": {
            "short_factor": [1.5] * 7,
            "long_factor": [1.5] * 7,
            "attention_factor": 1.0,
            "original_max_position_embeddings": 16,
        },
        "yarn": {
            "factor": 8.0,
            "attention_factor": 1.1,
            "beta_fast": 1.0,
            "beta_slow": 0.01,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    }
    foreign: dict[str, Any] = {
        "factor": 5.0,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "mrope_section": [2, 2, 3],
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "short_factor": [2.5] * 7,
        "long_factor": [2.5] * 7,
        "something_new": 3,
    }
    others = {key: value for key, value in foreign.items() if key not in own[rule]}
    if rule == "longrope":
        del others["factor"]  # read where there is no attention_factor
    plain = {"rope_type": rule, "rope_theta": 1e4, **own[rule]}
    document = tiny_documents([11])[0]
    expected = full_logits(tiny_model("llama", rope_parameters=plain), document)
    assert torch.equal(full_logits(tiny_model("llama", rope_parameters={**plain, **others}), document), expected)
    config = tiny_config("llama").to_dict()
    ours = decoder_config({**config, "rope_parameters": {**plain, **others}})
    assert ours == decoder_config({**config, "rope_parameters": plain})
    (note,) = ours.notes
    assert "rope_parameters." in note
