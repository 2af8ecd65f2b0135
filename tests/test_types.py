"""The type hints of the package as mypy sees them from outside: in a program that imports the installed package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# `Series` and `records` are as pandas' stubs type a column and `frame.to_dict("records")`.
PROGRAM = """
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, assert_type

import backhand


class Progress(backhand.Observer):
    def stepped(self, record: Mapping[str, Any]) -> bool:
        return bool(record["step"] < 3)


class Series:
    def __iter__(self) -> Iterator[str]:
        return iter(["a"])


class Further(backhand.Observer):
    def started(self, start: backhand.RunStart) -> None:
        assert_type(start.total_steps, int)

    def evaluated(self, record: dict[str, Any]) -> bool:
        return bool(record["step"] < 3)

    def ended(self, summary: backhand.RunSummary) -> None:
        assert_type(summary.losses, dict[int, float])


def stop(record: Mapping[str, Any]) -> bool:
    return bool(record["loss"] > 0.1)


def watch(record: dict[str, Any]) -> None:
    print(record["step"])


config = backhand.TrainConfig(
    model=backhand.ModelOptions(model=Path("base")),
    rewards=backhand.RewardOptions(reward=["exact", "number"]),
    data=backhand.DataOptions(data="rows.jsonl", eval_data=[{"text": "a"}]),
    adapter=backhand.LoRAConfig(rank=8, target_modules=["q_proj"]),
    run=backhand.RunOptions(output="runs/x"),
)
assert_type(config.run.output, Path)
assert_type(config.model.model, str)
summary = backhand.train(config, callbacks=[Progress(), stop, watch, print])
summary = backhand.train(data=[{"prompt": "a", "completion": "b"}], output=Path("runs/y"), model="base", rank=8)
assert_type(summary.losses, dict[int, float])
assert_type(summary.best_eval_loss, float | None)
assert_type(backhand.generate("a", adapter=summary.adapter), str)
assert_type(backhand.generate(prompts=["a"], adapter=Path("a")), list[str])
assert_type(backhand.generate(data="rows.jsonl"), list[dict[str, Any]])
assert_type(backhand.generate(data="rows.jsonl", prompt="{a}"), list[dict[str, Any]])
assert_type(backhand.classify("a", labels=["yes", "no"]), dict[str, float])
assert_type(backhand.classify(prompts=["a"]), list[dict[str, float]])
assert_type(backhand.classify("{a}", data="rows.jsonl"), list[dict[str, float]])
result = backhand.evaluate(data=["a.jsonl", Path("b.jsonl")], adapter="a")
assert_type(result, backhand.Evaluation | backhand.VectorEvaluation)
if isinstance(result, backhand.Evaluation) and result.adapted is not None:
    assert_type(result.adapted.loss, float)
assert_type(backhand.evaluate(data="a.jsonl", model="a"), backhand.Evaluation)
assert_type(backhand.evaluate(data="a.jsonl", adapter="a", rankings=True), backhand.Evaluation)
assert_type(backhand.evaluate(data="a.jsonl", adapter="a", vectors=True), backhand.VectorEvaluation)
vectors = bool(summary.losses)
assert_type(backhand.evaluate(data="a.jsonl", vectors=vectors), backhand.Evaluation | backhand.VectorEvaluation)
assert_type(
    backhand.evaluate(backhand.EvaluateOptions()),
    backhand.Evaluation | backhand.RewardEvaluation | backhand.VectorEvaluation,
)
assert_type(backhand.evaluate(data="a.jsonl", reward="exact").gain, tuple[float, float, float] | None)
assert_type(backhand.decide("a", adapter="a"), dict[str, Any])
assert_type(backhand.decide(states=["a"], adapter="a"), list[dict[str, Any]])
assert_type(backhand.decide(data="rows.jsonl", adapter="a"), list[dict[str, Any]])
assert_type(backhand.decide("{a}", data="rows.jsonl", adapter="a"), list[dict[str, Any]])
assert_type(backhand.export("a", to="gguf", output="b.gguf"), Path)
records: list[dict[Hashable, Any]] = []
backhand.train(data=records, eval_data=records)
assert_type(backhand.generate(data=records), list[dict[str, Any]])
assert_type(backhand.generate(prompts=Series()), list[str])
assert_type(backhand.classify(prompts=Series(), labels=Series()), list[dict[str, float]])
assert_type(backhand.decide(states=Series(), adapter="a"), list[dict[str, Any]])
assert_type(backhand.decide(states=records, adapter="a"), list[dict[str, Any]])
assert_type(backhand.rank("a", Series()), list[float])
backhand.embed(Series())
backhand.lint(data=Series())

backhand.LoRAConfigs  # attr-defined
backhand.LoRAConfig(r=8)  # call-arg
backhand.RunOptions(output=3)  # arg-type
backhand.EvaluateRunOptions(adapter=3)  # arg-type
backhand.export("a", to="zip", output="b")  # arg-type
backhand.generate(3)  # call-overload
backhand.train(output=3)  # arg-type
backhand.train(data=3)  # arg-type
"""


@pytest.mark.slow
def test_a_program_is_checked_against_the_hints_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["--strict", "--cache-dir", str(tmp_path / "cache"), "--show-error-codes", "program.py"]
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", ended.stdout, re.MULTILINE)
    expected = [
        (str(number), line.partition("  # ")[2]) for number, line in enumerate(PROGRAM.split("\n"), 1) if "  # " in line
    ]
    assert found == expected, ended.stdout + ended.stderr
