from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import inject
from backhand.adapters.loading import source_digests
from backhand.adapters.record import AdapterRecord
from backhand.data.options import TemplateOptions
from backhand.errors import ArtifactError
from backhand.generation.completer import EngineCompleter, complete_greedily
from backhand.generation.loading import loaded_model
from backhand.generation.transformers_completer import TransformersCompleter
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.model_options import BaseModelOptions
from support.saved_adapters import load_adapter, save_adapter
from support.tiny_tokenizer import tiny_tokenizer

PROMPTS = [[5, 9, 40], [7, 100, 22, 60, 8]]


def options(directory: Path, **changes: object) -> BaseModelOptions:
    return BaseModelOptions(**{"model": str(directory), "dtype": "float32", **changes})


def greedy(completer: object) -> list[list[int]]:
    return complete_greedily(completer, PROMPTS, max_new_tokens=8, stop_ids=())


@pytest.fixture
def gpt2_directory(tmp_path: Path) -> Path:
    torch.manual_seed(8)
    config = transformers.GPT2Config(vocab_size=300, n_embd=24, n_layer=2, n_head=3, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_engine_and_transformers_answer_alike_with_and_without_the_adapter(
    model_directory: Path, adapter_directory: Path
) -> None:
    with loaded_model(options(model_directory), adapter_directory) as ours:
        assert isinstance(ours.model, EngineCompleter)
        adapted = greedy(ours.model)
        ours.model.use_adapter(False)
        base = greedy(ours.model)
        ours.model.use_adapter(True)
        assert greedy(ours.model) == adapted != base
    with loaded_model(options(model_directory, engine="transformers"), adapter_directory) as theirs:
        assert isinstance(theirs.model, TransformersCompleter)
        assert greedy(theirs.model) == adapted
        theirs.model.use_adapter(False)
        assert greedy(theirs.model) == base
    with loaded_model(options(model_directory)) as plain:
        assert greedy(plain.model) == base
        with pytest.raises(ValueError, match="no adapter"):
            plain.model.use_adapter(True)


def test_a_model_the_engine_does_not_know_goes_by_transformers_and_says_so(gpt2_directory: Path) -> None:
    with loaded_model(options(gpt2_directory)) as loaded:
        assert isinstance(loaded.model, TransformersCompleter)
        assert any("transformers computes this model" in note for note in loaded.notes)
    with (
        pytest.raises(UnsupportedModel),
        loaded_model(options(gpt2_directory, engine="backhand")),
    ):
        pass


def test_an_adapter_of_such_a_model(gpt2_directory: Path, tmp_path: Path) -> None:
    source = open_model(gpt2_directory)
    with loaded_model(options(gpt2_directory)) as loaded:
        assert isinstance(loaded.model, TransformersCompleter)
        base = greedy(loaded.model)
        adapter = inject(loaded.model.model, LoRAConfig(rank=3, alpha=30.0))
        for _, parameter in adapter.named_parameters():
            torch.nn.init.normal_(parameter)
        expected = greedy(loaded.model)
        names = [target.name for target in adapter.targets]
        record = AdapterRecord(**source_digests(source, names, chat_template=source.tokenizer().chat_template))
        assert record.base_digest is not None
        adapter.save(tmp_path / "adapter", record=record)
    with loaded_model(options(gpt2_directory), tmp_path / "adapter") as loaded:
        assert greedy(loaded.model) == expected != base
    with torch.no_grad():
        other = transformers.GPT2LMHeadModel.from_pretrained(gpt2_directory)
        other.transformer.h[0].attn.c_attn.weight.add_(0.1)
        other.save_pretrained(gpt2_directory)
    with (
        pytest.raises(ArtifactError, match="does not belong to this model"),
        loaded_model(options(gpt2_directory), tmp_path / "adapter"),
    ):
        pass


@pytest.fixture
def recorded_adapter(model_directory: Path, adapter_directory: Path, tmp_path: Path) -> Path:
    source = open_model(model_directory)
    loaded = load_adapter(adapter_directory, module_shapes(decoder_config(source.config)))
    digests = source_digests(
        source, [target.name for target in loaded.targets], chat_template=source.tokenizer().chat_template
    )
    return save_adapter(
        tmp_path / "recorded", loaded.config, loaded.parameters(), base_model=None, record=AdapterRecord(**digests)
    )


def test_the_adapter_must_belong_to_model_tokenizer_and_template(
    model_directory: Path, recorded_adapter: Path, tmp_path: Path
) -> None:
    with loaded_model(options(model_directory), recorded_adapter):
        pass
    with loaded_model(options(model_directory), recorded_adapter, template=TemplateOptions("none")):
        pass
    with (
        pytest.raises(ArtifactError, match="does not belong") as caught,
        loaded_model(options(model_directory), recorded_adapter, template=TemplateOptions("{{ messages }}")),
    ):
        pass
    assert "chat template" in (caught.value.why or "")

    other = shutil.copytree(model_directory, tmp_path / "other")
    model = transformers.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3
    model.save_pretrained(other)
    for engine in ("backhand", "transformers"):
        with (
            pytest.raises(ArtifactError, match="does not belong") as caught,
            loaded_model(options(other, engine=engine), recorded_adapter),
        ):
            pass
        assert "base model" in (caught.value.why or "")
        with loaded_model(options(other, engine=engine, force_base=True), recorded_adapter) as forced:
            assert any(note.startswith("used by force: base model") for note in forced.notes)


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_other_variables_of_the_template_are_said(
    model_directory: Path, recorded_adapter: Path, tmp_path: Path, engine: str
) -> None:
    record = json.loads((recorded_adapter / "backhand.json").read_text())
    for config, given, said in (
        ({}, {"enable_thinking": False}, False),  # says nothing of its rows
        ({"data.system": "x"}, {}, False),
        ({"data.system": "x"}, {"enable_thinking": False}, True),
        ({"data.template_args": {"enable_thinking": False}}, {"enable_thinking": False}, False),
        ({"data.template_args": {"enable_thinking": False}}, {}, True),
        ({"data.template_args": {"enable_thinking": False}}, None, False),
    ):
        directory = shutil.copytree(recorded_adapter, tmp_path / "other", dirs_exist_ok=True)
        (directory / "backhand.json").write_text(json.dumps(record | {"config": config}))
        asked = None if given is None else TemplateOptions(template_args=given)
        with loaded_model(options(model_directory, engine=engine), directory, template=asked) as loaded:
            notes = [note for note in loaded.notes if note.startswith("template_args: ")]
        assert bool(notes) == said


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_an_adapter_of_another_shape_is_refused(model_directory: Path, tmp_path: Path, engine: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    with (
        pytest.raises(ArtifactError, match="cannot be used"),
        loaded_model(options(model_directory, engine=engine), broken),
    ):
        pass


def test_threads_are_put_back(model_directory: Path) -> None:
    before = torch.get_num_threads()
    with loaded_model(options(model_directory, threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
