"""The parsed configuration of the base belongs to its identity, in every kind of file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from backhand.adapters.record import AdapterRecord, read_record, record_bytes
from backhand.cli.main import main
from backhand.errors import UsageError
from backhand.nn.decoder.config_facts import config_differences, config_facts
from backhand.nn.loading import open_model
from backhand.options.config import TrainConfig
from backhand.runs.checkpoint import load_checkpoint, manifest_bytes
from backhand.training.run import train
from tests.support.tiny_gguf import rewritten, write_tiny_gguf
from tests.support.tiny_models import VOCAB_SIZE, save_tiny, tiny_model
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options
from tests.support.tiny_tokenizer import tiny_tokenizer


def edited(model: Path, **changes: Any) -> Path:
    """Change fields of the model's config.json in place, rotary parameters by their own names."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        within = config["rope_parameters"] if name.startswith("rope_") else config
        assert within.get(name) != value
        within[name] = value
    file.write_text(json.dumps(config))
    return model


def stopped_run(tiny: TinyRun, model: Path, output: Path, **options: Any) -> TrainConfig:
    config = tiny.config(output, model=str(model), save_every=1, **options)
    with pytest.raises(StopAfter.Stopped):
        train(config, callbacks=[StopAfter(3)])
    return config


def resume(output: Path, **options: Any) -> Any:
    return train(with_options(TrainConfig(), output=output, resume=True, quiet=True, **options))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 0.1}, "norm_eps: 1e-05 -> 0.1"),
        ({"rope_theta": 500.0}, r"rotary\.0\.theta: 100000\.0 -> 500\.0"),
        ({"rms_norm_eps": 0.1, "rope_theta": 500.0}, r"norm_eps: 1e-05 -> 0\.1, rotary\.0\.theta: 100000\.0 -> 500\.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_run_does_not_resume_on_another_configuration(
    tiny: TinyRun, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    stopped_run(tiny, model, tmp_path / "run")
    edited(model, **change)
    with pytest.raises(UsageError, match=rf"base model: its configuration .*: {said}") as refused:
        resume(tmp_path / "run")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("key", ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"])
def test_a_run_does_not_resume_on_other_metadata_of_a_gguf_file(tiny: TinyRun, tmp_path: Path, key: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    model = write_tiny_gguf(tiny_model("llama", num_hidden_layers=2, **sizes), tmp_path / "tiny.gguf")
    stopped_run(tiny, model, tmp_path / "run")
    rewritten(model, tmp_path / "other.gguf", changed={key: 0.25}).replace(model)
    with pytest.raises(UsageError, match=r"its configuration .*: \S+: \S+ -> 0\.25"):
        resume(tmp_path / "run")


def test_a_run_of_transformers_does_not_resume_on_another_configuration(tiny: TinyRun, tmp_path: Path) -> None:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=24, n_layer=2, n_head=3, n_positions=256, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    stopped_run(tiny, tmp_path / "model", tmp_path / "run")
    file = tmp_path / "model" / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"transformers_version": "4.0", "_name_or_path": "elsewhere"}))
    assert resume(tmp_path / "run").steps == 6, "a volatile field is no difference"
    stopped_run(tiny, tmp_path / "model", tmp_path / "again")
    file.write_text(json.dumps(stored | {"layer_norm_epsilon": 0.1}))
    with pytest.raises(UsageError, match=r"layer_norm_epsilon: 1e-05 -> 0\.1"):
        resume(tmp_path / "again")


def test_force_goes_on_with_another_configuration_and_says_so(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    stopped_run(tiny, model, tmp_path / "run")
    edited(model, rms_norm_eps=0.1)
    forced = with_options(TrainConfig(), output=tmp_path / "run", resume=True, force_base=True)
    assert train(forced).steps == 6
    assert "norm_eps: 1e-05 -> 0.1; continuing all the same, as --force-base says" in capsys.readouterr().err


def test_a_checkpoint_without_the_configuration_is_resumed(tiny: TinyRun, tmp_path: Path) -> None:
    stopped_run(tiny, tiny.model, tmp_path / "run")
    for directory in (tmp_path / "run" / "checkpoints").glob("step-*"):
        old = load_checkpoint(directory, int(directory.name.removeprefix("step-")))
        facts = {name: value for name, value in old.facts.items() if name != "model_config"}
        assert len(facts) == len(old.facts) - 1
        (directory / "manifest.json").write_bytes(manifest_bytes(old.step, old.contents, facts))
    resume(tmp_path / "run")
    train(tiny.config(tmp_path / "straight", save_every=1))
    assert final_bits(tmp_path / "run")["state"] == final_bits(tmp_path / "straight")["state"]


@pytest.fixture(scope="module")
def trained(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    train(tiny.config(output))
    return output / "adapter"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "the user", "--max-new-tokens", "1"],
        ["generate", "--prompt", "the user", "--max-new-tokens", "1", "--engine", "transformers"],
        ["evaluate", "--data", "ROWS", "--json"],
        ["merge", "--output", "OUTPUT"],
        ["export", "--to", "peft", "--output", "OUTPUT"],
    ],
    ids=["generate", "transformers", "evaluate", "merge", "export"],
)
def test_an_adapter_on_a_base_of_another_configuration_is_noted(
    command: list[str], tiny: TinyRun, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"ROWS": str(tiny.held_out), "OUTPUT": str(tmp_path / "out")}
    given = [words.get(word, word) for word in command]
    model = shutil.copytree(tiny.model, tmp_path / "model")
    note = "its configuration is not what the adapter was trained with: norm_eps: 1e-05 -> 0.1"
    for changes, there in (({}, False), ({"rms_norm_eps": 0.1}, True)):
        edited(model, **changes)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code = main([given[0], "--model", str(model), "--adapter", str(trained), *given[1:]])
        error = " ".join(capsys.readouterr().err.split())
        assert code == 0, error
        assert (note in error) == there


def test_chat_notes_another_configuration(
    tiny: TinyRun,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(*_: object) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    model = edited(shutil.copytree(tiny.model, tmp_path / "model"), rope_theta=500.0)
    assert main(["chat", "--model", str(model), "--adapter", str(trained)]) == 0
    assert "rotary.0.theta: 100000.0 -> 500.0" in " ".join(capsys.readouterr().err.split())


def test_an_adapters_record_without_a_configuration_is_read(tiny: TinyRun, trained: Path, tmp_path: Path) -> None:
    record = json.loads((trained / "backhand.json").read_text())
    assert record["model_config"]["norm_eps"] == 1e-5
    assert not any("eos" in name or "padding" in name for name in record["model_config"])
    del record["model_config"]
    assert read_record(record, "backhand.json").model_config == {}
    assert "model_config" not in json.loads(record_bytes(AdapterRecord()))
    old = shutil.copytree(trained, tmp_path / "old")
    (old / "backhand.json").write_text(json.dumps(record))
    model = edited(shutil.copytree(tiny.model, tmp_path / "model"), rms_norm_eps=0.1)
    assert (
        main(["generate", "--model", str(model), "--adapter", str(old), "--prompt", "x", "--max-new-tokens", "1"]) == 0
    )


@pytest.mark.parametrize("variant", ["llama", "llama3", "qwen3", "granite4-h", "nemotron_h"])
def test_a_gguf_file_has_the_facts_of_its_directory(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant)
    directory = open_model(save_tiny(model, tmp_path / "model"))
    file = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf"))
    found, expected = config_facts(file), config_facts(directory)
    assert json.loads(json.dumps(expected, allow_nan=False)) == expected
    assert config_differences(expected, found, across_files=True) is None
    # The file stores the factors of Llama 3's rule, rounded to float32: a run does not end in the same bits with them.
    assert (config_differences(expected, found) is None) == (variant != "llama3")


def test_fields_that_say_the_same_are_no_difference(tiny: TinyRun, tmp_path: Path) -> None:
    """An absent field and its default, and the older form of the rotary base."""
    model = shutil.copytree(tiny.model, tmp_path / "model")
    before = config_facts(open_model(model))
    config = json.loads((model / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "mlp_bias": False, "use_cache": False, "transformers_version": "4.40.0"}
    (model / "config.json").write_text(json.dumps(config))
    assert config_differences(before, config_facts(open_model(model))) is None
