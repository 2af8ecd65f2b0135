"""Inverse frequencies equal those of transformers bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backhand.nn.families.family import RotaryConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.families.rotary_frequencies import inverse_frequencies, llama3_factors
from tests.support.tiny_models import ORIGINAL_LENGTH, tiny_model

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_YARN = {
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": True,
}


def _rotary_config(parameters: dict[str, Any]) -> RotaryConfig:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    theta = values.pop("rope_theta")
    return RotaryConfig(theta, tuple(values.items()) if values["rope_type"] != "default" else None)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "yarn", "rope_theta": 10000.0, **_YARN},
        {"rope_type": "yarn", "rope_theta": 500.0, **_YARN, "beta_fast": 3.0, "beta_slow": 0.2, "truncate": False},
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.7},
        {"rope_type": "llama3", "rope_theta": 500000.0, **_LLAMA3},
        {"rope_type": "llama3", "rope_theta": 500.0, **_LLAMA3, "original_max_position_embeddings": ORIGINAL_LENGTH},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + j / 3 for j in range(32)],
            "long_factor": [1.0 + j / 3 for j in range(32)],
            "attention_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["yarn", "yarn-not-truncated", "default", "base-1e6", "linear", "llama3", "llama3-short", "longrope"],
)
def test_equal_to_transformers(parameters: dict[str, Any]) -> None:
    model = tiny_model("llama", head_dim=64, rope_parameters=parameters)
    expected = model.model.rotary_emb.inv_freq
    frequencies = inverse_frequencies(_rotary_config(parameters), 64)
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, expected)


def test_gemma_local_and_global_bases_equal_transformers() -> None:
    model = tiny_model("gemma3_text")
    rotary = model.model.rotary_emb
    head_dim = model.config.head_dim
    for layer_type, parameters in model.config.rope_parameters.items():
        frequencies = inverse_frequencies(_rotary_config(parameters), head_dim)
        assert torch.equal(frequencies, getattr(rotary, f"{layer_type}_inv_freq"))


@pytest.mark.parametrize(
    "stated",
    [
        {"factor": 4.0},
        {"factor": 0.5},
        {"factor": None, "original_max_position_embeddings": ORIGINAL_LENGTH},
        {"factor": 4.0, "attention_factor": 1.7},
        {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4},
        {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0},
        {"factor": 4.0, "beta_fast": 0, "beta_slow": None},
    ],
    ids=str,
)
def test_yarn_as_configs_state_it_equals_transformers(stated: dict[str, Any]) -> None:
    """Frequencies, and by how much queries and keys are lengthened."""
    model = tiny_model("qwen3", rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, **stated})
    (ours,) = decoder_config(model.config.to_dict()).rotary
    assert torch.equal(inverse_frequencies(ours, model.config.head_dim), model.model.rotary_emb.inv_freq)
    assert ours.attention_factor == model.model.rotary_emb.attention_scaling


def test_llama3_rule_uses_all_three_regimes() -> None:
    factors = llama3_factors(500000.0, 64, _LLAMA3)
    assert factors.min() == 1.0
    assert factors.max() == 8.0
    assert ((factors > 1.01) & (factors < 7.99)).any()


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="dynamic"):
        inverse_frequencies(RotaryConfig(1e4, (("rope_type", "dynamic"),)), 8)
