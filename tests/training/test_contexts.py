"""Several contexts of prompt baking: an adapter for each file of a directory, or one whose rows name their file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backhand import printing
from backhand.data.context import TeacherPrompts, context_files, context_text, named_contexts
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.data.rows import Completion
from backhand.engines.machine import resolve_machine
from backhand.errors import DataError, UsageError
from backhand.generation import sampling
from backhand.nn.loading import open_model
from backhand.objectives.distillation.packers import DistilledPacker, Lesson
from backhand.ops.linear_divergence import Divergence
from backhand.options.config import TrainConfig
from backhand.report.train import train_command
from backhand.runs.interruption import Interrupted
from backhand.runs.summary import read_summary
from backhand.training.plan import plan_run
from backhand.training.run import train
from tests.support.tiny_run import TinyRun, with_options

TEXTS = {
    "list.txt": "the assistant answers in json and names a list of one number",
    "name.md": "the user asks for one name and the assistant names a user and the list of what a user asks",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of rows that name their contexts in turns, next to a directory `contexts` with these."""
    run = TinyRun(folder := tmp_path_factory.mktemp("contexts"))
    (folder / "contexts").mkdir()
    for name, text in TEXTS.items():
        (folder / "contexts" / name).write_text(text)
    for path in (run.rows, run.held_out):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        named = [{**row, "topic": ("list", "name.md")[number % 2]} for number, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return run


def config(tiny: TinyRun, output: Path, **options: object) -> TrainConfig:
    contexts = str(tiny.rows.with_name("contexts"))
    return tiny.config(output, objective="bake", context=contexts, answers_from="rows", **options)


def test_each_row_has_the_context_that_it_names(tiny: TinyRun) -> None:
    tokenizer = open_model(str(tiny.model)).tokenizer()
    teacher = TeacherPrompts(named_contexts(str(tiny.rows.with_name("contexts"))), column="topic")
    rows, _ = prepare(DataOptions((str(tiny.rows),), eval_fraction=0.0), tokenizer, teacher=teacher)
    for number, student in enumerate(rows.examples):
        assert student.rejected is not None
        read = tokenizer.decode(student.rejected.input_ids)
        assert [text in read for text in TEXTS.values()] == [number % 2 == 0, number % 2 == 1]
    assert not any("topic" in line for line in rows.report.lines()), "the column is read"
    packer = DistilledPacker(rows, Lesson(Divergence(), 1.0, 2), share_prefixes=True, teacher_shares=True)
    passes = packer.teacher_passes(4)
    assert {frozenset(row % 2 for row in group) for group in passes} == {frozenset({0}), frozenset({1})}
    assert sorted(np.concatenate(passes).tolist()) == list(range(len(rows.examples)))
    most = max(packer._teacher_packer.packed_tokens(group) for group in passes)
    assert most <= packer.teacher_pass.tokens(4)


def test_one_adapter_learns_all_contexts_and_resumes_with_the_same_command(tiny: TinyRun, tmp_path: Path) -> None:
    outputs = tmp_path / "straight", tmp_path / "resumed"
    first, second = (config(tiny, output, context_column="topic", eval_every=2) for output in outputs)
    summary = train(first)
    assert summary.best_eval_loss is not None
    assert summary.base_eval_loss is not None
    assert summary.best_eval_loss < summary.base_eval_loss
    with pytest.raises(Interrupted):
        train(second, pause_at=3)
    train(with_options(second, resume=True), typed=frozenset(("context", "context_column")))
    one, other = (output / "adapter" / "adapter_model.safetensors" for output in outputs)
    assert one.read_bytes() == other.read_bytes()
    without_column = with_options(second, resume=True, context_column=None)
    assert list(train_command(without_column)) == [""], "the run itself is resumed, and no new run is inside it"
    assert not (outputs[1] / "list").exists()


def test_the_teacher_answers_with_the_context_of_each_row(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, activities = sampling.draw, []

    def noted(*args: Any) -> sampling.Drawn:
        activities.append(printing.now())
        return draw(*args)

    monkeypatch.setattr(sampling, "draw", noted)
    asked = config(tiny, tmp_path / "run", context_column="topic", answers=2, max_new_tokens=3, max_steps=1)
    summary = train(with_options(asked, answers_from="teacher"))
    assert summary.distilled is not None
    trained = len(tiny.rows.read_text().splitlines())
    counted = [text for text in activities if text.startswith("teacher's answers, ")]
    assert counted[0] == f"teacher's answers, 0 of {trained} prompts"
    assert len({text.partition(" of ")[0] for text in counted}) > 2, "answers are counted as they end"
    plan = plan_run(with_options(asked, answers_from="teacher"), resolve_machine(asked))
    assert plan.memory.peak_bytes > 0
    lines = (tmp_path / "run" / "teacher_answers.jsonl").read_text().splitlines()[1:]
    assert len(lines) == trained + len(tiny.held_out.read_text().splitlines())


def test_a_directory_makes_an_adapter_of_each_file(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(tiny, tmp_path / "runs", max_steps=2)
    summaries = train_command(replace(asked, run=replace(asked.run, quiet=False)))
    assert list(summaries) == ["list", "name"]
    assert "Context 2 of 2: name" in capsys.readouterr().err
    adapters = [(tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in summaries]
    alone = tmp_path / "alone"
    train(with_options(asked, output=alone, context=str(tiny.rows.with_name("contexts") / "name.md")))
    assert adapters[1] == (alone / "adapter" / "adapter_model.safetensors").read_bytes() != adapters[0]
    with pytest.raises(UsageError, match="list, name exist already"):
        train_command(asked)
    (tmp_path / "runs" / "name").rename(tmp_path / "gone")
    assert list(train_command(with_options(asked, resume=True))) == ["list", "name"]
    assert read_summary(tmp_path / "runs" / "name" / "summary.json") is not None


def test_bad_contexts_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        train(config(tiny, tmp_path / "run"))
    with pytest.raises(UsageError, match="is no directory"):
        train(with_options(config(tiny, tmp_path / "run", context_column="topic"), context="answer in one word"))
    with pytest.raises(UsageError, match="is no directory"):
        named_contexts("answer\nin one word")
    with pytest.raises(DataError, match="no context in the column subject"):
        train(config(tiny, tmp_path / "run", context_column="subject"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "for what", "completion": "a name", "topic": "lists"}\n')
    with pytest.raises(DataError, match="no context 'lists'") as error:
        train(config(tiny, tmp_path / "run", context_column="topic", data=(str(rows),)))
    assert error.value.next_step == "did you mean list?"
    (folder := tmp_path / "contexts").mkdir()
    with pytest.raises(UsageError, match="no files"):
        context_files(str(folder))
    for suffix in ("txt", "md"):
        (folder / f"same.{suffix}").write_text("answer in json")
    with pytest.raises(UsageError, match=r"same\.md and same\.txt have the same name"):
        context_files(str(folder))


def test_files_with_long_paths_are_read(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 200) / ("b c" * 60)
    folder.mkdir(parents=True)
    (folder / "list.txt").write_text("answer in json")
    assert context_text(str(folder / "list.txt")) == "answer in json\n"
    assert json.loads(named_contexts(str(folder))) == {"list.txt": "answer in json\n"}
    assert context_text("ü" * 200 + " and a word") == "ü" * 200 + " and a word", "a name of a file is shorter"


def test_a_row_names_a_file_exactly_or_without_its_own_suffix(tmp_path: Path) -> None:
    (tmp_path / "v1.txt").write_text("answer in json")
    teacher = TeacherPrompts(named_contexts(str(tmp_path)), column="topic")
    for name in ("v1", "v1.txt"):
        assert teacher.of(Completion("a", "b", " ", None, "row 1", context=name)).system == "answer in json"
    for name in ("v1.5", "v1.md", "other/v1.txt"):
        with pytest.raises(DataError, match="there is no context"):
            teacher.of(Completion("a", "b", " ", None, "row 1", context=name))
