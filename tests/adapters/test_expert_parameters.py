"""Adapters of parameters that hold the matrices of all experts: PEFT's files both ways, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.peft_keys import slot_shapes
from backhand.adapters.targets import in_numbers, resolve_adapter
from backhand.arithmetic.adapter_factors import read_factors
from backhand.errors import ArtifactError, UsageError
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.lora_parameters import LoRAParameters, expert_factors
from tests.support.in_memory import InMemoryModel
from tests.support.parity import relative_error
from tests.support.saved_adapters import load_adapter, resolve_slots, save_adapter
from tests.support.tiny_models import (
    EXPERT_PARAMETERS,
    attach_lora,
    full_logits,
    tiny_config,
    tiny_documents,
    tiny_model,
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ATTENTION, "target_parameters": EXPERT_PARAMETERS},
    "by their last names": {"target_modules": ("q_proj",), "target_parameters": ("gate_up_proj", "down_proj")},
    "gate and up alone": {"target_modules": ("o_proj",), "target_parameters": ("mlp.experts.gate_up_proj",)},
    "down alone": {"target_modules": ("o_proj",), "target_parameters": ("experts.down_proj",)},
    "no module": {"target_modules": (), "target_parameters": EXPERT_PARAMETERS},
    "of one layer": {"target_modules": ("v_proj",), "target_parameters": ("model.layers.2.mlp.experts.down_proj",)},
    "layers of modules": {
        "target_modules": ("v_proj",),
        "layers_to_transform": (0,),
        "target_parameters": EXPERT_PARAMETERS,
    },
    "ranks and alphas": {
        "target_modules": ("q_proj",),
        "target_parameters": EXPERT_PARAMETERS,
        "rank_pattern": {"gate_up_proj": 7},
        "alpha_pattern": {"experts.down_proj": 3.0},
        "use_rslora": True,
    },
}


def ours(config: LoRAConfig, variant: str) -> tuple[Decoder, LoRAParameters]:
    model = tiny_model(variant)
    decoder = Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.float32)
    lora = LoRAParameters(resolve_slots(config, decoder.module_shapes()))
    lora.values.copy_(torch.randn(lora.element_count, generator=torch.Generator().manual_seed(3)) / 8)
    decoder.attach(lora)
    return decoder, lora


# PEFT looks for what patterns match among modules alone, and takes them for parameters all the same.
_PATTERNS = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


@_PATTERNS
@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_computes_the_same_from_our_files(name: str, variant: str, tmp_path: Path) -> None:
    config = LoRAConfig(rank=3, alpha=8.5, **CONFIGS[name])
    decoder, lora = ours(config, variant)
    save_adapter(tmp_path / "a", config, lora, base_model="some/base", module_names=list(decoder.module_shapes()))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_model(variant)), str(tmp_path / "a"))
    held = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert held.keys() == written.keys() and len(held) == 2 * len(lora.slots)
    assert all(torch.equal(held[key], written[key]) for key in held)
    document = tiny_documents([23])[0]
    base = full_logits(tiny_model(variant), document)
    found = full_logits(theirs, document)
    assert relative_error(decoder.logits(document), found) <= 1e-5
    assert relative_error(base, found) > 1e-3


@_PATTERNS
@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_the_same_from_pefts_files(name: str, variant: str, tmp_path: Path) -> None:
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in CONFIGS[name].items()}
    adapted = attach_lora(tiny_model(variant), rank=3, **expected)
    adapted.save_pretrained(str(tmp_path))
    decoder, _ = ours(LoRAConfig(), variant)
    loaded = load_adapter(tmp_path, decoder.module_shapes())
    decoder.attach(loaded.parameters())
    document = tiny_documents([23])[0]
    assert relative_error(decoder.logits(document), full_logits(adapted, document)) <= 1e-5
    assert {slot.name for slot in loaded.slots if slot.experts} == {
        name for name, what in loaded.beyond_factors.items() if "experts" in what
    }


def test_all_linear_leaves_the_experts_alone() -> None:
    shapes = module_shapes(decoder_config(tiny_config("qwen3_moe").to_dict()))
    names = [slot.name for slot in resolve_slots(LoRAConfig(), shapes)]
    assert {name.rpartition(".")[2] for name in names} == set(ATTENTION)
    both = resolve_slots(LoRAConfig(target_parameters=EXPERT_PARAMETERS), shapes)
    assert [slot.name for slot in both[: len(names)]] == names
    # Layer 1 of four has no experts.
    assert [slot.name for slot in both if slot.experts] == [
        f"model.layers.{layer}.{parameter}" for layer in (0, 2, 3) for parameter in EXPERT_PARAMETERS
    ]
    assert {(slot.experts, slot.out_features, slot.in_features) for slot in both if slot.experts} == {
        (11, 72, 60),
        (11, 60, 36),
    }


def test_layers_in_words_count_for_experts_too() -> None:
    shapes = module_shapes(decoder_config(tiny_config("qwen3_moe").to_dict()))
    config = LoRAConfig(target_modules=("q_proj",), target_parameters=EXPERT_PARAMETERS, layers="last:2")
    names = [slot.name for slot in resolve_slots(config, shapes)]
    assert {name.split(".")[2] for name in names} == {"2", "3"} and len(names) == 6
    numbered = in_numbers(config, names)
    assert [slot.name for slot in resolve_slots(numbered, shapes)] == names
    assert numbered.target_parameters == tuple(name for name in names if "experts" in name)


def test_where_the_experts_factors_lie() -> None:
    """As PEFT has it: expert by expert in lora_A's rows, by turns in lora_B's columns."""
    lora_A, lora_B = torch.arange(12.0).view(6, 2), torch.arange(30.0).view(5, 6)
    each_A, each_B = expert_factors(lora_A, lora_B, 3)
    for expert in range(3):
        assert torch.equal(each_A[expert], lora_A[2 * expert : 2 * expert + 2])
        assert torch.equal(each_B[expert], lora_B[:, expert::3])


def test_the_inner_wrapper_is_that_of_the_first_parameter() -> None:
    shapes = module_shapes(decoder_config(tiny_config("mixtral").to_dict()))
    slots = resolve_slots(LoRAConfig(target_modules=(), target_parameters=EXPERT_PARAMETERS), shapes)
    paths = {shape.name: shape.path for shape in slot_shapes(slots)}
    assert paths["model.layers.1.mlp.experts.gate_up_proj"] == "model.layers.1.mlp.experts.base_layer"
    assert paths["model.layers.1.mlp.experts.down_proj"] == "model.layers.1.mlp.experts"


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_has_not_for_experts_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="target_parameters"):
        LoRAConfig(target_parameters=EXPERT_PARAMETERS, **option).validate()


def test_a_parameter_that_is_none_is_named() -> None:
    shapes = module_shapes(decoder_config(tiny_config("mixtral").to_dict()))
    with pytest.raises(UsageError, match=r"gate_proj.*matches no module"):
        resolve_adapter(LoRAConfig(target_parameters=("experts.gate_proj",)), shapes)
    frozen = module_shapes(decoder_config(tiny_config("granite4-experts").to_dict()))
    for without in (frozen, {"model.layers.0.self_attn.q_proj": (3, 4)}):
        with pytest.raises(UsageError, match="no experts, or they stay frozen"):
            resolve_adapter(LoRAConfig(target_parameters=EXPERT_PARAMETERS), without)
    for held in ("mlp.gate", "experts.3.down_proj"):  # neither the router nor one expert's matrix
        with pytest.raises(UsageError, match="no gradient"):
            resolve_adapter(LoRAConfig(modules_to_save=(held,)), shapes)


def test_the_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    adapted = attach_lora(tiny_model("mixtral"))
    adapted.save_pretrained(str(tmp_path))
    shapes = module_shapes(decoder_config(tiny_config("mixtral", num_local_experts=4).to_dict()))
    with pytest.raises(UnusableAdapterError, match="by configuration and model"):
        load_adapter(tmp_path, shapes)


def test_a_tensor_of_one_expert_is_unexpected(tmp_path: Path) -> None:
    adapted = attach_lora(tiny_model("mixtral"))
    adapted.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.layers.0.mlp.experts.0.w1.lora_A.weight": torch.ones(5, 60)}, file)
    with pytest.raises(UnusableAdapterError, match=r"experts\.0\.w1"):
        load_adapter(tmp_path, module_shapes(decoder_config(tiny_config("mixtral").to_dict())))


def test_arithmetic_says_that_it_knows_modules_alone(tmp_path: Path) -> None:
    attach_lora(tiny_model("mixtral")).save_pretrained(str(tmp_path))
    with pytest.raises(ArtifactError, match="several experts"):
        read_factors(tmp_path)


def test_the_file_says_which_parameters(tmp_path: Path) -> None:
    config = LoRAConfig(rank=3, target_parameters=EXPERT_PARAMETERS)
    decoder, lora = ours(config, "qwen3_moe")
    save_adapter(tmp_path / "a", config, lora, base_model="some/base", module_names=list(decoder.module_shapes()))
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["target_parameters"] == sorted(EXPERT_PARAMETERS)
    assert written["target_modules"] == sorted(ATTENTION)
