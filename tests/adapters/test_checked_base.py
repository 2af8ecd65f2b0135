"""An adapter knows its base by digests, and, as PEFT stores it, by copies of whole base weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.loading import check_source, load_adapter_for, source_digests, weight_names
from backhand.adapters.record import AdapterRecord
from backhand.errors import ArtifactError
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.saved_adapters import resolve_slots, save_adapter
from tests.support.tiny_models import save_tiny, tiny_model


def shapes_of(source: ModelSource) -> dict[str, tuple[int, int]]:
    return module_shapes(decoder_config(source.config))


def saved_for(source: ModelSource, directory: Path, targets: tuple[str, ...]) -> Path:
    config = LoRAConfig(rank=2, target_modules=targets)
    parameters = LoRAParameters(resolve_slots(config, shapes_of(source)))
    parameters.values.normal_()
    record = AdapterRecord(origin="here", **source_digests(source, parameters.slots, chat_template="{{ a }}"))
    return save_adapter(directory, config, parameters, base_model=None, record=record)


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("llama-tied")


@pytest.fixture
def source(model: nn.Module, tmp_path: Path) -> ModelSource:
    return open_model(save_tiny(model, tmp_path / "model"))


def nudged(model: nn.Module, parameter: str, directory: Path) -> ModelSource:
    """The same model, one element of one weight the next number up."""
    other = copy.deepcopy(model)
    weight = other.get_parameter(parameter)
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(torch.inf))
    return open_model(save_tiny(other, directory))


@pytest.mark.parametrize(
    ("targets", "parameter"),
    [
        (("q_proj",), "model.layers.1.self_attn.q_proj.weight"),
        (("lm_head",), "model.embed_tokens.weight"),  # a tied head has no weight of its own in the file
    ],
)
def test_one_bit_of_an_adapted_weight_makes_another_base(
    targets: tuple[str, ...], parameter: str, model: nn.Module, source: ModelSource, tmp_path: Path
) -> None:
    adapter = saved_for(source, tmp_path / "a", targets)
    assert load_adapter_for(source, adapter, shapes_of(source)).notes == ()
    other = nudged(model, parameter, tmp_path / "other")
    with pytest.raises(ArtifactError, match="does not belong") as caught:
        load_adapter_for(other, adapter, shapes_of(other))
    assert (caught.value.why or "").startswith("base model: ") and "trained on here" in (caught.value.why or "")
    forced = load_adapter_for(other, adapter, shapes_of(other), force_base=True)
    assert len(forced.notes) == 1 and forced.notes[0].startswith("used by force: base model: ")


def test_a_weight_that_is_not_adapted_may_differ(model: nn.Module, source: ModelSource, tmp_path: Path) -> None:
    adapter = saved_for(source, tmp_path / "a", ("q_proj",))
    other = nudged(model, "model.layers.1.mlp.up_proj.weight", tmp_path / "other")
    load_adapter_for(other, adapter, shapes_of(other))


def test_everything_that_differs_is_said_at_once(model: nn.Module, source: ModelSource, tmp_path: Path) -> None:
    loaded = load_adapter_for(source, saved_for(source, tmp_path / "a", ("q_proj",)), shapes_of(source))
    assert loaded.record is not None
    record = replace(loaded.record, tokenizer_digest="sha256:0")
    other = nudged(model, "model.layers.0.self_attn.q_proj.weight", tmp_path / "other")
    names = [target.name for target in loaded.targets]
    copies = {"model.layers.0.self_attn.v_proj": torch.zeros(28, 60)}
    with pytest.raises(ArtifactError) as caught:
        check_source(record, "here", other, names, chat_template="{{ b }}", base_copies=copies)
    why = caught.value.why or ""
    assert [part.split(":")[0] for part in why.split("; ")][:3] == ["base model", "tokenizer", "chat template"]
    assert "v_proj: the file holds a base weight of its own" in why
    forced = check_source(record, "here", other, names, chat_template="{{ b }}", base_copies=copies, force_base=True)
    assert len(forced) == 4 and all(note.startswith("used by force: ") for note in forced)
    assert check_source(None, "here", other, names, chat_template="{{ b }}") == ()


def test_a_copy_of_the_head_by_peft_must_be_the_models(tmp_path: Path) -> None:
    """PEFT writes no digests, but the whole weight in addition to the factors of a head."""
    model = tiny_model("llama")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path / "theirs"))
    source = open_model(save_tiny(model, tmp_path / "model"))
    loaded = load_adapter_for(source, tmp_path / "theirs", shapes_of(source))
    assert list(loaded.base_copies) == ["lm_head"] and loaded.record is None
    other = nudged(model, "lm_head.weight", tmp_path / "other")
    with pytest.raises(ArtifactError, match="does not belong") as caught:
        load_adapter_for(other, tmp_path / "theirs", shapes_of(other))
    assert "lm_head: the file holds a base weight of its own" in (caught.value.why or "")
    forced = load_adapter_for(other, tmp_path / "theirs", shapes_of(other), force_base=True)
    assert "used by force: lm_head" in forced.notes[0]


def test_names_in_files_that_leave_out_the_beginning_of_a_path() -> None:
    there = ["h.0.attn.c_attn.weight", "wte.weight", "weight"]
    modules = ["transformer.h.0.attn.c_attn", "transformer.h.9.attn.c_attn", "lm_head", "weight"]
    assert list(weight_names(modules, there)) == ["h.0.attn.c_attn.weight", "wte.weight"]
    assert list(weight_names(["lm_head"], [*there, "lm_head.weight"])) == ["lm_head.weight"]
