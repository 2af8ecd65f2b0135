"""Target resolution, each case against what PEFT itself adapts on a tiny transformers model."""

from __future__ import annotations

from functools import cache
from typing import Any

import peft
import pytest
import transformers
from torch import nn

from backhand.adapters.config import LoRAConfig
from backhand.errors import UsageError
from tests.support.saved_adapters import resolve_slots
from tests.support.tiny_models import tiny_model


def build(kind: str) -> nn.Module:
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
        )
        return transformers.BertForSequenceClassification(config)
    return tiny_model(kind)


@cache
def shapes(kind: str) -> dict[str, tuple[int, int]]:
    linears = {name: module for name, module in build(kind).named_modules() if isinstance(module, nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in linears.items()}


def in_peft(kind: str, **fields: Any) -> dict[str, tuple[int, float]]:
    """What PEFT adapts: rank and scaling of each module."""
    model = peft.get_peft_model(build(kind), peft.LoraConfig(**fields))  # type: ignore[arg-type]
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"target_modules": "all-linear"}),
    ("gemma3_text", {}, {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ("q_proj", "v_proj")}, {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ("lm_head", "up_proj")}, {"target_modules": ["lm_head", "up_proj"]}),
    ("llama", {"target_modules": ("mlp.up_proj",)}, {"target_modules": ["mlp.up_proj"]}),
    (
        "llama",
        {"target_modules": ("model.layers.1.self_attn.q_proj", "down_proj")},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "down_proj"]},
    ),
    (
        "llama",
        {"target_modules": r".*layers\.[02]\..*_proj"},
        {"target_modules": r".*layers\.[02]\..*_proj"},
    ),
    (
        "llama",
        {"exclude_modules": ("q_proj", "model.layers.0.mlp.up_proj")},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "model.layers.0.mlp.up_proj"]},
    ),
    (
        "qwen3",
        {"exclude_modules": r".*\.1\..*"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    ),
    (
        "llama",
        {"target_modules": ("q_proj",), "layers_to_transform": (0, 2)},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    ),
    (
        "bert",
        {"target_modules": ("query", "dense"), "layers_to_transform": (1,), "layers_pattern": ("layer",)},
        {"target_modules": ["query", "dense"], "layers_to_transform": 1, "layers_pattern": "layer"},
    ),
    ("bert", {"target_modules": ("output.dense",)}, {"target_modules": ["output.dense"]}),
    (
        "llama",
        {
            "rank_pattern": {r"layers\.0\..*": 3, "q_proj": 7, r"^model\.layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"q_proj": 5, r".*v_proj": 11, r"model.layers.2.*": 13},
        },
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.0\..*": 3, "q_proj": 7, r"^model\.layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"q_proj": 5, r".*v_proj": 11, r"model.layers.2.*": 13},
        },
    ),
    (
        "llama",
        {"use_rslora": True, "rank_pattern": {"o_proj": 4}},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"o_proj": 4}},
    ),
]


@pytest.mark.parametrize(("kind", "ours", "theirs"), CASES)
def test_the_same_modules_as_in_peft(kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    config = LoRAConfig(rank=5, alpha=8, **ours)
    heads = ("lm_head",) if kind != "bert" else ()
    slots = resolve_slots(config, shapes(kind), heads=heads)
    assert {slot.name: (slot.rank, slot.scaling) for slot in slots} == in_peft(kind, r=5, lora_alpha=8, **theirs)
    for slot in slots:
        assert (slot.out_features, slot.in_features) == shapes(kind)[slot.name]


def test_slots_keep_the_order_of_the_model_and_carry_the_dropout() -> None:
    slots = resolve_slots(LoRAConfig(target_modules=("v_proj", "q_proj"), dropout=0.25), shapes("llama"))
    names = [slot.name for slot in slots]
    assert names == [name for name in shapes("llama") if name.endswith(("q_proj", "v_proj"))]
    assert all(slot.dropout == 0.25 for slot in slots)


def test_all_linear_applies_to_chosen_layers() -> None:
    slots = resolve_slots(LoRAConfig(layers_to_transform=(1,)), shapes("llama"))
    assert {slot.name.split(".")[2] for slot in slots} == {"1"} and len(slots) == 7


@pytest.mark.parametrize(
    ("fields", "where", "shown"),
    [
        ({"target_modules": ("q_poj",)}, "target_modules", "q_proj"),
        ({"target_modules": ("q_proj", "nothing_at_all")}, "target_modules", "nothing_at_all"),
        ({"target_modules": ("proj",)}, "target_modules", "'proj' matches no module"),
        ({"target_modules": "q_proj"}, "target_modules", "regular expression must match the whole path"),
        ({"target_modules": "("}, "target_modules", "not a regular expression"),
        ({"exclude_modules": ("q_pro",)}, "exclude_modules", "q_proj"),
        ({"exclude_modules": ".*"}, "target_modules", "leaves no module"),
        ({"rank_pattern": {"q_pro": 4}}, "rank_pattern", "q_proj"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern", "not a regular expression"),
        ({"target_modules": ("v_proj",), "rank_pattern": {"q_proj": 4}}, "rank_pattern", "adapted module"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern", "lm_head"),
        ({"layers_to_transform": (1, 9)}, "layers_to_transform", "layers are 0 to 2"),
        ({"rank": 0}, "rank", "0"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(
    fields: dict[str, Any], where: str, shown: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_slots(LoRAConfig(**fields), shapes("llama"))
    assert caught.value.where == where
    assert shown in str(caught.value)


def test_a_model_without_modules_is_an_error() -> None:
    with pytest.raises(UsageError, match="no module"):
        resolve_slots(LoRAConfig(), {})
