"""Labels as they are given: none at all, too many, too long for the model, or others than the rows answer with."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.generation.options import AnswerOptions, GenerateOptions
from tests.support.limited import limited
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import write_rows

CONTEXT = 64


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of few positions, rows, and rows with labels."""
    place = tmp_path_factory.mktemp("labels")
    save_tiny(tiny_model("llama-tied", num_hidden_layers=2, max_position_embeddings=CONTEXT), place / "model")
    write_rows(place / "rows.jsonl", 4, seed=0)
    rows = [{"prompt": f"the user asks {number}", "completion": "yes" if number % 2 else "no"} for number in range(6)]
    rows.append({"prompt": "a list of " * 12, "completion": "yes"})
    (place / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def words(command: str, labels: str, *more: object) -> list[object]:
    data = [] if command == "generate" else ["--data", "labelled.jsonl"]
    prompt = ["--prompt", "the user", "--max-new-tokens", 2] if command == "generate" else []
    common = ["--model", "model", "--threads", 1, "--dtype", "float32", "--labels", labels]
    return [command, *common, *data, *prompt, *more]


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize("labels", ["", ",", " , ", ",,,", "\t"])
def test_an_empty_variable_is_not_the_same_as_no_option(command: str, labels: str, short: Path) -> None:
    ended = limited(words(command, labels), short)
    assert ended.code == 2 and "--labels" in ended.what and "contains no name" in ended.what, ended.errors


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("x" * 50_000 + ",y", "has 50,000 characters, more than 1,000"),
        (",".join(map(str, range(10_000))), "10,000 labels are more than 1,000"),
        ("a list of names " * 30 + ",yes", f"tokens, and the model takes {CONTEXT}"),
        ("a,a", "a label is given twice"),
        ("a,", "'a' is the only label"),
        (b"\xff,y".decode(errors="surrogateescape"), "cannot be read"),
    ],
)
def test_labels_that_no_model_answers_with_are_refused(labels: str, says: str, short: Path) -> None:
    began = time.monotonic()
    ended = limited(words("generate", labels), short)
    assert ended.code == 2 and says in ended.what, ended.errors
    assert len(ended.errors) < 3000 and time.monotonic() - began < 30


def test_a_label_is_echoed_shortened(short: Path) -> None:
    ended = limited(words("generate", "the user asks for a list of names and one number " * 2 + ",yes"), short)
    assert ended.code == 0, ended.errors
    line = next(line for line in ended.errors.splitlines() if "yes 0." in line or "yes 1." in line)
    assert "…" in line and len(line) < 100


def test_a_row_without_room_for_a_label_is_a_bad_row(short: Path) -> None:
    long = "the user asks for a list of names and one number,yes"
    more = ["--data", "labelled.jsonl", "--quiet"]
    common = ["generate", "--model", "model", "--threads", 1, "--dtype", "float32", "--labels", long]
    ended = limited([*common, *more], short)
    assert ended.code == 3 and "of a label" in ended.what and ":7" in ended.what, ended.errors
    assert len(limited([*common, *more, "--skip-bad"], short).output.splitlines()) == 6


def test_evaluate_names_a_row_without_room_for_a_label(short: Path) -> None:
    labels = "the user asks for a list of names and one number,yes,no"
    ended = limited(words("evaluate", labels), short)
    assert ended.code == 3 and "labelled.jsonl:7" in ended.what and "a label" in ended.what, ended.errors


def test_evaluate_looks_at_the_rows_before_it_writes_any_label(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenizing 10,000 labels took 40 s, and only then was the first row compared with them."""

    def write(*_: object) -> tuple[int, ...]:
        raise AssertionError("a label is tokenized before the rows are compared with it")

    monkeypatch.setattr("backhand.generation.labels.written_label", write)
    monkeypatch.chdir(short)
    assert main([str(word) for word in words("evaluate", "other,another")]) == 3
    error = capsys.readouterr().err
    assert "'no' is no label" in error and "labelled.jsonl:1" in error, error


def test_from_python_labels_are_bounded_as_well() -> None:
    from backhand.errors import UsageError

    for labels in (("x" * 1001, "y"), tuple(map(str, range(1001))), "", [""], (None, 2)):
        with pytest.raises(UsageError):
            GenerateOptions(answer=AnswerOptions(prompt="x", labels=labels)).validate()  # type: ignore[arg-type]
