"""Adapters of PEFT and of training are read module by module."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from backhand.adapters.contents import UnusableAdapterError
from backhand.arithmetic.adapter_factors import base_weight, read_factors
from backhand.arithmetic.findings import kind_of, layer_of
from backhand.errors import ArtifactError
from backhand.nn.loading import open_model
from tests.support.tiny_models import save_tiny, tiny_model

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
    for name, label in (("rank3", "rank3"), ("sin-rank-3", "sin-rank-3"), ("rank13", "rank13, rank 3")):
        shutil.copytree(tmp_path / "my-run", tmp_path / name)
        assert read_factors(tmp_path / name / "adapter").label == label
    assert kind_of("model.layers.12.self_attn.q_proj") == "q_proj"
    assert layer_of("model.layers.12.self_attn.q_proj") == 12
    assert layer_of("lm_head") is None


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        read_factors(tmp_path)


def test_what_file_and_configuration_disagree_on_is_said_without_a_model(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    layer = "base_model.model.model.layers.{}.{}"
    wide = layer.format(0, "self_attn.q_proj")
    tensors[f"{wide}.lora_A.weight"] = torch.ones(4, 60)
    tensors[f"{wide}.lora_B.weight"] = torch.ones(84, 4)
    odd = layer.format(1, "self_attn.q_proj")
    tensors[f"{odd}.lora_B.weight"] = torch.ones(84, 2)
    flat = layer.format(2, "self_attn.q_proj")
    tensors[f"{flat}.lora_A.weight"] = torch.ones(60)
    extra = layer.format(0, "self_attn.v_proj")
    tensors[f"{extra}.lora_A.weight"] = torch.ones(3, 60)
    tensors[f"{extra}.lora_B.weight"] = torch.ones(28, 3)
    save_file(tensors, file)
    with pytest.raises(UnusableAdapterError) as caught:
        read_factors(tmp_path / "adapter")
    problems = sorted(problem.removeprefix("model.layers.") for problem in caught.value.problems)
    assert problems == [
        "0.self_attn.q_proj: rank 4 in the file, 3 by the configuration",
        "0.self_attn.v_proj: the configuration does not adapt this module",
        "1.self_attn.q_proj: lora_A (3, 60) and lora_B (84, 2) do not belong together",
        "2.self_attn.q_proj: lora_A (60,) and lora_B (84, 3) do not belong together",
    ]


def test_everything_in_the_file_is_accounted_for(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    read = read_factors(tmp_path / "adapter")
    assert list(read.others) == ["base_model.model.lm_head.base_layer.weight"]
    assert sum(read.part_bytes.values()) == 4 * (read.element_count + read.others[next(iter(read.others))].numel())
    header = 8 + int.from_bytes((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert read.stored_bytes == header + sum(read.part_bytes.values())
