"""The functions of the package: options by name, rows and paths as Python has them, callbacks, and results."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import backhand
from backhand import printing
from backhand.api_errors import errors_in_python, in_python
from backhand.bounds import split_hint, union_members
from backhand.cli.main import main
from backhand.cli.option_fields import option_fields, takes_several
from backhand.data.decisions import question_of
from backhand.data.options import LintOptions
from backhand.errors import ArtifactError, BackhandError, DataError, UsageError
from backhand.generation.options import AnswerOptions, GenerateOptions
from backhand.interop.options import ExportOptions, MergeOptions
from backhand.loop.observers import Observers, as_observers
from backhand.options.command_options import DecideOptions, EmbedOptions, MineOptions, PlanOptions, RankOptions
from backhand.options.config_file import load_config
from backhand.printing import say
from backhand.runs.interruption import Interrupted
from backhand.runs.status import read_status
from backhand.terminal import console
from backhand.words import show_notes
from tests.support.ranks import free_port
from tests.support.tiny_run import TinyRun


async def awaited(record: object) -> None:
    """Be a callback whose call does not run its body."""


class Awaited(backhand.Observer):
    """An observer whose method does not run its body."""

    async def stepped(self, record: dict[str, Any]) -> None:  # type: ignore[override]
        """Be called with the record of a step."""


ROWS = [{"prompt": f"the user asks {number}", "completion": ("yes", "no")[number % 2]} for number in range(12)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("trained") / "run"
    return backhand.train(
        data=ROWS, eval_data=ROWS[:4], output=str(output), model=tiny.model, rank=3, threads=1, quiet=True, answers=0
    )


def options(tiny: TinyRun, output: Path, **more: Any) -> dict[str, Any]:
    common = {"model": tiny.model, "output": output, "threads": 1, "dtype": "float32", "quiet": True, "answers": 0}
    return {**common, "batch_rows": 4, "learning_rate": 3e-3, "eval_data": ROWS[:4], **more}


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_an_adapter_of_texts_continues_texts(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt became a user turn, which training never saw."""
    rows = [{"text": f"the user asks for {number} names"} for number in range(8)]
    given = options(tiny, tmp_path / "run", data=rows, eval_data=rows[:2], max_steps=3)
    summary = backhand.train(**{**given, "learning_rate": 0.05})
    capsys.readouterr()
    ask = partial(backhand.generate, "the user", adapter=summary, greedy=True, max_new_tokens=6)
    several = partial(backhand.generate, adapter=summary, greedy=True, max_new_tokens=6)
    answer, note = ask(), "note: the adapter was trained on texts without a chat template"
    assert f'{note}, and prompts get none either; for the tokenizer\'s own: chat_template="default"\n' in (
        capsys.readouterr().err
    )
    assert answer == ask(chat_template="none") == several(prompts=["the user"])[0]
    turn = ask(chat_template="default")
    assert turn != answer and ask(system="a") not in (turn, answer)
    capsys.readouterr()
    command = ["generate", "--adapter", summary.adapter, "--prompt", "the user", "--greedy", "--max-new-tokens", "6"]
    for words, text, noted in (([], answer, 1), (["--chat-template", "default"], turn, 0), (["--quiet"], answer, 0)):
        assert main([*command, *words]) == 0
        out, error = capsys.readouterr()
        assert out == f"{text}\n" and error.count(note) == noted
    (line,) = several(data=[{"prompt": "the user"}])
    assert (line["completion"], line["prompt"]) == (answer, "the user")
    with pytest.raises(DataError, match="conversation") as refused:
        several(data=[{"messages": [{"role": "user", "content": "the user"}]}])
    assert "default" in str(refused.value.next_step)
    assert main(["combine", "scale", summary.adapter, "--weights", "1", "--output", str(tmp_path / "half")]) == 0
    assert ask(adapter=tmp_path / "half") == answer
    page = (tmp_path / "run" / "report.html").read_text()
    assert "backhand generate" in page and "backhand chat" not in page


@pytest.mark.parametrize("make", [pd.DataFrame, pa.Table.from_pylist, iter, list], ids=str)
def test_rows_in_memory_train_the_adapter_that_a_file_trains(
    make: Callable[[Any], Any], tiny: TinyRun, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    backhand.train(**options(tiny, tmp_path / "file", data=path, max_steps=2))
    if make is pd.DataFrame:
        frame = pd.DataFrame([{}, *ROWS]).iloc[1:]  # its rows have numbers of their own, from 1
        backhand.train(**options(tiny, tmp_path / "memory", data=frame, max_steps=2))
    else:
        backhand.train(**options(tiny, tmp_path / "memory", data=make(ROWS), max_steps=2))
    assert adapter_bytes(tmp_path / "memory") == adapter_bytes(tmp_path / "file")


def test_a_frame_s_missing_values_are_null() -> None:
    frame = pd.DataFrame({"prompt": ["a", None], "score": [0.5, float("nan")]})
    (name,) = backhand.DataOptions(data=frame).data
    assert name.rows == [{"prompt": "a", "score": 0.5}, {"prompt": None, "score": None}]  # type: ignore[attr-defined]
    for empty in ({"prompt": None, "score": math.nan}, {"score": None}, {}):
        other = backhand.DataOptions(data=[{"prompt": "a", "score": 0.5}, empty]).data
        assert other == (name,), "the same rows, so that runs on them can be compared"


def test_a_frame_with_texts_and_numbers_in_one_column_is_read_by_its_rows(tiny: TinyRun) -> None:
    missing = [None, float("nan"), pd.NA, pd.NaT]
    frame = pd.DataFrame({"prompt": ["a"] * 6, "mean": ["n/a", 1.5, *missing], "score": [0.5, *[None] * 5]}).iloc[::-1]
    (name,) = backhand.DataOptions(data=frame).data
    values = [*[None] * 4, 1.5, "n/a"]
    scores = [*[None] * 5, 0.5]
    expected = [{"prompt": "a", "mean": mean, "score": score} for mean, score in zip(values, scores, strict=True)]
    assert name.rows == expected and list(name.rows[0]) == list(frame.columns)  # type: ignore[attr-defined]
    frame = pd.DataFrame(ROWS).assign(mean=["n/a", *range(1, len(ROWS))])
    assert not [one for one in backhand.lint(data=frame, model=tiny.model)["findings"] if one["kind"] == "malformed"]
    with pytest.raises(DataError, match=r"^data row 2: completion is the number 1, not text"):
        backhand.plan(data=frame.assign(completion=frame["mean"]), model=tiny.model, calibrate=False)
    (name,) = backhand.DataOptions(data=frame.set_index(pd.Index(["q", *range(1, len(ROWS))]))).data
    assert name.rows[0]["mean"] == "n/a", "an index of texts and numbers is not read"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="the data frame cannot be read") as refused:
        backhand.DataOptions(data=frame.set_axis(["prompt", "mean", "mean"], axis=1))
    assert "give each column a name of its own" in str(refused.value.next_step)


def test_a_run_on_rows_in_memory_resumes_with_the_same_rows(tiny: TinyRun, tmp_path: Path) -> None:
    made = options(tiny, tmp_path / "run", data=ROWS, max_steps=4, save_every=1)
    with pytest.raises(Interrupted) as stopped:
        backhand.train(
            **made, callbacks=[lambda record: os.kill(os.getpid(), signal.SIGINT) if record["step"] == 2 else None]
        )
    assert "backhand.train(data=rows, output=" in str(stopped.value.next_step)
    with pytest.raises(DataError, match="this process does not have them") as refused:
        backhand.train(output=tmp_path / "run", resume=True, quiet=True)
    assert "backhand.train(data=rows" in str(refused.value)
    resumed = backhand.train(**made, resume=True)
    whole = backhand.train(**options(tiny, tmp_path / "whole", data=ROWS, max_steps=4, save_every=1))
    assert resumed.steps == 4 and adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert whole.losses == resumed.losses
    assert backhand.train(**made, resume=True) == resumed, "a finished run"
    with pytest.raises(UsageError, match="data: the rows have changed"):
        backhand.train(**{**made, "data": ROWS[:-1]}, resume=True)


def test_a_refused_run_leaves_no_directory(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "a"}\n'.encode("latin-1"))
    (tmp_path / "kept").mkdir()
    for data, more in ((tmp_path / "latin.jsonl", {}), (tmp_path / "missing.jsonl", {}), (ROWS, {"prompt": "nowhere"})):
        for output in ("new/a/run", "kept/run"):
            with pytest.raises(BackhandError):
                backhand.train(**options(tiny, tmp_path / output, data=data, **more))
    assert {one.name for one in tmp_path.iterdir()} == {"latin.jsonl", "kept"}
    assert not list((tmp_path / "kept").iterdir())


def test_rows_in_memory_are_not_for_several_processes(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows in memory cannot be passed to 2 worker processes"):
        backhand.train(**options(tiny, tmp_path / "run", data=ROWS, workers=2))


def test_a_malformed_row_in_memory_is_named(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data row 2: .*completion"):
        backhand.train(**options(tiny, tmp_path / "run", data=[ROWS[0], {"prompt": "a", "completion": None}]))
    for missing in (math.nan, pd.NA, pd.NaT):
        with pytest.raises(DataError, match=r"^data row 2: completion is null"):
            backhand.train(**options(tiny, tmp_path / "run", data=[ROWS[0], {"prompt": "a", "completion": missing}]))
    dates = pd.DataFrame({"prompt": ["a"], "completion": [pd.Timestamp(0)]})
    with pytest.raises(DataError, match=r"type \w+, not text\n  next: convert it to text"):
        backhand.train(**options(tiny, tmp_path / "run", data=dates))
    with pytest.raises(DataError, match=r"^data: there is no row in the data"):
        backhand.train(**options(tiny, tmp_path / "run", data=pd.DataFrame()))
    with pytest.raises(DataError, match=r"^eval_data: there is no row in the data"):
        backhand.train(**options(tiny, tmp_path / "run", data=ROWS, eval_data=pd.DataFrame()))
    frame = pd.DataFrame(ROWS)
    assert backhand.lint(data=[frame[:1], frame[1:]], model=tiny.model) == backhand.lint(data=frame, model=tiny.model)
    with pytest.raises(UsageError, match=r'braces: prompt="\{a\}\\n\{b\}"'):
        backhand.lint(data=frame, prompt=["a", "b"], model=tiny.model)
    with pytest.raises(DataError, match='completion="1"'):
        backhand.lint(data=pd.DataFrame([["a b", "c"], ["c d", "d"]]), model=tiny.model)
    with pytest.raises(DataError, match=r"frame\['completion'\].astype\(str\)"):
        backhand.train(**options(tiny, tmp_path / "run", data=pd.DataFrame({"prompt": ["a"], "completion": [0]})))
    with pytest.raises(DataError, match=r"row 1: [\s\S]*\n  next: correct the row, or leave it out$"):
        backhand.train(**options(tiny, tmp_path / "run", data=[{"prompt": "a", "completion": "\ud800"}]))
    with pytest.raises(DataError, match=r"^eval_data row 1: .*completion"):
        backhand.train(**options(tiny, tmp_path / "run", data=ROWS, eval_data=[{"prompt": "a", "completion": None}]))
    with pytest.raises(DataError, match=r"^prompts row 2: the prompt has"):
        backhand.generate(prompts=["a", "a" * 999], model=tiny.model)
    with pytest.raises(DataError, match=r"^prompt: the prompt has"):
        backhand.generate("a" * 999, model=tiny.model)


FRAME = pd.DataFrame({"section": ["a", "b"], "synopsis": ["c d", "e"]})
OF_TEXTS = {
    "generate": lambda given: backhand.generate(prompts=given),
    "classify": lambda given: backhand.classify(prompts=given, labels=["a", "b"]),
    "embed": lambda given: backhand.embed(given),
    "decide": lambda given: backhand.decide(states=given, adapter="absent"),
    "rank": lambda given: backhand.rank("a", given),
}
ONE_TEXT = {
    "generate": lambda given: backhand.generate(given),
    "classify": lambda given: backhand.classify(given),
    "decide": lambda given: backhand.decide(given, adapter="absent"),
    "rank": lambda given: backhand.rank(given, ["a"]),
}
OF_ROWS = {
    "train": lambda given: backhand.train(data=given),
    "evaluate": lambda given: backhand.evaluate(data=given),
    "generate": lambda given: backhand.generate(data=given),
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (FRAME, "is a data frame\n  next: give one of its columns, such as {plural}=frame['synopsis']"),
        (pa.Table.from_pandas(FRAME), "such as {plural}=frame['synopsis']"),
        (Path("prompts.jsonl"), "is a PosixPath\n  next: backhand."),
        (42, "is 42\n  next: backhand."),
        (["a", None], "[1] is None\n  next: write it as text"),
        (pd.Series(["a", None]), "[1] is nan\n  next: write it as text"),
        ({"a": "b"}, "is a dict\n  next: backhand."),
        (SimpleNamespace(column_names=None), "is a SimpleNamespace\n  next: backhand."),  # a mapped IterableDataset
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_list_of_texts_is_refused_with_what_to_give(given: object, said: str) -> None:
    for function, call in OF_TEXTS.items():
        with pytest.raises(UsageError) as refused:
            call(given)
        assert said.format(plural=refused.value.where) in str(refused.value), function
    for function, call in ONE_TEXT.items():
        if function != "decide" or not isinstance(given, dict | int):  # which are states
            with pytest.raises(UsageError, match=r"(prompt|state|query) is a?.*\n  next: ") as refused:
                call(given)
            plural = f"{refused.value.where}s"
            assert "frame" not in said or function == "rank" or said.format(plural=plural) in str(refused.value)


def test_several_states_given_as_one_are_refused(tmp_path: Path) -> None:
    """They were one state, a JSON list, and got one answer."""
    for given in (["a", "b"], ("a", 1), FRAME.section, [{"text": "a"}, {"text": "b"}], FRAME.to_dict("records")):
        with pytest.raises(UsageError, match=r"^state is a (list|tuple)\n  next: .*states=\['…', '…'\]\) for several"):
            backhand.decide(given, adapter=tmp_path)
    for state in ({"text": "a"}, [0.5, 1.5], ["a", 1]):
        with pytest.raises(ArtifactError):  # of the adapter
            backhand.decide(state, adapter=tmp_path)


def test_an_encoder_without_a_head_is_not_evaluated_and_a_label_is_a_completion() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UsageError, match=r"(?s)this model has no head.*give an adapter with a head"):
        backhand.evaluate(data=rows, model="all-minilm-l6-v2")
    with pytest.raises(UsageError, match="no option label\n  next: here it is completion, the column"):
        backhand.lint(data=rows, label="completion")


def test_texts_given_as_rows_are_refused_with_the_form_of_rows() -> None:
    with pytest.raises(UsageError, match=r"data is one column of texts, not rows\n  next: give the data frame"):
        backhand.evaluate(data=FRAME.synopsis)
    for texts in (["some words " * 99, "others"], "some words\n"):
        with pytest.raises(DataError, match=r"not the name of a file\n  next: give texts as rows, such as {.text.: "):
            backhand.evaluate(data=texts)
    for call in OF_ROWS.values():
        with pytest.raises(UsageError, match="42 is not a list of file names"):
            call(42)


def test_texts_and_paths_are_the_same() -> None:
    assert backhand.RunOptions(output="runs/x") == backhand.RunOptions(output=Path("runs/x"))
    assert backhand.ModelOptions(model=Path("base")).model == "base"
    assert backhand.EvaluateRunOptions(adapter="a").adapter == Path("a")
    assert backhand.DataOptions(data=Path("a.jsonl")) == backhand.DataOptions(data=("a.jsonl",))
    assert backhand.DataOptions(data=[Path("a"), "b"]).data == ("a", "b")
    assert backhand.RewardOptions(reward=Path("reward.py:short")).reward == ("reward.py:short",)  # type: ignore[arg-type]
    assert backhand.DataOptions(question="team=Which?").question == {"team": "Which?"}  # type: ignore[arg-type]


def test_values_of_numpy_and_pandas_are_python_s() -> None:
    adapter = backhand.LoRAConfig(rank=np.int64(4), layers_to_transform=np.arange(2), use_dora=np.False_)  # type: ignore[arg-type]
    assert adapter.validate() == backhand.LoRAConfig(rank=4, layers_to_transform=[0, 1], use_dora=False)  # type: ignore[arg-type]
    rate = backhand.OptimizationOptions(learning_rate=np.float32(0.5)).validate().learning_rate  # type: ignore[arg-type]
    assert (rate, type(rate)) == (0.5, float)
    labels = pd.Series(["b", "a", "b"]).unique()
    answer = GenerateOptions(answer=AnswerOptions(labels=labels)).answer  # type: ignore[arg-type]
    assert answer.labels == ("b", "a")
    for several in ({"b", "a"}, {"a": 1, "b": 2}.keys(), iter("ab")):
        assert AnswerOptions(labels=several).validate().labels == ("a", "b")  # type: ignore[arg-type]
    (rows,) = backhand.DataOptions(data=iter([{"score": np.float64(1)}])).data
    assert type(rows.rows[0]["score"]) is float  # type: ignore[attr-defined]


class Foreign(backhand.Observer):
    def on_step_end(self, record: object) -> None: ...

    def ended(self, summary: backhand.RunSummary) -> None: ...


class Misspelt(backhand.Observer):
    def steped(self, record: object) -> None: ...


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: backhand.LoRAConfig(r=8), "LoRAConfig has no option r\n  next: here it is rank"),  # type: ignore[call-arg]
        (lambda: backhand.LoRAConfig(rnak=8), "next: did you mean rank?"),  # type: ignore[call-arg]
        (lambda: backhand.TrainConfig(rank=8), "next: write it in LoRAConfig"),  # type: ignore[call-arg]
        (lambda: backhand.RunOptions(num_train_epochs=8), "here it is epochs in OptimizationOptions"),  # type: ignore[call-arg]
        (lambda: backhand.train(lora_alpha=16), "backhand.train has no option lora_alpha\n  next: here it is alpha"),
        (lambda: backhand.train(r=8, packing=True), "- r: here it is rank\n    - packing: no option is needed"),
        (
            lambda: backhand.evaluate(adaptor="a"),
            "evaluate has no option adaptor\n  next: did you mean adapter?",
        ),
        (lambda: backhand.evaluate(lora_r=8), "here it is rank in backhand.train"),
        (lambda: backhand.generate("a", max_tokens=8), "here it is max_new_tokens"),
        (lambda: backhand.generate("a", max_length=8), "here it is max_new_tokens"),
        (lambda: backhand.train(data=ROWS, dtype=torch.bfloat16), "did you mean bfloat16?"),
        (lambda: backhand.plan(data=[]), "the list of rows is empty"),
        (lambda: backhand.train(data=ROWS, report_to="none"), "leave report_to out: no tracker is the default"),
        (lambda: backhand.train(class_weight="balanced"), "rows have equal weights"),
        (lambda: backhand.train(scoring="f1"), "depends on the objective alone"),
        (lambda: backhand.classify("a", candidate_labels=["a"]), "here it is labels"),
        (lambda: backhand.embed(["a"], query=True), "next: here it is queries=True"),
        (lambda: backhand.embed(query="a"), "next: here it is texts"),
        (lambda: backhand.rank("a", docs=["b"]), "next: here it is documents, or for a file of rows data"),
        (lambda: backhand.generate("a", stop=1), "next: give stop=[…]"),  # type: ignore[arg-type]
        (lambda: backhand.train(task_type="SEQ_CLS"), 'next: here it is objective="classify"'),
        (lambda: backhand.train(objective="ppo"), "next: here it is grpo"),
        (
            lambda: backhand.train(n_jobs=2, patience=2),
            "- n_jobs: here it is threads\n    - patience: here it is early_stop",
        ),
        (lambda: backhand.train(max_completion_length=3), "next: here it is max_new_tokens"),
        (lambda: backhand.train(num_generations=3), "next: here it is group"),
        (
            lambda: backhand.train(clip=0.2, updates=2),
            "- clip: here it is epsilon\n    - updates: here it is num_iterations",
        ),
        (lambda: backhand.generate("a", max_completion_length=3), "next: here it is max_new_tokens"),
        (lambda: backhand.RewardOptions(num_generations=3), "next: here it is group"),  # type: ignore[call-arg]
        (lambda: backhand.OptimizationOptions(num_generations=3), "next: write it in RewardOptions, as group"),  # type: ignore[call-arg]
        (lambda: backhand.train(max_tokens=3), "here it is max_new_tokens for answers; for rows it is max_length"),
        (lambda: backhand.evaluate(max_tokens=3), "here it is max_new_tokens for answers; for rows it is max_length"),
        (lambda: backhand.lint(data=ROWS, max_tokens=3), "here it is max_length"),
        (lambda: backhand.train(eval_split=0.2), "here it is eval_fraction"),
        (lambda: backhand.lint(data=ROWS, objective="embed"), "next: here it is embeddings=True"),
        (lambda: backhand.evaluate(data=ROWS, objective="embed"), "next: here it is vectors=True"),
        (lambda: backhand.lint(data=ROWS, objective="classify"), "next: here it is classes=True"),
        (lambda: backhand.lint(data=ROWS, objective="decide"), "next: here it is decisions=True"),
        (lambda: backhand.lint(data=ROWS, objective="rank"), "next: here it is rankings=True"),
        (lambda: backhand.lint(data=ROWS, objective="kto"), "next: here it is labels=True"),
        (lambda: backhand.lint(data=ROWS, objective="grpo"), "next: here it is prompts=True"),
        (lambda: backhand.lint(data=ROWS, objective="dpo"), "leave it out: it is an option of backhand.train"),
        (lambda: backhand.generate("a", temp=0), "did you mean temperature?"),
        (lambda: backhand.train(prompt_column="a"), "did you mean prompt?"),
        (lambda: backhand.export("a", to="gguf", output="b", merged=True), "did you mean merge?"),
        (lambda: backhand.train("rows.jsonl"), "next: give rows and options by name, such as data=…"),  # type: ignore[arg-type]
        (lambda: backhand.generate(prompts="a"), "prompts is one text"),  # type: ignore[call-overload]
        (lambda: backhand.generate(), "give either prompt, prompts or data"),  # type: ignore[call-overload]
        (
            lambda: backhand.generate(prompts=["a"], data=ROWS),  # type: ignore[call-overload]
            "give either prompt, prompts or data\n  next: backhand.generate('…') for one prompt",
        ),
        (
            lambda: backhand.generate([{"role": "user", "content": "a"}]),  # type: ignore[call-overload]
            "prompt is a conversation\n  next: give it as a row: data=[{'messages': […]}]",
        ),
        (lambda: backhand.classify("a", labels=[]), "labels: there are no labels\n  next: give labels="),
        (lambda: backhand.classify("a", labels=iter(())), "labels: there are no labels\n  next: give labels="),
        (lambda: backhand.decide([pd.DataFrame(ROWS)], adapter="b"), "state is a list\n  next: backhand.decide"),
        (
            lambda: backhand.train(data=ROWS, output=pd.DataFrame(ROWS)),  # type: ignore[arg-type]
            "output is a data frame\n  next: give rows as data=…",
        ),
        (lambda: backhand.train(data=ROWS, objective=pd.DataFrame(ROWS)), "objective is a data frame"),
        (lambda: backhand.classify("a", labels=["a", None]), 'next: give texts, such as labels=["yes", "no"]'),  # type: ignore[call-overload]
        (
            lambda: backhand.train(data=ROWS, class_labels=[pd.DataFrame(ROWS)], objective="classify"),
            "are not different labels",
        ),
        (lambda: backhand.classify("a", adapter="b", compare=True), "compare: backhand.classify returns the prob"),
        (
            lambda: backhand.classify(data=ROWS, adapter="b", as_rows=True),
            "next: leave as_rows out, or call backhand.generate(data=…, labels=…, as_rows=True)",
        ),
        (lambda: backhand.embed([]), "texts: there are no texts\n  next: backhand.embed(['…', '…'])"),
        (lambda: backhand.train(data=3), "3 is not a list of file names or hub ids"),  # type: ignore[arg-type]
        (lambda: backhand.train(data={"prompt": ["a"]}), "next: give a list of dicts with one dict per row, or a data"),
        (
            lambda: backhand.train(data=[*ROWS, None]),
            f"data: row {len(ROWS) + 1} is None, not a dict\n  next: give one dict",
        ),  # type: ignore[arg-type]
        (lambda: backhand.evaluate(data=["rows.jsonl", *ROWS]), "data: row 1 is 'rows.jsonl', not a dict"),
        (lambda: backhand.train(data=ROWS, eval_data=5), "in Python also a path, a list of dicts or a data frame"),
        (lambda: backhand.train(), "next: give data=… (a path, a list of dicts or a data frame)"),
        (lambda: backhand.classify(["a", "b"]), "prompt is a list\n  next: backhand.classify('…') for one prompt"),  # type: ignore[call-overload]
        (lambda: backhand.train(data=ROWS, reward=len), "is a function, not the name of one"),
        (lambda: backhand.train(data=ROWS, reward=[len]), 'write it to a file, and give reward=["file.py:len"]'),
        (lambda: backhand.generate("a", adapter=42), "adapter: 42 is not a path"),  # type: ignore[call-overload]
        (lambda: backhand.evaluate(data=ROWS, adapter=42), "adapter: 42 is not a path"),  # type: ignore[arg-type]
        (lambda: backhand.train(data=ROWS, callbacks=[backhand.Observer]), "give an object of it: Observer()"),
        (lambda: backhand.train(data=ROWS, callbacks=lambda: None), "cannot be called with a record: too many"),
        (lambda: backhand.train(data=ROWS, callbacks=awaited), "is async or has a yield"),
        (lambda: backhand.train(data=ROWS, callbacks=Awaited()), "has stepped, which is async or has a yield"),
        (
            lambda: backhand.train(data=ROWS, model=object()),
            "is not text\n  next: give a directory, a file or a hub id",
        ),
        (lambda: backhand.train(data=ROWS, resume=Path("runs/a")), 'next: give resume=True, output="runs/a"'),
        (lambda: backhand.train(data=ROWS, overwrite="yes"), "next: give overwrite=True, or leave it out"),
        (lambda: backhand.train(data=ROWS, callbacks=5), "callbacks: 5 is neither a function nor a list"),  # type: ignore[arg-type]
        (
            lambda: backhand.export("a", output="b"),
            "export needs the argument to\n  next: give to=…, one of peft, gguf",
        ),  # type: ignore[call-arg]
        (lambda: backhand.export("a", to="peft"), "export needs the argument output\n  next: give output=…"),  # type: ignore[call-arg]
        (
            lambda: backhand.export("a", format="gguf", output="o"),  # type: ignore[call-arg]
            'has no option format, and needs the argument to\n  next: give to="gguf" instead of format',
        ),
        (lambda: backhand.export("a", "gguf"), "too many positional arguments\n  next: give these by name: to, output"),  # type: ignore[call-arg]
        (lambda: backhand.export("a", to="gguf", output="b", overwrite=True), "leave it out: it is an option of backh"),
        (lambda: backhand.train(data=ROWS, question=["team"]), 'give question={"COLUMN": "QUESTION"}, or in a file'),
        (lambda: backhand.train(beta=0.1), 'next: leave it out, or give objective="dpo" or'),
        (lambda: backhand.export("a", to="mlx", output="b", decision=True), 'next: give to="gguf"'),
        (lambda: backhand.train(data=ROWS, callback=print), "next: did you mean callbacks?"),
        (lambda: backhand.train(data=ROWS, callbak=print), "next: did you mean callbacks?"),
        (lambda: backhand.decide("a", adapter="b", state_s=["c"]), "next: did you mean state"),
        (
            lambda: backhand.train(data=ROWS, context=[{"role": "system"}]),
            "is not text\n  next: write it as text: json",
        ),
        (lambda: backhand.train(data=ROWS, prompt=3), "is not text\n  next: write it as text: str(…)"),
        (lambda: backhand.embed("a", batch_size=4), "next: here it is micro_batch_rows"),
        (lambda: backhand.embed("a", gradient_accumulation_steps=4), "here it is batch_rows in backhand.train"),
        (lambda: backhand.rank("a", ["b"], top=1), "top: backhand.rank returns the scores of all documents"),
        (lambda: backhand.rank("a", ["b"], output="o"), "backhand.rank returns the scores\n  next: leave output out"),
        (lambda: backhand.decide("a", adapter="b", output="o"), "backhand.decide returns the answers"),
        (lambda: backhand.decide(text="a", adapter="b"), "decide has no option text\n  next: here it is state"),  # type: ignore[call-overload]
        (lambda: backhand.decide(texts=["a"], adapter="b"), "has no option texts\n  next: here it is states"),  # type: ignore[call-overload]
        (
            lambda: backhand.decide(text="a"),
            "no option text, and needs the argument adapter\n  next: here it is state;",
        ),  # type: ignore[call-overload]
        (lambda: backhand.decide("a", adapter="b", question={}), "did you mean questions?"),
        (lambda: backhand.generate(text="a"), "next: here it is prompt"),  # type: ignore[call-overload]
        (lambda: backhand.classify(texts=["a"]), "next: here it is prompts"),  # type: ignore[call-overload]
        (lambda: backhand.embed(prompts=["a"]), "next: here it is texts"),
        (lambda: backhand.rank(text="a", documents=["b"]), "and needs the argument query\n  next: here it is query"),  # type: ignore[call-arg]
        (lambda: backhand.train(data=ROWS, learning_rate="atuo"), "did you mean auto?"),
        (lambda: backhand.train(data=ROWS, reward="exat", objective="grpo"), "did you mean exact?"),
        (lambda: backhand.merge("a", output="b", dtype="half"), "next: here it is float16"),
        (
            lambda: backhand.train(data=ROWS, learning_rate="1e-4"),
            "learning_rate '1e-4' is a text, not a finite number above 0\n  next: give learning_rate=1e-4",
        ),
        (lambda: backhand.train(data=ROWS, learning_rate="abc"), "give learning_rate a finite number above 0"),
        (lambda: backhand.train(data=ROWS, epochs="2"), "not an integer of at least 1\n  next: give epochs=2"),
        (lambda: backhand.train(data=ROWS, max_steps=2.5), "next: give max_steps=2"),
        (lambda: backhand.train(data=ROWS, batch_rows=0), "next: give batch_rows=1 or more"),
        (lambda: backhand.train(data=ROWS, eval_fraction=20), "in [0, 1)\n  next: give eval_fraction=0.2"),
        (lambda: backhand.export("a", to="onnx", output="b"), 'next: give to="peft", or another of these'),  # type: ignore[arg-type]
        (lambda: backhand.train(data=ROWS, num_labels=1), 'next: here it is problem_type="regression"'),
        (lambda: backhand.train(data=ROWS, num_labels=3), "next: here it is class_labels"),
        (lambda: backhand.generate("a", do_sample=False), "next: here it is greedy=True"),
        (lambda: backhand.train(data=ROWS, callbacks=Foreign()), "Foreign has on_step_end, which is never called\n"),
        (lambda: backhand.train(data=ROWS, callbacks=Foreign()), "next: write stepped instead of on_step_end"),
        (lambda: backhand.train(data=ROWS, callbacks=backhand.Observer()), "has none of the methods started, stepped,"),
        (lambda: backhand.train(data=ROWS, callbacks=Misspelt()), "next: did you mean stepped instead of steped?"),
        (lambda: backhand.train(data=ROWS, quantize="q4"), "next: here it is q4_0"),
    ],
)
def test_wrong_names_are_answered_with_the_right_ones(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        call()
    assert said in str(refused.value)


def test_a_misspelt_choice_is_answered_with_the_near_one_once() -> None:
    """Every option that is a choice, of every function."""
    required: dict[str, dict[str, Any]] = {
        "export": {"adapter": "a", "to": "gguf", "output": "b"},
        "merge": {"adapter": "a", "output": "b"},
        "generate": {"prompt": "a"},
        "decide": {"state": "a", "adapter": "b"},
        "embed": {"texts": "a"},
        "rank": {"query": "a", "documents": ["b"]},
        **{function: {"data": ROWS} for function in ("lint", "mine", "evaluate", "plan", "train")},
    }
    kinds: dict[str, type] = {"train": backhand.TrainConfig, "export": ExportOptions, "merge": MergeOptions}
    kinds |= {"generate": GenerateOptions, "decide": DecideOptions, "embed": EmbedOptions, "rank": RankOptions}
    kinds |= {"lint": LintOptions, "mine": MineOptions, "evaluate": backhand.EvaluateOptions, "plan": PlanOptions}
    assert required.keys() == kinds.keys()
    for function, kind in kinds.items():
        for field in option_fields(kind):
            members = union_members(split_hint(field.hint)[0])
            choices = [word for one in members if get_origin(one) is Literal for word in get_args(one)]
            words = [word for word in choices if len(word) > 3 and word[-1].isalpha()]
            if not words or takes_several(field.hint):
                continue
            typed = words[-1] + words[-1][-1]  # the last letter is doubled
            with pytest.raises(UsageError) as refused:
                getattr(backhand, function)(**required[function] | {field.name: typed})
            said = str(refused.value)
            assert said.startswith(f"{field.name} {typed!r} is not "), said
            assert said.endswith(f"did you mean {words[-1]}?"), said
    with pytest.raises(UsageError, match="did you mean tensorboard"):
        backhand.train(report_to=["wandb", "tensorbord"])


def test_a_misspelt_choice_in_a_file_or_a_question_is_answered_too(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[optimization]\nschedule = "cosin"\n')
    with pytest.raises(UsageError, match=r"optimization\.schedule: 'cosin' is not one of") as refused:
        load_config(tmp_path / "run.toml")
    assert refused.value.next_step == "did you mean cosine?"
    with pytest.raises(DataError, match="the question 'a' has the unknown type 'chioce'") as malformed:
        question_of("a", {"type": "chioce"}, "row 1")
    assert malformed.value.next_step == "did you mean choice?"


def test_malformed_questions_are_named_with_the_form_to_write(tmp_path: Path) -> None:
    choice = {"type": "choice", "criteria": {"A": None, "B": None}}
    for key, meant in (("question", "instructions"), ("instruction", "instructions"), ("options", "criteria")):
        with pytest.raises(DataError, match=f"'lang' has the unknown key '{key}'") as refused:
            backhand.decide("a", adapter="b", questions={"lang": choice | {key: "Which letter?"}})
        assert (refused.value.where, refused.value.next_step) == ("questions", f"did you mean {meant}?")
    with pytest.raises(DataError, match="a value of type DataFrame, not a table of questions by name"):
        backhand.decide("a", adapter="b", questions=pd.DataFrame(ROWS))  # type: ignore[call-overload]
    with pytest.raises(DataError, match="the keys of a question are type, instructions, criteria"):
        backhand.decide(states=["a"], adapter="b", questions={"lang": choice | {"zzz": 1}})
    with pytest.raises(DataError, match="the question 'label' is the text 'Which") as refused:
        backhand.decide("a", adapter="b", questions={"label": "Which?"})
    example = str(refused.value.next_step).removeprefix("write it as ")
    assert refused.value.where == "questions"
    with pytest.raises(ArtifactError, match="no such directory"):  # the questions are accepted
        backhand.decide("a", adapter=tmp_path / "b", questions=json.loads(example))


def test_a_missing_file_of_rewards_is_answered_with_the_files_there(tmp_path: Path) -> None:
    for name in ("reward.py", "a1.py", "a2.py"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"there is no file .*rewards.py\n  next: did you mean .*reward.py\?$"):
        backhand.train(data=ROWS, objective="grpo", reward=f"{tmp_path / 'rewards.py'}:synopsis")
    with pytest.raises(UsageError, match=r"there is no file .*xyz.py\n  next: the files there are .*a1.py, .*a2.py"):
        backhand.train(data=ROWS, objective="grpo", reward=f"{tmp_path / 'xyz.py'}:synopsis")
    (tmp_path / "a.file").touch()
    with pytest.raises(UsageError, match=r"neither a built-in reward nor .*\n  next: built in are exact"):
        backhand.train(data=ROWS, objective="grpo", reward=f"{tmp_path}/no file.file:1")


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("add: --prompt '{a}\\n{b}' --completion team", 'add: prompt="{a}\\n{b}", completion="team"'),
        ("add --prompt 'say \"x\"', --completion as well", 'add prompt="say \\"x\\"", completion as well'),
        ("--output runs/a --max-steps 1,024 --dora", 'output="runs/a", max_steps=1024 --dora'),
        ("leave --prompt out, or --skip-bad.", "leave prompt out, or skip_bad=True."),
        (
            "--columns chosen=best --target-modules q_proj,k_proj",
            'columns={"chosen": "best"}, target_modules=["q_proj", "k_proj"]',
        ),
        ("give --columns a=b --columns 'c=d e' to it", 'give columns={"a": "b", "c": "d e"} to it'),
        (
            "--reward f.py:g --reward exact --reward-weights 1 --reward-weights 0.5",
            'reward=["f.py:g", "exact"], reward_weights=[1, 0.5]',
        ),
        ("--question COLUMN='…' also puts", 'question={"COLUMN": "…"} also puts'),
        ("--prompt synopsis --completion section", 'prompt="synopsis", completion="section"'),
        ("--prompt 'a b' --completion section", 'prompt="a b", completion="section"'),
        ("if pairs are meant, add: --completion chosen", 'if pairs are meant, add: completion="chosen"'),
        ("give --model '/home/me/my models/x'", 'give model="/home/me/my models/x"'),
        ("leave --prompt out", "leave prompt out"),
        ("others are named with --prompt and --completion", "others are named with prompt and completion"),
        ("give --prompt or --completion", "give prompt or completion"),
        ("--chat-template none, --objective dpo", 'chat_template="none", objective="dpo"'),
        ("`backhand lint --data FILE` lists them", "`backhand.lint(data=…)` lists them"),
        (
            "leave it out with --skip-bad; `backhand lint` lists all",
            "leave it out with skip_bad=True; `backhand.lint` lists all",
        ),
        ("--prompt a --model b; `backhand report --page x`", 'prompt="a", model="b"; `backhand report --page x`'),
        ("labels: backhand generate --labels auto", 'labels: backhand.generate(…, labels="auto")'),
        ("use backhand rank, or give --adapter A", "use backhand.rank, or give --adapter A"),
        ("add --columns a=b --columns c=d; or", 'add columns={"a": "b", "c": "d"}; or'),
        ("add --question team; or", 'add question="team"; or'),
        ("continue with backhand train --resume", "continue with backhand.train(…, resume=True)"),
        (
            "`backhand export --adapter runs/a --to peft --output runs/p --push OWNER/NAME` uploads",
            '`backhand.export(adapter="runs/a", to="peft", output="runs/p", push="OWNER/NAME")` uploads',
        ),
        (
            "write `backhand export --adapter runs/a --to peft`",
            'write `backhand.export(…, adapter="runs/a", to="peft")`',
        ),
        ("backhand classify --text '…'", "backhand classify --text '…'"),
    ],
)
def test_advice_is_written_as_python(typed: str, written: str) -> None:
    assert callable(backhand.train), "the functions are known once they are imported"
    hints = {field.option: field.hint for field in option_fields(backhand.TrainConfig)}
    assert in_python(typed, hints) == written


def test_notes_are_written_as_python(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame(ROWS).rename(columns={"prompt": "asked", "completion": "said"})
    made = options(tiny, tmp_path / "run", data=frame, eval_data=frame[:4], quiet=False, max_steps=1)
    run = backhand.train(**made | {"learning_rate": "auto", "prompt": "{asked}\n", "completion": "said"})
    backhand.evaluate(data=frame, adapter=run.adapter, model=tiny.model, threads=1, completions=False)
    written = "".join(capsys.readouterr())
    assert "another by learning_rate\n" in written and "example eval_data row 1;" in written
    assert 'columns are read as in the adapter\'s training: prompt="{asked}\\n", completion="said"' in written
    assert "python:" not in written
    assert 'data = ["python:' in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("call", "target", "printed"),
    [
        (lambda: backhand.evaluate(data=ROWS), "backhand.loop.evaluate.evaluate", True),
        (lambda: backhand.export("a", to="gguf", output="b"), "backhand.api.export_command", True),
        (lambda: backhand.export("a", to="gguf", output="b", quiet=True), "backhand.api.export_command", False),
        (
            lambda: backhand.train(backhand.TrainConfig(run=backhand.RunOptions(quiet=True)), data=ROWS),
            "backhand.api.train_with_report",
            False,
        ),
    ],
)
def test_a_long_call_prints_what_it_does_unless_it_is_quiet(
    call: Callable[[], object],
    target: str,
    printed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(printing, "SILENCE_S", 0.02)
    monkeypatch.setattr(printing, "_LOOK_S", 0.01)
    line = threading.Event()

    def say(text: str) -> None:
        print(text, file=sys.stderr)
        if "16 of 100" in text:
            line.set()

    monkeypatch.setattr(printing, "say", say)

    def work(*_: object, **__: object) -> None:
        with printing.going_on("base model, 16 of 100 rows"):
            line.wait(10 if printed else 0.1)
        raise UsageError("enough")

    monkeypatch.setattr(target, work)
    with pytest.raises(UsageError, match="enough"):
        call()
    said = capsys.readouterr().err
    assert (": base model, 16 of 100 rows\n" in said) is printed and ("still at work" in said) is printed


def test_results_and_files_name_options_as_the_call_does(tiny: TinyRun, tmp_path: Path) -> None:
    rows = [{"request": row["prompt"], "reply": row["completion"]} for row in ROWS]
    linted = backhand.lint(data=[*rows, rows[0]], model=tiny.model)
    (note,) = linted["train"]["notes"]
    assert note == (
        "the column request is read as the prompt and reply as its completion; "
        "others are named with prompt and completion"
    )
    assert linted["findings"][0]["where"][0] == "data row 13 = data row 1"
    assert "skip_bad=True" in backhand.lint(data=[*ROWS, {}], model=tiny.model)["findings"][0]["remedy"]
    planned: dict[str, Any] = {"model": tiny.model, "calibrate": False, "threads": 1}
    (assumed,) = (note for note in backhand.plan(**planned)["notes"] if "assumed" in note)
    assert assumed.startswith("no data: rows of") and "(max_length)" in assumed
    many = [{"prompt": f"asks {number}", "completion": "yes"} for number in range(60)]
    first, *others = backhand.plan(data=many, **planned)["notes"]
    assert first == "data: prompt/completion, 60 rows"
    held_out = (
        "6 of these 60 rows, of which the other 54 are trained on; drawn at random with the seed; "
        "to train on these too, give eval_fraction=0"
    )
    assert any(note.startswith("held out: 6 documents") and held_out in note for note in others)
    made = options(tiny, tmp_path / "run", data=ROWS, learning_rate=0.1, epochs=4, eval_every=1)
    assert "eval_data=…" in str(backhand.train(**made).advice)
    assert "eval_data=…" in json.loads((tmp_path / "run" / "summary.json").read_text())["advice"]
    assert "--eval-data FILE" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("no rows", next_step="go on with --resume"), "no rows\n  next: go on with resume=True"),
        (KeyError("eval_loss"), "KeyError: 'eval_loss'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_the_status_of_a_run_that_failed_says_what_the_exception_says(
    error: Exception, reason: str, tiny: TinyRun, tmp_path: Path
) -> None:
    def failing(record: Mapping[str, Any]) -> None:
        if record["step"] == 2:
            raise error

    with pytest.raises(type(error)) as raised:
        backhand.train(**options(tiny, tmp_path / "run", data=ROWS, save_every=1, callbacks=failing))
    status = read_status(tmp_path / "run")
    assert status is not None and status.reason == reason
    assert "after the checkpoint of step 1: continue with backhand.train(" in "".join(raised.value.__notes__)
    assert (tmp_path / "run" / "report.html").exists()


def test_an_error_in_a_callback_leaves_no_run_that_blocks_the_corrected_call(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = options(tiny, tmp_path / "run", data=ROWS, max_steps=2)
    with pytest.raises(KeyError) as raised:
        backhand.train(**made, callbacks=lambda record: record["los"])
    assert raised.value.__notes__ == ["the run had no checkpoint yet, and its directory was removed"]
    assert not (tmp_path / "run").exists()
    assert "report" not in capsys.readouterr().err
    assert backhand.train(**made, callbacks=lambda record: record.get("loss")).steps == 2


def test_only_notes_are_written_as_python(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands of other programs, answers and cells of tables were changed as well."""
    line = "next: llama-server --pooling mean -m BASE.gguf"

    @errors_in_python(ExportOptions)
    def printing() -> None:
        say(line)
        console().print(line, soft_wrap=True)
        show_notes(["add: --pooling mean", "for vectors: use backhand embed"])

    printing()
    out, err = capsys.readouterr()
    assert out == f"{line}\n"
    assert err == f'{line}\nnote: add: pooling="mean"\nnote: for vectors: use backhand.embed\n'


def test_one_text_or_callback_is_taken_for_a_list(tiny: TinyRun, tmp_path: Path) -> None:
    assert backhand.RewardOptions(reward="exact") == backhand.RewardOptions(reward=("exact",))  # type: ignore[arg-type]
    assert backhand.RunOptions(report_to="mlflow").report_to == ("mlflow",)  # type: ignore[arg-type]
    records: list[Mapping[str, Any]] = []
    backhand.train(**options(tiny, tmp_path / "run", data=ROWS, max_steps=1, eval_data=()), callbacks=records.append)
    assert [record["step"] for record in records] == [1]


def test_numpy_s_false_from_a_callback_ends_the_run() -> None:
    assert Observers(as_observers([lambda record: np.mean([1]) > 2])).stepped({"loss": 1.0}) is False


@pytest.mark.parametrize("held_out", [True, False])
def test_a_callback_that_returns_false_ends_the_run_as_early_stopping_does(
    held_out: bool, tiny: TinyRun, tmp_path: Path
) -> None:
    made = options(tiny, tmp_path / "run", data=ROWS, epochs=3, eval_every=5)
    if not held_out:
        made |= {"eval_data": (), "eval_fraction": 0.0}
    summary = backhand.train(**made, callbacks=[lambda record: record["step"] < 4])
    assert (summary.steps, summary.stopped_because) == (4, "a callback returned False")
    assert list(summary.losses) == [1, 2, 3, 4] and list(summary.eval_losses) == ([0, 4] if held_out else [])
    status = read_status(tmp_path / "run")
    assert status is not None and (status.state, status.step) == ("finished", 4)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_because"] == summary.stopped_because
    assert (tmp_path / "run" / "report.html").exists() and adapter_bytes(tmp_path / "run")
    resumed = backhand.train(**made, resume=True, callbacks=[lambda record: record["step"] < 9])
    assert (resumed.steps, resumed.stopped_because) == (9, "a callback returned False")
    assert list(resumed.losses) == [*range(1, 10)] and backhand.train(**made, resume=True) == resumed
    whole = backhand.train(**{**made, "output": tmp_path / "whole"})
    assert whole.losses == resumed.losses and adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_an_observer_may_end_the_run_too(tiny: TinyRun, tmp_path: Path) -> None:
    class Enough(backhand.Observer):
        def evaluated(self, record: Mapping[str, Any]) -> bool:
            return record["step"] < 2

    made = options(tiny, tmp_path / "run", data=ROWS, epochs=9, eval_every=2)
    assert backhand.train(**made, callbacks=[Enough(), print]).steps == 2


def test_every_record_of_a_function_has_step_and_loss(tiny: TinyRun, tmp_path: Path) -> None:
    records: list[Mapping[str, Any]] = []
    made = options(tiny, tmp_path / "run", data=ROWS, max_steps=2, eval_every=1)
    summary = backhand.train(**made, callbacks=[records.append])
    kinds = [(record["step"], "eval_loss" in record) for record in records]
    assert kinds == [(1, False), (1, True), (2, False), (2, True)]
    assert [record["loss"] for record in records[::2]] == [record["loss"] for record in records[1::2]]
    assert summary.losses == {record["step"]: record["loss"] for record in records}
    assert [record["step"] for record in summary.records] == [0, 1, 1, 2, 2]


def test_prompts_are_answered_with_texts(trained: Any, tiny: TinyRun) -> None:
    common = {"adapter": trained.adapter, "model": tiny.model, "max_new_tokens": 4, "greedy": True, "threads": 1}
    one = backhand.generate("the user asks 3", **common)
    two = backhand.generate(prompts=["the user asks 3", "a list"], **common)
    lines = backhand.generate(data=pd.DataFrame(ROWS[3:4]), **{**common, "adapter": Path(trained.adapter)})
    assert isinstance(one, str) and two[0] == one and len(two) == 2
    assert lines[0]["completion"] == one and lines[0]["reference"] == "no"
    assert backhand.generate(prompts=[], **common) == []
    series = pd.Series(["the user asks 3", "a list"])
    assert backhand.generate(prompts=series, **{**common, "adapter": trained}) == two  # type: ignore[call-overload]
    vectors = backhand.embed(series, model=tiny.model, pooling="mean", threads=1)  # type: ignore[arg-type]
    assert len(vectors) == 2
    with pytest.raises(BackhandError, match="not trained to decide"):
        backhand.decide(states=series, adapter=trained, model=tiny.model)  # type: ignore[call-overload]


def test_labels_are_decided_with_probabilities(trained: Any, tiny: TinyRun) -> None:
    common = {"adapter": trained.adapter, "model": tiny.model, "threads": 1}
    one = backhand.classify("the user asks 3", **common)
    assert set(one) == {"yes", "no"} and sum(one.values()) == pytest.approx(1)
    assert list(one.values()) == sorted(one.values(), reverse=True)
    several = backhand.classify(prompts=["the user asks 3", "a"], labels="b,c", **common)  # type: ignore[call-overload]
    assert [set(row) for row in several] == [{"b", "c"}] * 2
    assert backhand.generate("the user asks 3", labels="auto", **common) == next(iter(one))
    rows = [{"name": "the user asks 3"}, {"name": "a list"}]
    of_texts = backhand.classify(prompts=[row["name"] for row in rows], **common)
    assert backhand.classify("name", data=rows, **common) == of_texts
    with pytest.raises(DataError, match=r"absent.jsonl: there is no such file"):
        backhand.classify("name", data="absent.jsonl", **common)
    with pytest.raises(BackhandError, match="there is no column"):
        backhand.classify("nmae", data=rows, **common)


def test_evaluate_takes_options_by_name_and_returns_what_json_prints(
    trained: Any, tiny: TinyRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from backhand.cli.main import main

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = backhand.evaluate(data=ROWS, adapter=trained.adapter, model=tiny.model, threads=1)
    words = ["--adapter", trained.adapter, "--model", str(tiny.model), "--threads", "1", "--data", str(path), "--json"]
    assert main(["evaluate", *words]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result.as_dict()))
    common = {"adapter": trained.adapter, "model": tiny.model, "threads": 1}
    rewarded = backhand.evaluate(data=ROWS, reward="exact", max_new_tokens=4, **common)
    assert main(["evaluate", *words, "--reward", "exact", "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out) == rewarded.as_dict()
    assert rewarded.rows == 12 and rewarded.gain is not None
    values = rewarded.as_dict()
    assert (values["gain"], *values["gain_interval"]) == rewarded.gain
    assert "gain" not in backhand.evaluate(data=ROWS, reward="exact", max_new_tokens=1, model=tiny.model).as_dict()
    assert result.base.perplexity == pytest.approx(math.exp(result.base.loss))


def test_every_stage_of_a_call_is_named(
    trained: Any, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the longest silence, the calls said only their own name."""

    class Named(list[Any]):
        def append(self, what: Any) -> None:
            stages.append(what)
            super().append(what)

    stages: list[Any] = []
    monkeypatch.setattr(printing, "_activities", Named())
    given = {"adapter": trained, "model": tiny.model, "quiet": True}
    backhand.export(**given, to="peft", output=tmp_path / "peft")
    exported = stages[:3]
    assert exported == ["backhand.export", "reading the base model and the adapter", "writing and proving the output"]
    stages.clear()
    backhand.merge(**given, output=tmp_path / "merged")
    assert ["backhand.merge", *exported[1:]] == stages[:3]
    stages.clear()
    backhand.generate("a", **given, max_new_tokens=1)
    assert stages[:2] == ["backhand.generate", "reading the base model"]
    stages.clear()
    backhand.train(**options(tiny, tmp_path / "run", data=ROWS, max_steps=1))
    assert stages[1] == "the files of the run" and stages[-1] == "writing the report"


def test_export_returns_the_path(trained: Any, tiny: TinyRun, tmp_path: Path) -> None:
    written = backhand.export(trained.adapter, to="peft", output=str(tmp_path / "out"), model=tiny.model, quiet=True)
    assert written == tmp_path / "out" and (written / "adapter_config.json").exists()


def test_lint_plan_and_mine_return_what_json_prints(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from backhand.cli.main import main

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0]]))
    words = ["--data", str(path), "--model", str(tiny.model)]

    def printed(*command: str) -> Any:
        assert main([*command, *words]) == 0
        return capsys.readouterr().out

    common: dict[str, Any] = {"data": path, "model": tiny.model}
    linted = backhand.lint(**common, show=1)
    assert "duplicates" in str(linted["findings"]) and linted["shown"]
    assert json.loads(printed("lint", "--show", "1", "--json")) == json.loads(json.dumps(linted))
    broken = backhand.lint(data=[*ROWS, {"prompt": 3, "completion": "a"}], model=tiny.model)
    assert broken["errors"] == 1, "a malformed row is a finding, not an error"
    planned = backhand.plan(**common, calibrate=False, threads=1, max_steps=3)
    assert planned["steps"] == 3
    options = ["--no-calibrate", "--threads", "1", "--max-steps", "3", "--json"]
    assert json.loads(printed("plan", *options)).keys() == planned.keys()
    mined = backhand.mine(**common, pooling="mean", threads=1)
    lines = printed("mine", "--pooling", "mean", "--threads", "1").splitlines()
    assert [json.loads(line) for line in lines] == mined and {*mined[0]} == {"anchor", "positive", "negative_1"}
    with pytest.raises(UsageError, match=r"backhand\.mine returns the rows"):
        backhand.mine(**common, output=tmp_path / "mined.jsonl")


def test_verifying_a_run_on_rows_in_memory_names_the_command_that_works(
    trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from backhand.cli.main import main

    run = Path(trained.adapter).parent
    assert main(["verify", "--run", str(run)]) == UsageError.exit_code
    shown = capsys.readouterr().err
    assert "the rows of this run were given by a program" in shown and "takes minutes" not in shown
    assert f"or prove the gradients on neutral texts: backhand verify --adapter {run}" in shown
    assert main(["verify", "--adapter", str(run / "adapter"), "--max-tokens", "32"]) == 0
    rows = run / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["verify", "--run", str(run), "--data", str(rows), "--max-tokens", "32"]) == 0


def test_prompts_for_a_baked_adapter_are_answered_by_its_teacher(trained: Any, tiny: TinyRun, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained.adapter, adapter)
    record = json.loads((adapter / "backhand.json").read_text())
    record["config"]["objective.objective"] = "bake"
    del record["labels"]
    (adapter / "backhand.json").write_text(json.dumps(record))
    with pytest.raises(DataError) as refused:
        backhand.evaluate(data=[{"prompt": "the user asks"}], adapter=adapter, model=tiny.model)
    said = str(refused.value.next_step)
    assert said.endswith("base model first: backhand.generate(data=…, context=CONTEXT, as_rows=True)")


def test_merge_returns_the_path(trained: Any, tiny: TinyRun, tmp_path: Path) -> None:
    merged = backhand.merge(trained, output=tmp_path / "merged", model=tiny.model, quiet=True)
    assert merged == tmp_path / "merged" and (merged / "model.safetensors").exists()


def test_a_dash_is_standard_input(tiny: TinyRun, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    words = ["train", "--model", str(tiny.model), "--data", "-", "--max-steps", "1", "--threads", "1", "--quiet"]
    ended = subprocess.run(
        [sys.executable, "-m", "backhand", *words, "--output", str(tmp_path / "run")],
        input=text,
        text=True,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"] == len(ROWS)


def test_a_callback_that_is_none_is_refused_before_anything(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        backhand.train(**options(tiny, tmp_path / "run", data=str(tiny.rows)), callbacks=[print, "x"])
    assert refused.value.where == "callbacks[1]" and not (tmp_path / "run").exists()


def test_a_callback_ends_the_run_of_every_process(tiny: TinyRun, tmp_path: Path) -> None:
    made = options(tiny, tmp_path / "run", data=str(tiny.rows), epochs=9, eval_data=())
    program = (
        "import backhand\nfrom pathlib import Path\n"
        f"made = { ({name: str(one) if isinstance(one, Path) else one for name, one in made.items()})!r}\n"
        "summary = backhand.train(**made, callbacks=[lambda record: record['step'] < 2])\n"
        "print(summary.steps, summary.stopped_because)\n"
    )
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    assert printed == ["2 a callback returned False"] * 2


def test_the_page_of_python_names_everything_that_the_package_has() -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    names = [f"backhand.{name}" for name in backhand.__all__]
    assert not [name for name in names if not re.search(rf"\b{name}\b|`{name.partition('.')[2]}`", page)]


def test_functions_without_options_answer_wrong_arguments(tmp_path: Path) -> None:
    tensor, module = torch.zeros(2), torch.nn.Linear(2, 2)
    wrong: list[tuple[Callable[[], object], str]] = [
        (
            lambda: backhand.compare("a", "b"),
            "missing a required argument: 'autograd'\n  next: call",
        ),  # type: ignore[call-arg]
        (lambda: backhand.compare(tensor, tensor, "a"), "autograd 'a' is no tensor"),  # type: ignore[arg-type]
        (lambda: backhand.compare("a", [[1], [1, 2]], tensor), "by_hand [[1], [1, 2]] is no tensor"),
        (lambda: backhand.inject(), "missing a required argument: 'module'"),  # type: ignore[call-arg]
        (lambda: backhand.inject(module, rank=2), "inject has no option rank\n  next: write it in LoRAConfig"),  # type: ignore[call-arg]
        (lambda: backhand.inject("base"), "module: str is not a torch.nn.Module\n  next: give the model itself"),  # type: ignore[arg-type]
        (lambda: backhand.inject_from(tmp_path, module), "is not a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: backhand.inject_from(module, 5), "directory: 5 is not a path"),  # type: ignore[arg-type]
        (lambda: backhand.AdapterCallback(module), "adapter is a Linear, not an injected adapter"),  # type: ignore[arg-type]
        (lambda: backhand.LoRAConfig(*range(99)), "and 99 values are given\n  next: give options by name: rank"),  # type: ignore[arg-type]
    ]
    for call, said in wrong:
        with pytest.raises(UsageError) as refused:
            call()
        assert said in str(refused.value)


def test_the_notebook_runs(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, with a tiny base model; tests/docs/test_blocks.py runs its page with the model that it names."""
    notebook = Path(__file__).parents[1] / "docs" / "python.ipynb"
    shutil.copy(tiny.rows, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in ("train", "generate", "classify", "evaluate", "export"):
        monkeypatch.setattr(backhand, name, partial(getattr(backhand, name), model=tiny.model))
    names: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["config"].run.output == Path("runs/objects") and names["result"].rows == 6
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == (
        ["again", "objects", "observed", "python", "python.gguf", "short"]
    )
