"""Adapters of a text model inside an image model: PEFT's names for the whole, and for the text model alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError, read_adapter_directory
from backhand.adapters.loading import load_adapter_for, of_the_text_model
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_saving import in_wrapper
from backhand.adapters.targets import Target
from backhand.interop.command import export_command
from backhand.interop.options import ExportOptions
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.loading.wrappers import Wrapper
from backhand.training.run import train
from tests.support.tiny_models import full_logits, tiny_documents
from tests.support.tiny_run import TinyRun
from tests.support.tiny_wrappers import save_wrapper, tiny_wrapper

DOCUMENT = tiny_documents([17], vocab_size=299)[0]
WRAPPER = Wrapper("gemma3", "model.language_model")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _trained(kind: str, engine: str, tiny: TinyRun, tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    """A model directory and an adapter that a run has left."""
    model = save_wrapper(tiny_wrapper(kind), tmp_path / "model")
    options |= {"max_steps": 3, "learning_rate": 3e-2, "eval_data": (), "answers": 0}
    config = tiny.config(tmp_path / "run", model=str(model), engine=engine, **options)
    summary = train(config)
    assert summary.engine == ("backhand" if engine == "auto" else engine)
    return model, Path(summary.adapter)


def _adapted_logits(model: Path, adapter: Path) -> torch.Tensor:
    """By the decoder engine."""
    source = open_model(model)
    decoder = Decoder.from_source(source, dtype=torch.float32)
    loaded = load_adapter_for(source, adapter, decoder.module_shapes())
    decoder.attach(loaded.parameters())
    return decoder.logits(DOCUMENT)


def _under_peft(base: transformers.PreTrainedModel, adapter: Path) -> Any:
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    # Nothing but what the file holds is adapted: not the vision part, whose projections have the same names.
    there = {name for name in adapted.state_dict() if "lora_" in name}
    stored = load_file(adapter / "adapter_model.safetensors")
    assert there == {name.replace(".weight", ".default.weight") for name in stored}
    return adapted


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen3_5"])
def test_both_names_load_in_peft_with_equal_logits(kind: str, engine: str, tiny: TinyRun, tmp_path: Path) -> None:
    model, adapter = _trained(kind, engine, tiny, tmp_path)
    expected = _adapted_logits(model, adapter)
    base_logits = full_logits(transformers.AutoModelForImageTextToText.from_pretrained(model), DOCUMENT)
    assert _distance(expected, base_logits) > 1e-3  # something was learnt
    names = set(load_file(adapter / "adapter_model.safetensors"))
    attends = 3 if kind == "qwen3_5" else 0
    assert f"base_model.model.model.language_model.layers.{attends}.self_attn.q_proj.lora_A.weight" in names
    whole = _under_peft(transformers.AutoModelForImageTextToText.from_pretrained(model), adapter)
    assert _distance(full_logits(whole, DOCUMENT), expected) < 2e-5
    assert "AutoModelForImageTextToText" in (adapter / "README.md").read_text()

    alone = tmp_path / "alone"
    reported = ExportOptions(adapter=adapter, to="peft", model=str(model), quiet=True)
    export_command(replace(reported, output=alone, text_model=True))
    assert f"base_model.model.model.layers.{attends}.self_attn.q_proj.lora_A.weight" in set(
        load_file(alone / "adapter_model.safetensors")
    )
    source = open_model(model)
    text = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**source.config))
    text.load_state_dict({name: source.load(name) for name in source.tensor_names()}, strict=False)
    assert _distance(full_logits(_under_peft(text.eval(), alone), DOCUMENT), expected) < 2e-5
    # And what has the text model's names is one of the same model here.
    assert _distance(_adapted_logits(model, alone), expected) < 1e-6

    uniform = tmp_path / "uniform"
    export_command(replace(reported, output=uniform, uniform=True))
    again = _under_peft(transformers.AutoModelForImageTextToText.from_pretrained(model), uniform)
    assert _distance(full_logits(again, DOCUMENT), expected) < 2e-5


def test_a_run_goes_on_from_an_adapter_of_the_whole(tiny: TinyRun, tmp_path: Path) -> None:
    model, adapter = _trained("gemma3", "auto", tiny, tmp_path)
    config = tiny.config(tmp_path / "more", model=str(model), from_adapter=str(adapter), max_steps=1)
    summary = train(config)
    assert set(load_file(Path(summary.adapter) / "adapter_model.safetensors")) == set(
        load_file(adapter / "adapter_model.safetensors")
    )


def test_trained_heads_and_ranks_of_their_own(tiny: TinyRun, tmp_path: Path) -> None:
    options = {
        "target_modules": ("q_proj", "down_proj", "lm_head"),
        "rank_pattern": {"down_proj": 2},
        "layers_to_transform": (0, 2),
    }
    model, adapter = _trained("llava", "auto", tiny, tmp_path, **options)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"down_proj": 2}
    expected = _adapted_logits(model, adapter)
    whole = _under_peft(transformers.AutoModelForImageTextToText.from_pretrained(model), adapter)
    assert _distance(full_logits(whole, DOCUMENT), expected) < 2e-5


@pytest.mark.parametrize(
    "targets", [r"model\.language_model\..*\.(q_proj|up_proj)", r".*language_model.*\.(q_proj|up_proj)"]
)
@pytest.mark.parametrize("old", [False, True], ids=["names-of-today", "names-of-transformers-4"])
def test_an_adapter_that_peft_has_made_of_the_whole_is_read(targets: str, old: bool, tmp_path: Path) -> None:
    model = save_wrapper(tiny_wrapper("gemma3"), tmp_path / "model")
    base = transformers.AutoModelForImageTextToText.from_pretrained(model)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, rank_pattern={r"layers\.1\.mlp\.up_proj": 2})
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    if old:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        renamed = {
            name.replace("model.model.language_model.", "model.language_model.model."): tensor
            for name, tensor in load_file(file).items()
        }
        save_file(renamed, file)
    expected = full_logits(adapted, DOCUMENT)
    assert _distance(_adapted_logits(model, tmp_path / "adapter"), expected) < 2e-5


def test_an_adapter_of_the_image_part_too_is_refused(tmp_path: Path) -> None:
    model = save_wrapper(tiny_wrapper("gemma3"), tmp_path / "model")
    base = transformers.AutoModelForImageTextToText.from_pretrained(model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    source = open_model(model)
    shapes = Decoder.from_source(source, dtype=torch.float32).module_shapes()
    with pytest.raises(UnusableAdapterError, match="vision_tower"):
        load_adapter_for(source, tmp_path / "adapter", shapes)


def _written(names: list[str], module_names: list[str] | None) -> str | tuple[str, ...]:
    targets = [Target(name, 3, 5.0, 5 / 3) for name in names]
    config, renamed = in_wrapper(PEFTConfig(LoRAConfig()), targets, WRAPPER, module_names)
    assert [target.name for target in renamed] == [WRAPPER.wrapped_name(name) for name in names]
    return config.config.target_modules  # type: ignore[return-value]


def test_the_expression_picks_the_adapted_modules_alone() -> None:
    ends = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    every = [f"model.layers.{layer}.{end}" for layer in range(12) for end in ends]
    elsewhere = ["model.vision_tower.encoder.layers.0.self_attn.q_proj", "lm_head"]
    known = [WRAPPER.wrapped_name(name) for name in every] + elsewhere
    some = [name for name in every if "up_proj" not in name]
    cases = [every, some, [name for name in some if ".1." in name or ".11." in name], every[:4], [*some, "lm_head"]]
    for names in cases:
        for module_names in (every, None):
            written = _written(names, module_names)
            if isinstance(written, str):
                picked = [name for name in known if re.fullmatch(written, name)]
            else:
                picked = [name for name in known if any(name == one or name.endswith(f".{one}") for one in written)]
            assert picked == [WRAPPER.wrapped_name(name) for name in names]
    assert _written(every, every) == (
        r"model\.language_model\.layers\.\d+\.(?:mlp\.up_proj|self_attn\.q_proj|self_attn\.v_proj)"
    )


def test_an_adapter_of_a_plain_model_is_as_it_was(tiny: TinyRun, tmp_path: Path) -> None:
    summary = train(tiny.config(tmp_path / "run", max_steps=1))
    contents = read_adapter_directory(summary.adapter)
    assert contents.tensors and of_the_text_model(contents) is contents
