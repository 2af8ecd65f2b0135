"""What `backhand evaluate` measures: each row once, loss and exact match on the same ones, and the rest is said."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import backhand
from backhand.cli.main import main
from backhand.data.options import DataOptions
from backhand.errors import DataError
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.loop.evaluate import Evaluation, EvaluationRows, evaluate, evaluation_rows
from backhand.nn.model_options import BaseModelOptions
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions


@pytest.fixture(scope="module")
def loaded(model_directory: Path) -> Iterator[LoadedModel]:
    with loaded_model(BaseModelOptions(model=str(model_directory), dtype="float32")) as model:
        yield model


def rows_of(loaded: LoadedModel, path: Path, **options: Any) -> EvaluationRows:
    return evaluation_rows(DataOptions(data=(str(path),), **options), loaded, EvaluateRunOptions())


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(prompt: str, completion: str = "a number") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_a_pipe_is_read_once(loaded: LoadedModel, tmp_path: Path) -> None:
    text = written(tmp_path / "rows.jsonl", row("the user"), row("asks")).read_text()
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    found = rows_of(loaded, pipe)
    writer.join()
    assert (found.rows, len(found.prompts)) == (2, 2)


def test_rows_left_out_are_left_out_of_both_and_said(loaded: LoadedModel, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", row("the user"), row("asks"), "{", row("the user", "number " * 60))
    found = rows_of(loaded, path, skip_bad=True, max_length=40, long_rows="drop")
    assert (found.rows, len(found.prompts)) == (2, 2)
    assert [note.split(":")[0] for note in found.notes] == [
        "1 document longer than max_length, left out",
        "1 malformed row left out, the first",
    ]
    cut = rows_of(loaded, path, skip_bad=True, max_length=40)
    assert (cut.rows, len(cut.prompts)) == (3, 3) and "truncated" in cut.notes[0]


def test_rows_that_end_in_a_question_have_a_loss_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "asks"}, {"role": "assistant", "content": "json"}
    path = written(tmp_path / "rows.jsonl", {"messages": [asked, said]}, {"messages": [asked, said, asked]})
    found = rows_of(loaded, path)
    assert (found.rows, len(found.prompts)) == (2, 1)
    assert found.notes == ("1 row without a reply at the end: no exact match, the loss alone",)


@pytest.mark.parametrize(("good", "bad", "named"), [(True, False, None), ("yes", "no", "label"), (1, 0, "label")])
def test_undesirable_answers_are_left_out(
    good: Any, bad: Any, named: str | None, loaded: LoadedModel, tmp_path: Path
) -> None:
    labelled = [{**row("the user", f"a number {n}"), "label": good if n % 3 else bad} for n in range(6)]
    path = written(tmp_path / "rows.jsonl", *labelled)
    columns = {} if named is None else {"label": named}
    found = rows_of(loaded, path, columns=columns)
    assert found.notes == ("2 answers labelled undesirable are left out",)
    assert (found.rows, found.undesirable, len(found.prompts)) == (4, 2, 4)
    same = rows_of(loaded, written(tmp_path / "good.jsonl", *(one for one in labelled if one["label"] == good)))
    assert found.held_out.supervised_tokens == same.held_out.supervised_tokens
    if named is None:
        with pytest.raises(DataError, match="every answer is labelled undesirable"):
            rows_of(loaded, written(tmp_path / "bad.jsonl", *(one for one in labelled if one["label"] == bad)))
    else:
        assert rows_of(loaded, path).rows == 6, "a column that may have another meaning is not read unless it is named"


def test_the_command_says_it_with_its_results(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "rows.jsonl", row("the user"), "{")
    options = EvaluateOptions(
        model=ModelOptions(model=str(model_directory), dtype="float32"),
        data=DataOptions(data=(str(path),), skip_bad=True),
        run=EvaluateRunOptions(max_new_tokens=2),
    )
    assert evaluate(options).rows == 1
    assert "note: 1 malformed row left out, the first: " in capsys.readouterr().err


def test_the_change_of_the_loss_has_a_paired_interval(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("the user", "a number " * count) for count in (1, 3, 2, 4)]
    trained = {"model": str(model_directory), "dtype": "float32", "output": tmp_path / "run", "answers": 0}
    backhand.train(data=rows, **trained, eval_fraction=0, max_steps=3, learning_rate=3e-3, warmup_steps=0)
    given = ["--model", str(model_directory), "--adapter", str(tmp_path / "run" / "adapter"), "--max-new-tokens", "2"]
    path = written(tmp_path / "rows.jsonl", *rows)
    capsys.readouterr()
    assert main(["evaluate", *given, "--data", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "row_losses" not in found["base"]
    change, (low, high) = found["loss_change"], found["loss_change_interval"]
    assert change == pytest.approx(found["adapted"]["loss"] - found["base"]["loss"]) and low < change < high
    assert main(["evaluate", *given, "--data", str(path)]) == 0
    unclear = ": too few rows" if low <= 0 <= high else ""
    words = f"loss changed by {change:+.4f} nats per token (95 % interval {low:+.4f} to {high:+.4f}){unclear}"
    assert words in capsys.readouterr().out
    one = backhand.evaluate(data=rows[:1], model=str(model_directory), adapter=tmp_path / "run" / "adapter")
    assert isinstance(one, Evaluation) and one.loss_change is None, "one row has no interval"
