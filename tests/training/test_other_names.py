"""The ten commonest names of each of five tools, and that they are those tools' own."""

from __future__ import annotations

import dataclasses

import pytest

from backhand.cli.main import main
from backhand.cli.option_fields import option_fields
from backhand.data.options import LintOptions
from backhand.generation.options import GenerateOptions
from backhand.interop.options import ExportOptions
from backhand.options.command_options import EmbedOptions, EvaluateOptions, MineOptions
from backhand.options.config import TrainConfig
from backhand.other_names import _table, option_answers, translate_option

PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "bias": "lora_bias",
    "task_type": "",
    "init_lora_weights": "",
    "fan_in_fan_out": "",
    "inference_mode": "",
    "revision": "model",
    "loftq_config": "",
}
TRL = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_rows",
    "gradient_accumulation_steps": "batch_rows",
    "lora_r": "rank",
    "lr_scheduler_type": "schedule",
    "logging_steps": "log_every",
    "packing": "",
}
MLX = {
    "iters": "max_steps",
    "batch_size": "batch_rows",
    "num_layers": "layers",
    "adapter_path": "output",
    "max_seq_length": "max_length",
    "steps_per_eval": "eval_every",
    "grad_checkpoint": "recompute",
    "mask_prompt": "train_on",
    "resume_adapter_file": "from_adapter",
    "fine_tune_type": "",
}
UNSLOTH = {
    "model_name": "model",
    "max_seq_length": "max_length",
    "load_in_4bit": "base",
    "r": "rank",
    "lora_alpha": "alpha",
    "use_gradient_checkpointing": "recompute",
    "random_state": "seed",
    "dataset_text_field": "messages",
    "train_on_responses_only": "train_on",
    "optim": "",
}
AXOLOTL = {
    "base_model": "model",
    "datasets": "data",
    "sequence_len": "max_length",
    "val_set_size": "eval_fraction",
    "micro_batch_size": "micro_batch_rows",
    "num_epochs": "epochs",
    "lora_target_linear": "target_modules",
    "sample_packing": "",
    "train_on_inputs": "train_on",
    "flash_attention": "",
}
FIELDS = {field.name for field in option_fields(TrainConfig)}


@pytest.mark.parametrize("tool", [PEFT, TRL, MLX, UNSLOTH, AXOLOTL])
def test_the_ten_commonest_names_are_answered(tool: dict[str, str]) -> None:
    assert len(tool) == 10
    for name, meant in tool.items():
        answer = translate_option(name, lambda field: f"<{field}>")
        assert answer is not None and (f"<{meant}>" in answer if meant else answer.startswith("no option is needed"))


def test_the_names_are_the_tools_own() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS
    from peft import LoraConfig
    from trl import ModelConfig, ScriptArguments, SFTConfig

    assert {field.name for field in dataclasses.fields(LoraConfig)} >= PEFT.keys()
    assert {field.name for kind in (SFTConfig, ModelConfig, ScriptArguments) for field in dataclasses.fields(kind)} >= (
        TRL.keys()
    )
    assert CONFIG_DEFAULTS.keys() >= MLX.keys()


OTHER_COMMANDS = (EmbedOptions, EvaluateOptions, ExportOptions, GenerateOptions, LintOptions, MineOptions)


def test_no_name_is_one_of_ours_and_every_answer_names_fields_that_there_are() -> None:
    import re

    answers = option_answers()
    assert len(answers) == sum(
        len(names.split()) for section in list(_table().values())[:2] for names in section.values()
    )
    assert not FIELDS.intersection(answers)
    assert set(re.findall(r"`(\w+)`", " ".join(answers.values()))) <= FIELDS.union(
        (field.name for kind in OTHER_COMMANDS for field in option_fields(kind)),
        ("documents",),  # an argument of `backhand.rank`
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--lora-r", "8"], "Unknown option: --lora-r. Did you mean --rank?"),
        (["train", "--num_train_epochs", "3"], "Did you mean --epochs?"),
        (["train", "--grad-accumulation-steps", "3"], "Here it is --batch-rows, the rows of a whole step"),
        (["train", "--validation", "held_out.jsonl"], "Here it is --eval-data for files, or --eval-fraction"),
        (["train", "--packing"], "--packing; no option is needed"),
        (["evaluate", "--lora-r", "8"], "It is an option of `backhand train`: --rank."),
        (["evaluate", "--objective", "dpo"], "It is an option of `backhand train`."),
        (["evaluate", "--objective", "grpo"], "It is an option of `backhand train`."),
        (["lint", "--objective", "embed"], "Did you mean --embeddings?"),
        (["generate", "--max-tokens", "8"], "Did you mean --max-new-tokens?"),
        (["dpo"], "Its equivalent is backhand train --data rows.jsonl --output runs/mine --objective dpo."),
        (["serve"], "vllm serve --enable-lora"),
        (["mlx_lm.lora"], "Its equivalent is backhand train --data rows.jsonl --output runs/mine."),
        (["mlx_lm.generate"], "Its equivalent is backhand generate --help."),
        (["quantize"], "--quantize q4_0, which quantizes the base as it is read, to q4_0, q4_1, q5_0, q5_1 or q8_0."),
        (["train", "--config", "x.yaml"], "`backhand train run.yaml`"),
        (["train", "--dpo"], "Here it is --objective, as dpo."),
        (["train", "--bias", "all"], "Biases of the base stay frozen"),
        (["train", "--save-gguf"], "`backhand export` writes it for others"),
        (["train", "--push-model"], "uploads the adapter"),
        (["push"], "--output runs/mine/peft --push OWNER/NAME"),
        (["train", "--truncation"], "Training cuts rows that are too long or leaves them out, by --long-rows"),
        (["rank", "--truncation"], "texts for classes, vectors and rankings are then cut to that length"),
        (["generate", "--n-keep", "4"], "no tokens are dropped to go on"),
        (["generate", "--lora-scaled", "a"], "An adapter is used with the scaling that it was trained with"),
        (["train", "--delta", "4"], "where the advantage is negative, there is no second bound"),
        (["train", "--sapo-temperature-neg", "1"], "There is no loss sapo here"),
        (["train", "--loss-weights", "1"], "A run has one loss, not a sum of several."),
        (["train", "--create-new-adapter"], "a run without --from-adapter trains a new adapter"),
        (["train", "--seq-len", "512"], "Did you mean --max-length?"),
        (["train", "--full-finetuning"], "Only adapters are trained here, never all weights of the base."),
        (["train", "--fine-tune-type", "full"], "Only adapters are trained here, never all weights of the base."),
        (
            ["train", "--load-in-4bit=false"],
            "no option is needed: the base is quantized only where --quantize says so",
        ),
        (["train", "--batch-size", "4"], "mlx-lm's are those of a micro-batch"),
        (["train", "--report-to", "none"], "leave --report-to out."),
        (["resume", "runs/pk"], "Its equivalent is backhand train --resume --output runs/mine."),
        (
            ["train", "--lora-r", "8", "--seed=3", "--learning_rate", "1", "--foo", "--iters=5"],
            "Unknown options:\n    - --lora-r. Did you mean --rank?\n    - --foo.\n    - --iters. Here it is",
        ),
        (["train", "--text", "body"], "Here it is --prompt, the column of what is given"),
        (["train", "--label", "team"], "Here it is --completion, the column of what is learnt, with --prompt."),
        (["evaluate", "--label", "a,b"], "Unknown option: --label. Did you mean --labels?"),
        (["train", "--zext", "body"], "Unknown option: --zext.\n"),
        (["evaluate", "--load-in-16bit"], "Here it is --dtype, as bfloat16."),
        (["generate", "--temp", "0.5"], "Did you mean --temperature?"),
        (["export", "--format", "gguf"], "Did you mean --to?"),
        (["train", "--format", "gguf"], "Unknown option: --format.\n"),
        (["train", "--lora"], "--lora; no option is needed: an adapter is trained always"),
        (["mine", "--k", "3"], "Did you mean --negatives?"),
        (["generate", "--k", "3"], "Did you mean --top-k?"),
        (["embed", "--text", "hi"], 'Write texts as rows, such as {"text": "…"}, and give them with --data FILE'),
        (["rank", "--query", "q", "--documents", "a"], "Did you mean --data?"),
        (["train", "--pad-to-max-length"], "no option is needed: rows are always packed"),
        (["train", "--tf32"], "no option is needed: float32 products have the precision of float32"),
        (["train", "--max-samples", "9"], "Did you mean --max-rows?"),
        (["train", "--ctx-size", "9"], "Did you mean --max-length?"),
        (["train", "--n-gpu-layers", "9"], "Did you mean --device?"),
        (["train", "--shuffle"], "rows have a new order in each epoch, drawn with --seed"),
        (["generate", "--mirostat", "2"], "Answers are sampled with --temperature, --top-p and --top-k alone"),
        (["compare", "runs/a", "runs/b"], "Its equivalent is backhand report runs/one runs/two."),
        (["webui"], "Its equivalent is backhand studio."),
        (["version"], "Its equivalent is backhand --version."),
    ],
)
def test_the_command_line_answers(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_threshold_of_decisions_is_no_option_and_the_answer_says_how_to_apply_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["decide", "--adapter", "runs/mine", "--threshold", "0.9"]) == 2
    assert "compare an answer's largest probability with it" in capsys.readouterr().err
