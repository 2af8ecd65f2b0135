"""Adapters of PEFT and of training are read module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from backhand.arithmetic.adapter_factors import base_weight, read_factors
from backhand.arithmetic.module_paths import kind_of, layer_of
from backhand.errors import ArtifactError
from backhand.nn.loading import open_model
from support.tiny_models import save_tiny, tiny_model

pytestmark = pytest.mark.filterwarnings(  # PEFT about itself and about transformers
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning"
)


@pytest.fixture
def base(tmp_path: Path) -> nn.Module:
    model = tiny_model("llama")
    save_tiny(model, tmp_path / "model")
    return model


def saved(model: nn.Module, directory: Path, **options: Any) -> Any:
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]} | options))
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(directory)
    return adapted


def test_factors_and_scaling_give_pefts_own_update(base: nn.Module, tmp_path: Path) -> None:
    adapted = saved(
        base, tmp_path / "theirs", rank_pattern={"up_proj": 5}, alpha_pattern={"q_proj": 9}, use_rslora=True
    )
    read = read_factors(tmp_path / "theirs")
    assert len(read.modules) == 6 and read.label == "theirs, rank 3/5"
    for name, factors in read.modules.items():
        theirs = adapted.base_model.model.get_submodule(name).get_delta_weight("default")
        ours = factors.scaling * factors.lora_B @ factors.lora_A
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert read.element_count == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert read.stored_bytes == (tmp_path / "theirs" / "adapter_model.safetensors").stat().st_size


def test_weights_have_the_updates_shape_also_for_embedding_and_head(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head", "down_proj"])
    read = read_factors(tmp_path / "adapter")
    source = open_model(tmp_path / "model")
    for name, factors in read.modules.items():
        assert factors.embedding == (name == "model.embed_tokens")
        weight = base_weight(source, name, factors)
        assert weight.shape == (factors.lora_B.shape[0], factors.lora_A.shape[1])


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    save_tiny(model, tmp_path / "model")
    with pytest.warns(UserWarning, match="tied"):
        saved(model, tmp_path / "adapter", target_modules=["lm_head"])
    read = read_factors(tmp_path / "adapter")
    source = open_model(tmp_path / "model")
    assert torch.equal(
        base_weight(source, "lm_head", read.modules["lm_head"]), source.load("model.embed_tokens.weight")
    )


def test_another_base_is_refused(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    save_tiny(tiny_model("llama", hidden_size=48), tmp_path / "other")
    read = read_factors(tmp_path / "adapter")
    name = next(iter(read.modules))
    with pytest.raises(ArtifactError, match="the base model has"):
        base_weight(open_model(tmp_path / "other"), name, read.modules[name])


def test_convolutions_are_matrices(tmp_path: Path) -> None:
    saved(nn.Sequential(nn.Conv2d(4, 6, 3)), tmp_path / "adapter", target_modules=["0"])
    (factors,) = read_factors(tmp_path / "adapter").modules.values()
    assert factors.lora_A.shape == (3, 4 * 9) and factors.lora_B.shape == (6, 3)


def test_names_of_runs_and_of_modules(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path / "my-run" / "adapter")
    assert read_factors(tmp_path / "my-run" / "adapter").label == "my-run, rank 3"
    assert kind_of("model.layers.12.self_attn.q_proj") == "q_proj"
    assert layer_of("model.layers.12.self_attn.q_proj") == 12
    assert layer_of("lm_head") is None


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        read_factors(tmp_path)
