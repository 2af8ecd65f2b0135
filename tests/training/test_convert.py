"""`backhand convert`: files of other tools become configurations, and no key is lost without an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.options.config import TrainConfig
from backhand.options.config_file import load_config
from backhand.options.convert import convert

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - {path: teknium/GPT4-LLM-Cleaned, type: alpaca, split: train}
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [gate_proj, down_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1.0
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
saves_per_epoch: 1
my_own_key: 3
"""
MLX = """
model: mlx-community/Llama-3.2-1B-Instruct
data: rows.jsonl
num_layers: 16
batch_size: 4
iters: 1000
grad_accumulation_steps: 2
steps_per_eval: 200
lora_parameters: {keys: [self_attn.q_proj], rank: 8, scale: 20.0, dropout: 0.05}
mask_prompt: false
"""
TRL = """
model_name_or_path: base
dataset_name: owner/name
per_device_train_batch_size: 8
warmup_ratio: 0.1
eval_strategy: steps
eval_steps: 50
save_steps: 0
use_peft: true
load_in_8bit: true
gradient_checkpointing: false
report_to: wandb
"""


def converted(text: str, tmp_path: Path) -> tuple[TrainConfig, str]:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    made, *_ = convert(path)
    (tmp_path / "run.toml").write_text(made)
    return load_config(tmp_path / "run.toml"), made


def test_an_axolotl_file(tmp_path: Path) -> None:
    config, text = converted(AXOLOTL, tmp_path)
    assert (config.model.model, config.model.quantize) == ("NousResearch/Llama-3.2-1B", "q4_0")
    assert (config.model.dtype, config.model.recompute) == ("auto", "block")
    assert config.data.data == ("teknium/GPT4-LLM-Cleaned:train",) and config.data.eval_fraction == 0.1
    assert (config.adapter.rank, config.adapter.alpha) == (16, 32)
    assert config.adapter.target_modules == ("gate_proj", "down_proj")
    assert (config.optimization.micro_batch_rows, config.optimization.batch_rows) == (2, 8)
    assert (config.optimization.epochs, config.optimization.schedule) == (1, "cosine")
    assert config.run.output == Path("outputs/lora-out")
    left = text[text.index("# Not converted:") :].splitlines()[1:]
    assert [line.removeprefix("# ").partition(":")[0] for line in left] == (
        ["adapter", "sample_packing", "flash_attention", "saves_per_epoch", "my_own_key"]
    )
    assert "# my_own_key: 3: no option is meant by this name" in left
    assert "# saves_per_epoch: 1: here it is save_every, in steps" in left


def test_an_mlx_lm_file(tmp_path: Path) -> None:
    config, text = converted(MLX, tmp_path)
    assert (config.optimization.batch_rows, config.optimization.micro_batch_rows) == (8, 4)
    assert (config.optimization.max_steps, config.run.eval_every) == (500, 100)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (8, 160, 0.05)
    assert config.adapter.layers == "last:16" and config.adapter.target_modules == ("self_attn.q_proj",)
    assert config.data.train_on == "all" and "Not converted" not in text


def test_a_trl_file_whose_values_are_not_all_possible(tmp_path: Path) -> None:
    config, text = converted(TRL, tmp_path)
    assert (config.model.model, config.data.data, config.model.quantize) == ("base", ("owner/name",), "q8_0")
    assert config.optimization.batch_rows == config.optimization.micro_batch_rows == 8
    assert config.run.eval_every == 50 and config.run.save_every is None and config.model.recompute == "none"
    assert config.run.report_to == ("wandb",)
    assert "# save_steps: 0: save_every 0 is not an integer of at least 1" in text
    assert "# warmup_ratio: 0.1: here it is warmup_steps, a number of steps; 3 % of them unless given" in text


def test_a_llama_factory_file(tmp_path: Path) -> None:
    config, text = converted(
        "finetuning_type: lora\nlora_rank: 4\nlora_target: all\ntemplate: llama3\ndataset: alpaca_en_demo\n"
        "dataset_dir: sets\n",
        tmp_path,
    )
    assert config.adapter.target_modules == "all-linear" and config.data.data == ()
    assert (config.adapter.rank, config.adapter.alpha) == (4, 8)
    assert "alpha = 8  # the default of LLaMA-Factory, twice the rank" in text
    assert "# template: llama3: the model's own chat template is used" in text
    assert "# dataset: alpaca_en_demo: alpaca_en_demo is a name in a list of data sets; give the file that sets" in text


def test_names_of_modules_and_data_sets_separated_by_commas(tmp_path: Path) -> None:
    config, _ = converted("lora_target: q_proj, v_proj\ndataset: a.jsonl,owner/name\nr: 4\n", tmp_path)
    assert config.adapter.target_modules == ("q_proj", "v_proj") and config.data.data == ("a.jsonl", "owner/name")
    assert (config.adapter.rank, config.adapter.alpha) == (4, 8)


def test_training_with_the_file_of_another_tool_names_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(AXOLOTL)
    assert main(["train", str(path)]) == 2
    assert f"next: backhand convert {path} --output run.toml; or key by key:" in capsys.readouterr().err


def test_the_command_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "theirs.yaml", tmp_path / "run.toml"
    path.write_text("lora_r: 8\npacking: true\n")
    assert main(["convert", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("# From theirs.yaml.\n\n[adapter]\nrank = 8  # lora_r\n")
    assert f"1 key converted, 1 in comments; next: backhand convert {path} --output run.toml writes" in shown.err
    assert main(["convert", str(path), "--output", str(output)]) == 0
    assert load_config(output).adapter.rank == 8 and f"backhand train {output}" in capsys.readouterr().err
    assert main(["convert", str(path), "--output", str(output)]) == 2
    assert main(["convert", str(tmp_path / "absent.yaml")]) == 2


def test_a_contradiction_is_an_error_and_text_cannot_end_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("batch_rows: 2\nmicro_batch_rows: 4\n")
    assert main(["convert", str(path)]) == 2
    assert "micro_batch_rows 4 is larger than batch_rows 2" in capsys.readouterr().err
    path.write_text('"odd\\n[run]\\nseed": "x\\n[run]"\nbase_model: "a\\n[run]"\n')
    assert main(["convert", str(path)]) == 0
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "run.toml").model.model == "a\n[run]"


def test_columns_of_axolotl_are_converted(tmp_path: Path) -> None:
    kind = "{field_instruction: asked, field_output: said, format: '{instruction}', system_prompt: ''}"
    config, _ = converted(f"base_model: base\ndatasets:\n  - path: a.csv\n    type: {kind}\n", tmp_path)
    assert (config.data.prompt, config.data.completion) == ("asked", "said")
