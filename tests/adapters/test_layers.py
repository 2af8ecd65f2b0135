"""Which layers are adapted, in words: the same modules as by their numbers, in files that PEFT reads."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import safetensors.torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import inject
from backhand.adapters.injection_plan import plan_injection
from backhand.adapters.targets import in_numbers, resolve_targets
from backhand.errors import UsageError
from backhand.training.run import train
from tests.support.tiny_models import tiny_model
from tests.support.tiny_run import TinyRun

NAMES = [f"model.layers.{layer}.{part}" for layer in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("last:3", [9, 10, 11]),
        ("first:2", [0, 1]),
        ("4-6", [4, 5, 6]),
        ("7", [7]),
        ("0, last:1, 4-5,4", [0, 4, 5, 11]),
        ("last:12", list(range(12))),
    ],
)
def test_words_and_numbers_pick_the_same(words: str, layers: list[int]) -> None:
    config = LoRAConfig(layers=words, target_modules=("q_proj", "up_proj"))
    picked = [target.name for target in resolve_targets(config, NAMES)]
    assert picked == [name for name in NAMES if int(name.split(".")[2]) in layers]
    numbered = in_numbers(config, picked)
    assert (numbered.layers, numbered.layers_to_transform) == ("", tuple(layers))
    assert [target.name for target in resolve_targets(numbered, NAMES)] == picked


@pytest.mark.parametrize("words", ["last:13", "first:13", "12", "11-12", "3-2"])
def test_layers_that_are_not_there(words: str) -> None:
    with pytest.raises(UsageError, match="layers are 0 to 11") as caught:
        resolve_targets(LoRAConfig(layers=words), NAMES)
    assert caught.value.where == "layers"


def test_injected_and_saved_as_numbers(tmp_path: Path) -> None:
    adapter = inject(tiny_model("llama"), LoRAConfig(layers="last:1", target_modules=("q_proj",)))
    assert {name.split(".")[2] for name in adapter.modules} == {"2"}
    adapter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["layers_to_transform"] == [2]


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_a_run_stores_the_numbers(tmp_path: Path, engine: str) -> None:
    run = tmp_path / "run"
    train(TinyRun(tmp_path).config(run, layers="last:1", max_steps=1, engine=engine))
    stored = tomllib.loads((run / "config.toml").read_text())["adapter"]
    assert stored["layers_to_transform"] == [1] and not stored.get("layers")
    factors = safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
    assert {key.split(".")[4] for key in factors} == {"1"}


def test_a_model_without_weights_is_refused_and_its_layout_known() -> None:
    empty = tiny_model("llama").to("meta")
    with pytest.raises(UsageError, match="cannot be adapted") as caught:
        inject(empty, LoRAConfig(target_modules=("q_proj",)))
    assert "meta device" in str(caught.value)
    layout = plan_injection(empty, LoRAConfig(rank=3, layers="last:1"), None, skeleton=True).layout
    assert layout == plan_injection(tiny_model("llama"), LoRAConfig(rank=3, layers="last:1"), None).layout
