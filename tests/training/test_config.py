"""Every option is checked by name, value and range before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest

import backhand
from backhand.data.options import DataOptions
from backhand.errors import UsageError
from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig, parse_bytes
from backhand.options.objectives import ObjectiveOptions

NOT_UTF8 = os.fsdecode(b"caf\xe9.jsonl")


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (ModelOptions, "model", ""),
        (ModelOptions, "engine", "jax"),
        (ModelOptions, "dtype", "float16"),
        (ModelOptions, "device", ""),
        (ModelOptions, "threads", 0),
        (ModelOptions, "threads", 1025),
        (ModelOptions, "memory", "lots"),
        (ModelOptions, "recompute", "all"),
        (OptimizationOptions, "epochs", 0),
        (OptimizationOptions, "epochs", 1.5),
        (OptimizationOptions, "epochs", True),
        (OptimizationOptions, "max_steps", 0),
        (OptimizationOptions, "learning_rate", 0.0),
        (OptimizationOptions, "learning_rate", float("nan")),
        (OptimizationOptions, "learning_rate", -1e-4),
        (OptimizationOptions, "learning_rate", float("inf")),
        (OptimizationOptions, "schedule", "step"),
        (OptimizationOptions, "warmup_steps", -1),
        (OptimizationOptions, "weight_decay", -0.1),
        (OptimizationOptions, "max_grad_norm", -1.0),
        (OptimizationOptions, "adam_beta1", 1.0),
        (OptimizationOptions, "adam_beta2", 1.5),
        (OptimizationOptions, "adam_epsilon", 0.0),
        (OptimizationOptions, "batch_rows", 0),
        (OptimizationOptions, "micro_batch_rows", 0),
        (RunOptions, "eval_every", 0),
        (RunOptions, "save_every", 0),
        (RunOptions, "keep", 0),
        (RunOptions, "early_stopping", 0),
        (RunOptions, "seed", -1),
        (RunOptions, "seed", 2**63),
        (RunOptions, "log_every", 0),
        (RunOptions, "max_bad_steps", 0),
        (RunOptions, "max_forgetting", 0.0),
        (RunOptions, "prove_resume", 0),
    ],
)
def test_a_value_out_of_range_is_named(cls: type[Any], field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        cls(**{field: value}).validate()
    assert caught.value.where == field
    assert not value or repr(value) in caught.value.what


@pytest.mark.parametrize(
    "part",
    [
        OptimizationOptions(batch_rows=4, micro_batch_rows=5),
        RunOptions(resume=True, overwrite=True),
        RunOptions(resume=True, from_adapter="other"),
        ModelOptions(engine="transformers", recompute="block"),
    ],
)
def test_contradictions_are_refused(part: Any) -> None:
    with pytest.raises(UsageError):
        part.validate()


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"run": RunOptions(output=Path(NOT_UTF8))}, "output"),
        ({"data": DataOptions(data=("rows.jsonl", NOT_UTF8))}, "data"),
        ({"model": ModelOptions(model=NOT_UTF8)}, "model"),
    ],
)
def test_a_name_that_is_not_utf8_is_refused(part: Any, named: str) -> None:
    with pytest.raises(UsageError, match="is not UTF-8") as caught:
        TrainConfig(**part).validate()
    assert caught.value.where == named


@pytest.mark.parametrize(
    ("objective", "given", "option", "reading"),
    [
        ("sft", {"state": "t"}, "--state", "give --objective decide;"),
        ("sft", {"prompt": "t", "question": {"a": ""}}, "--question", "give --objective decide;"),
        ("classify", {"option_order": "random"}, "--option-order", "give --objective decide;"),
        ("dpo", {"messages": "m"}, "--messages", "give --objective sft or bake or sdft;"),
        ("dpo", {"columns": {"completion": "c"}}, "--completion", "and name the columns: --columns chosen=COLUMN"),
    ],
)
def test_an_option_of_columns_is_refused_with_the_objectives_that_read_it(
    objective: Any, given: dict[str, Any], option: str, reading: str
) -> None:
    config = TrainConfig(data=DataOptions(**given), objective=ObjectiveOptions(objective=objective))
    with pytest.raises(UsageError, match=f"{option} is given, but {objective} does not read it") as caught:
        config.validate()
    assert reading in (caught.value.next_step or "")


def test_defaults_are_valid() -> None:
    assert TrainConfig().validate() == TrainConfig()


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("100", 100),
        ("6GB", 6 * 2**30),
        ("512 M", 2**29),
        ("2.5GiB", 5 * 2**29),
        ("1k", 1024),
        ("3b", 3),
        ("1TB", 2**40),
    ],
)
def test_amounts_of_memory(text: str, amount: int) -> None:
    assert parse_bytes(text, where="memory") == amount


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "6 GBB", "nan", "1e400", "infGB", "6XB"])
def test_amounts_of_memory_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text, where="memory")


def test_every_option_is_documented_and_no_torch_is_imported() -> None:
    code = (
        "import ast, inspect, sys, dataclasses\n"
        "import backhand.options.config as c, backhand.options.command_options as e, backhand.options.config_file\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "for cls in (c.ModelOptions, c.OptimizationOptions, c.RunOptions, e.EvaluateRunOptions):\n"
        "    bodies = [ast.parse(inspect.getsource(base)).body[0].body for base in cls.__mro__[:-1]]\n"
        "    documented = {a.target.id for body in bodies for a, b in zip(body, body[1:])\n"
        "                  if isinstance(a, ast.AnnAssign)\n"
        "                  and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)}\n"
        "    assert documented == {f.name for f in dataclasses.fields(cls)}, cls\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunOptions().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: backhand.train({"data": "rows.jsonl"}), "config is a dict, not a TrainConfig"),
        (lambda: backhand.train(TrainConfig(data="rows.jsonl")), "data is a str, not a DataOptions"),
        (
            lambda: backhand.train(TrainConfig(adapter=peft.LoraConfig(r=4))),
            "adapter is a LoraConfig, not a LoRAConfig",
        ),
        (lambda: backhand.evaluate("rows.jsonl"), "options is a str, not an EvaluateOptions"),
        (lambda: backhand.evaluate(backhand.EvaluateOptions(run={})), "run is a dict, not an EvaluateRunOptions"),
    ],
)
def test_something_else_than_the_dataclass_is_named(call: Any, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        call()
    assert said in str(refused.value)


def test_only_decisions_are_averaged_by_default_and_a_second_average_is_refused() -> None:
    decides, taught = (
        ObjectiveOptions(objective=name, teacher_update_rate=rate) for name, rate in (("decide", 0.0), ("sdft", 0.1))
    )
    assert TrainConfig().average_share_of(1000) is None
    assert TrainConfig(objective=decides).average_share_of(50) == 0.6
    assert TrainConfig(objective=decides).average_share_of(49) is None, "it lags while the loss falls quickly"
    given = OptimizationOptions(average_share=0.0)
    assert TrainConfig(objective=decides, optimization=given).average_share_of(50) == 0.0
    with pytest.raises(UsageError) as caught:
        TrainConfig(objective=taught, optimization=OptimizationOptions(average_share=0.5)).validate()
    assert caught.value.where == "average_share"


@pytest.mark.parametrize("objective", ["decide", "rank"])
def test_few_rows_of_new_labels_have_more_epochs(objective: Any) -> None:
    decide = TrainConfig(objective=ObjectiveOptions(objective=objective))
    assert [decide.epochs_of(rows) for rows in (10, 160, 600, 10_000)] == [15, 10, 3, 3]
    assert TrainConfig().epochs_of(10) == 3
    assert replace(decide, optimization=OptimizationOptions(epochs=2)).epochs_of(10) == 2
