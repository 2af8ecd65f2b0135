"""A token's time in training, from the time of a small model's step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.families.family_parsing import decoder_config
from backhand.training import models_command as models
from backhand.training.models_command import TokenSeconds, multiplications
from tests.support.tiny_models import tiny_config


def test_time_follows_the_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(models, "fastest", lambda models, *_: measured.append(models[0].config) or [2.0])
    here = TokenSeconds(torch.float32)
    found = []
    for family in ("llama", "qwen3_moe"):
        config = decoder_config(tiny_config(family, num_hidden_layers=4).to_dict())
        found.append(here.of(config) / multiplications(config))
    (small,) = measured
    assert found == pytest.approx([2.0 / 1024 / multiplications(small)] * 2), "measured once"


def test_layers_count_by_their_own_sizes_and_experts_as_far_as_they_are_chosen() -> None:
    """Every matrix of a model of several kinds of layers, of experts the chosen part of each stack."""
    for family in (
        "lfm2",
        "qwen3_5_text",
        "bamba",
        "nemotron_h",
        "qwen3_moe",
        "mixtral",
        "gpt_oss",
        "granite4-experts",
    ):
        config = decoder_config(tiny_config(family).to_dict())
        expected, of_experts = config.vocab_size * config.hidden_size, 0
        for name, view in named_views(empty_weights(config, torch.float32, "meta"), config):
            if name.startswith("model.layers.") and len(view.shape) == 2:
                expected += 0 if ".experts." in name else math.prod(view.shape)
                of_experts += math.prod(view.shape) if ".experts." in name else 0
        if config.mixture is not None:
            expected += of_experts * config.mixture.chosen // config.mixture.experts
        assert multiplications(config) == expected, family
