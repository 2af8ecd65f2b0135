"""A configuration survives TOML unchanged, and what is wrong in a file is named."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhand.adapters.config import LoRAConfig
from backhand.data.options import DataOptions
from backhand.errors import UsageError
from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
from backhand.options.config_file import config_from_table, dump_config, load_config
from backhand.options.convert import convert

FULL = TrainConfig(
    model=ModelOptions(model='a "quoted"\\path\n', dtype="bfloat16", threads=3, memory="6GB", recompute="mlp"),
    data=DataOptions(data=("a.jsonl", "b.csv"), template_args={"enable_thinking": False, "n": 3}, system="Täst ✓"),
    adapter=LoRAConfig(
        rank=7, alpha=1.5, target_modules=("q_proj", "v_proj"), rank_pattern={"k_proj": 3}, layers_to_transform=(0, 2)
    ),
    optimization=OptimizationOptions(max_steps=9, learning_rate=3e-5, schedule="cosine", warmup_steps=0),
    run=RunOptions(output=Path("out/x"), from_adapter="other", seed=5, max_forgetting=0.25, quiet=True),
)


@pytest.mark.parametrize("config", [TrainConfig(), FULL])
def test_round_trip(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False), st.integers(0, 2**63 - 1))
def test_any_text_and_number_survives(text: str, number: float, seed: int) -> None:
    import tomllib

    config = replace(
        FULL,
        model=replace(FULL.model, model=text),
        adapter=replace(FULL.adapter, alpha=number),
        run=RunOptions(seed=seed),
    )
    assert config_from_table(tomllib.loads(dump_config(config)), "x") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimization]\nlearning_rat = 1.0", "did you mean learning_rate?"),
        ("[optimisation]\nepochs = 1", "did you mean optimization?"),
        ("rank = 3", "write it in the table [adapter]"),
        ("rankk = 3", "did you mean rank, in the table [adapter]?"),
        ("bogus_key = 3", "next: backhand train --help lists all options"),
        ("max-steps = 3", "write it in the table [optimization], as max_steps"),
        ("data = ['a.jsonl']", 'write [data], and in a line below it data = ["…"]'),
        ("model = 'x'", 'write [model], and in a line below it model = "…"'),
        ("[data]\ndata = 'a.jsonl'", 'write it in brackets: ["a.jsonl"]'),
        ("[run]\nzzzzzz = 1", "backhand train --help lists all options"),
        ("[optimization]\nlr = 1e-4", "next: here it is learning_rate"),
        (
            "num_train_epochs = 3\nlora_r = 8",
            "- num_train_epochs: here it is epochs in the table [optimization]\n    - lora_r: here",
        ),
        ("[run]\nseed = 1.5", "1.5 is a number, expected a whole number"),
        ("[run]\nseed = true", "True is true or false, expected a whole number"),
        ("[run]\nquiet = 1", "1 is a whole number, expected true or false"),
        ("[model]\nengine = 'jax'", "'jax' is not one of auto, backhand, transformers"),
        ("[data]\ndata = 3", "3 is a whole number, expected a list"),
        ("[adapter]\nrank_pattern = 3", "3 is a whole number, expected a table"),
        ("[data]\ntemplate_args = {a = [{d = 2024-01-01}]}", "data.template_args.a.d: 2024-01-01 is a date"),
        ("run = 3", "run is a whole number, expected a table"),
        ("[run", "not TOML"),
        ("[run]\nseed = 1\nseed = 2", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
adapter: lora
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
learning_rate: 2e-4
wandb_project:
"""


def test_yaml_is_read_and_other_tools_keys_are_answered_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: smollm2-135m\nrank: 8\nlearning_rate: 2e-4\nrun:\n  seed: 3\nquantize:\n")
    config = load_config(path)
    assert (config.model.model, config.adapter.rank, config.run.seed) == ("smollm2-135m", 8, 3)
    assert config.optimization.learning_rate == 2e-4 and config.model.quantize is None
    path.write_text(AXOLOTL)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    said = str(caught.value)
    for answer in ("base_model: here it is model", "lora_r: here it is rank", "sample_packing: no option is needed"):
        assert answer in said
    assert "learning_rate" not in said and "wandb" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("load_in_4bit: false", "next: no option is needed: the base is quantized only where quantize"),
        ("gradient_checkpointing: true", "here it is recompute in the table [model], as block"),
        ("gradient_checkpointing: false", "here it is recompute in the table [model], as none"),
        ("fine_tune_type: full", "next: only adapters are trained here"),
        ("init_lora_weights: pissa", "no PiSSA"),
        ("lora_parameters: {keys: [q_proj]}", "its keys are target_modules"),
        ("lr_schedule: {warmup: 3}", "warmup_steps in the table [optimization] for the warmup in it"),
        ("report_to: none", "next: leave report_to out"),
        ("report_to: ['none']", "next: leave report_to out"),
        ("data: [{path: x/y, type: alpaca}]", 'next: write data = ["x/y"]'),
    ],
)
def test_values_of_other_tools_are_answered_once(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert said in str(caught.value)


def test_rows_and_runs_are_no_configurations(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    for path, said in (
        (run, f"give rows with --data '{run}'"),
        (tmp_path / "r.jsonl", f"--data {tmp_path}/r.jsonl"),
    ):
        with pytest.raises(UsageError) as caught:
            load_config(path)
        assert said in str(caught.value)
    (run / "config.toml").touch()
    with pytest.raises(UsageError) as caught:
        load_config(run)
    assert f"--resume --output '{run}' continues it" in str(caught.value)


def test_other_names_of_options_occur_in_files_too_and_an_adapter_by_name_is_one_of_many(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("num_generations: 4\nrewards:\n  max_completion_length: 32\n  clip: 0.1\n")
    rewards = load_config(path).rewards
    assert (rewards.group, rewards.max_new_tokens, rewards.epsilon) == (4, 32, 0.1)
    path.write_text("adapter: qlora\nload_in_16bit: true\nwandb_project: x\noptim: adamw\n")
    with pytest.raises(UsageError) as caught:
        load_config(path)
    said = str(caught.value)
    for answer in (
        "adapter: here it is quantize in the table [model], as q4_0",
        "load_in_16bit: here it is dtype in the table [model], as bfloat16",
        "wandb_project: here it is report_to in the table [run], which names a tracker",
        "optim: no option is needed: AdamW is the optimizer",
    ):
        assert answer in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", "alias"),
        ("- a", "it is a list"),
        ("a: [", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("adapter: lora", "`from_adapter`"[1:-1]),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_what_is_wrong_with_yaml_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1e-3\noptimization:\n  learning_rate: 2e-3", "learning_rate is given twice"),
        ("rank: 8\nrank: 16", "rank is given twice"),
        ("adapter: lora\nrank: 16", "from_adapter"),
        ("optimization: 3\nepochs: 2", "optimization is a whole number, expected a table"),
    ],
)
def test_yaml_loses_no_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\noptimization:\n  epochs: 3\nsystem: '1e-4'\n")
    config = load_config(path)
    assert (config.optimization.learning_rate, config.optimization.epochs, config.data.system) == (1e-3, 3, "1e-4")
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 20_000, "nested more than 32 deep (at line 1)"),
        ("a: " + "[[], " * 50_000, "nested more than 32 deep"),
        ("a: " + '{"b": ' * 20_000, "nested more than 32 deep"),
        ("- " * 20_000, "nested more than 32 deep"),
        ("? " * 20_000, "nested more than 32 deep"),
        ("\n".join(" " * level + "a:" for level in range(500)), "nested more than 32 deep (at line 32)"),
        (f"learning_rate: 1{'_' * 200_000}e", "is not a number or auto"),
    ],
)
def test_a_hostile_yaml_file_is_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert time.process_time() - began < 1
    assert message in str(caught.value)


def test_a_value_of_no_allowed_type_is_answered_with_all_of_them() -> None:
    with pytest.raises(UsageError, match="'fast' is not a number or auto"):
        config_from_table({"optimization": {"learning_rate": "fast"}}, "x")


def test_a_whole_number_is_a_rate_too() -> None:
    assert config_from_table({"optimization": {"learning_rate": 1}}, "x").optimization.learning_rate == 1.0


@given(st.binary(max_size=200))
def test_only_our_error_escapes(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.toml"
        path.write_bytes(data)
        with contextlib.suppress(UsageError):
            load_config(path)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(UsageError, match=r"cannot be read|not a configuration"):
            load_config(path)
    with pytest.raises(UsageError) as missing:
        convert(tmp_path / "absent.yaml")
    said = (missing.value.why, missing.value.next_step)
    assert said == ("No such file or directory", "check the path, or give another file")


def test_a_key_in_the_wrong_table_is_sent_to_its_own(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\nlearning_rate = 1e-3\n")
    with pytest.raises(UsageError) as caught:
        load_config(file)
    assert caught.value.next_step == "write it in the table [optimization]"


def test_what_is_not_utf8_is_said(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes("[data]\n# caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        load_config(file)
