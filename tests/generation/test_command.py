from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.generation import command
from backhand.generation.session import GenerationSession

QUESTION = "name a list"


@pytest.fixture
def base(model_directory: Path) -> list[str]:
    return ["generate", "--model", str(model_directory), "--dtype", "float32", "--max-new-tokens", "8"]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "one"},
        {"prompt": "the user asks for a longer list", "completion": "two"},
        {"prompt": "name", "completion": "three"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answered(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_only_the_answer_is_on_standard_output(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*base, "--prompt", QUESTION, "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert len(out) > 3
    assert err == "note: cut off after 8 tokens; --max-new-tokens allows for more\n"
    assert main([*base, "--prompt", QUESTION, "--greedy", "--quiet"]) == 0
    assert capsys.readouterr() == (out, "")


def test_the_prompt_from_standard_input(
    base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answered(capsys, [*base, "--prompt", QUESTION, "--seed", "4"])
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION + "\n"))
    assert answered(capsys, [*base, "--prompt", "-", "--seed", "4"]) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main([*base, "--prompt", "-"]) == 3
    assert "the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_prompt_that_is_not_utf8(
    errors: str, base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors))
    assert main([*base, "--prompt", "-"]) == 3
    error = capsys.readouterr().err
    assert "standard input: the prompt is not UTF-8" in error and "byte 0xe9" in error


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_prompt_in_the_c_locale(
    errors: str, base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python without its UTF-8 mode takes standard input for ASCII there."""
    expected = answered(capsys, [*base, "--prompt", "café", "--greedy"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("café\n".encode()), encoding="ascii", errors=errors))
    assert answered(capsys, [*base, "--prompt", "-", "--greedy"]) == expected


def test_a_typed_prompt_that_cannot_be_read(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*base, "--prompt", "caf\udce9"]) == 2
    error = capsys.readouterr().err
    assert "--prompt: prompt cannot be read" in error and "byte 0xe9 in it is none of utf-8" in error
    assert "iconv" in error and "surrogate" not in error


def test_an_answer_that_fills_the_context_says_so(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*base[:-1], "100000", "--prompt", QUESTION, "--greedy"]) == 0
    error = capsys.readouterr().err
    assert "that the model takes" in error and "--max-new-tokens" not in error


def test_seeds_and_adapters_change_the_answer(
    base: list[str], adapter_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [*base, "--prompt", QUESTION]
    answers = {answered(capsys, [*ask, "--seed", str(seed)]) for seed in (1, 2)}
    answers.add(answered(capsys, [*ask, "--seed", "1", "--adapter", str(adapter_directory)]))
    assert len(answers) == 3
    assert answered(capsys, [*ask, "--seed", "1"]) in answers


def test_comparison_labels_both(base: list[str], adapter_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [*base, "--prompt", QUESTION, "--greedy", "--quiet"]
    base_answer = answered(capsys, ask)
    adapted_answer = answered(capsys, [*ask, "--adapter", str(adapter_directory)])
    both = answered(capsys, [*ask, "--adapter", str(adapter_directory), "--compare"])
    assert both == f"base model:\n{base_answer}\nwith {adapter_directory}:\n{adapted_answer}"


def test_a_file_of_rows_in_their_order(
    base: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "answers.jsonl"
    for batch_rows in ("2", "64"):
        ask = [*base, "--data", str(rows_file), "--output", str(output), "--greedy", "--overwrite"]
        assert main([*ask, "--batch-rows", batch_rows]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        assert "3 rows answered in" in err
        assert "exactly right 0.0% of 3 rows with an answer (95 % interval 0–56 %)" in err
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["reference"] for line in lines] == ["one", "two", "three"]
        assert lines[2]["prompt"] == "<|im_start|>user\nname<|im_end|>\n<|im_start|>assistant\n"
        for line, prompt in zip(lines, ("a", "the user asks for a longer list", "name"), strict=True):
            alone = answered(capsys, [*base, "--prompt", prompt, "--greedy", "--quiet"])
            assert alone.rstrip("\n") == line["completion"].rstrip("\n")
            assert line["finish_reason"] in ("stop", "length")


def test_an_interrupted_file_of_rows_keeps_its_answers(
    base: list[str],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, answered_rows = GenerationSession.answer_all, []

    def interrupted(*arguments: Any, on_answer: Any, **options: Any) -> Any:
        def take(number: int, answer: Any) -> None:
            on_answer(number, answer)
            answered_rows.append(number)
            if len(answered_rows) == 2:
                raise KeyboardInterrupt

        return real(*arguments, on_answer=take, **options)

    monkeypatch.setattr(GenerationSession, "answer_all", interrupted)
    output = tmp_path / "answers.jsonl"
    assert main([*base, "--data", str(rows_file), "--output", str(output), "--greedy"]) == 130
    partial = tmp_path / "answers.jsonl.partial"
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [line["reference"] for line in lines] == [
        ("one", "two", "three")[number] for number in sorted(answered_rows)
    ]
    assert not output.exists() and f"2 of 3 rows were answered: {partial}" in capsys.readouterr().err


def test_interrupted_labels_keep_those_that_were_chosen(
    base: list[str],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = command.choose_labels, []

    def interrupted(model: Any, prompts: Any, *more: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, prompts, *more)

    monkeypatch.setattr(command, "choose_labels", interrupted)
    monkeypatch.setattr(command, "LABELLED_TOGETHER", 2)
    output = tmp_path / "labels.jsonl"
    assert main([*base, "--data", str(rows_file), "--labels", "one,two", "--output", str(output)]) == 130
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl.partial").read_text().splitlines()]
    assert calls == [2, 1] and [line["reference"] for line in lines] == ["one", "two"]
    assert "2 of 3 rows were answered" in capsys.readouterr().err


def test_rows_compared_on_standard_output(
    base: list[str], rows_file: Path, adapter_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [*base, "--data", str(rows_file), "--quiet"]
    plain = [json.loads(line) for line in answered(capsys, ask).splitlines()]
    adapted = [json.loads(line) for line in answered(capsys, [*ask, "--adapter", str(adapter_directory)]).splitlines()]
    both = answered(capsys, [*ask, "--adapter", str(adapter_directory), "--compare"]).splitlines()
    for line, one, other in zip(map(json.loads, both), plain, adapted, strict=True):
        assert set(line) == {"prompt", "reference", "base", "adapted"}
        assert line["base"]["completion"] == one["completion"] != other["completion"] == line["adapted"]["completion"]


def test_an_output_that_exists_is_not_replaced(
    base: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("precious")
    ask = [*base, "--data", str(rows_file), "--output"]
    assert main([*ask, str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main([*ask, str(tmp_path)]) == 2
    assert main([*ask, str(output), "--overwrite", "--quiet"]) == 0
    assert output.read_text().count("\n") == 3


def test_an_output_that_may_not_be_replaced_is_reported_before_the_work(
    base: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("link", []), ("pipe", ["--overwrite"])):
        ask = [*base, "--data", str(rows_file), "--output", str(tmp_path / name), "--adapter", "nowhere"]
        assert main([*ask, *words]) == 2, "and not 4, as for the adapter"
        assert "will not be replaced" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "rank", "embed", "decide", "classify"])
def test_a_wrong_adapter_leaves_no_directory(
    name: str, base: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The directory of the output was created before the model was loaded."""
    output, model = tmp_path / "new" / "dir" / "answers", base[1:3]
    words = [name, *model, "--data", str(rows_file), "--output", str(output)]
    assert main([*words, "--adapter", "nowhere"]) == 4
    assert "there is no such directory" in capsys.readouterr().err and not (tmp_path / "new").exists()
    (tmp_path / "new").write_text("")
    assert main([*words, "--adapter", "nowhere"]) == 2
    assert "this is a file, not a directory" in capsys.readouterr().err
    if name == "generate":
        (tmp_path / "new").unlink()
        assert main([*base, *words[3:]]) == 0 and output.read_text().count("\n") == 3


def test_a_prompt_names_a_column_of_the_rows(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "questions.csv"
    rows.write_text("asked,more\nname,x\n,\nlist,y\n")
    written = []
    for text in ("asked", "{asked}"):
        assert main([*base, "--data", str(rows), "--prompt", text, "--greedy"]) == 0
        out, err = capsys.readouterr()
        assert "note: 1 row without a value left out\n" in err
        written.append(out)
    assert written[0] == written[1] and written[0].count("reference") == 2
    assert main([*base, "--data", str(rows), "--prompt", "aksed"]) == 2
    assert "did you mean asked?" in capsys.readouterr().err


def test_bad_rows_are_named_or_left_out(
    base: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file.write_text(rows_file.read_text() + '{"prompt": 3}\n')
    assert main([*base, "--data", str(rows_file)]) == 3
    assert "rows.jsonl:4" in capsys.readouterr().err
    assert main([*base, "--data", str(rows_file), "--skip-bad", "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    assert "1 malformed row left out, the first: " in err and "rows.jsonl:4" in err
    long_row = {"prompt": "x" * 200, "completion": "y"}
    good = rows_file.read_text()
    rows_file.write_text(good + json.dumps(long_row) + "\n")
    assert main([*base, "--data", str(rows_file), "--skip-bad", "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3, "a prompt that leaves no room for an answer is a bad row as well"
    assert "2 malformed rows left out, the first: " in err
    rows_file.write_text(json.dumps(long_row) + "\n")
    for words in ([], ["--skip-bad"]):
        assert main([*base, "--data", str(rows_file), *words]) == 3
        assert "rows.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--prompt", "a", "--top-p", "0"], 2),
        (["--prompt", "a", "--adapter", "nowhere"], 4),
        (["--prompt", "a", "--chat-template", "none", "--system", "s"], 2),
        ([], 2),
        (["--data", "nowhere.jsonl"], 3),
    ],
)
def test_exit_codes(base: list[str], arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*base, *arguments]) == code
    assert capsys.readouterr().out == ""
