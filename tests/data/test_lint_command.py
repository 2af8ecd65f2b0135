"""`backhand lint` as it is typed: what it prints, where, and what its exit code says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.data.lint import FIRST_CHECKS, LAST_CHECKS
from backhand.data.row_kind import row_kinds
from tests.support.tiny_models import save_tiny, tiny_model

GOOD = [{"prompt": f"question {i}", "completion": "yes"} for i in range(3)]
Lint = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose weights are of no use: lint must not read them."""
    directory = save_tiny(tiny_model("llama-tied", num_hidden_layers=1), Path(tmp_path_factory.mktemp("lint")))
    weights = directory / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[:header] + b"\xff" * (weights.stat().st_size - header))
    return directory


@pytest.fixture
def lint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Lint:
    def run(rows: list[Any], *words: str) -> tuple[int, str, str]:
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        code = main(["lint", "--model", str(model), "--data", str(path), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_good_rows_pass(lint: Lint) -> None:
    code, out, err = lint(GOOD)
    assert (code, err) == (0, "")
    assert "prompt/completion" in out and "3 training documents" in out
    assert "no problems found" in out
    checks = FIRST_CHECKS | {name: check for kind in row_kinds() for name, check in kind.checks.items()} | LAST_CHECKS
    of_answers = ("no_end", "empty_reply", "spelling", "doubled_bos")
    concerned = {name: checks[name].words for name in (*FIRST_CHECKS, *of_answers, *LAST_CHECKS)}
    assert not any(check.words in out for name, check in checks.items() if name not in concerned)
    for kind, words in concerned.items():
        (line,) = (line for line in out.splitlines() if words in line)
        assert ("no held-out rows" if kind == "overlap" else "none") in line


def test_what_would_stop_training_is_named_and_is_an_error(lint: Lint, tmp_path: Path) -> None:
    code, out, err = lint([*GOOD, '{"prompt": "cut', {"prompt": 3, "completion": "x"}])
    assert code == 3
    for number, what in ((4, "this is not valid JSON"), (5, "prompt is the number 3, not text")):
        (place,) = (
            i for i, line in enumerate(out.splitlines()) if line.startswith(f"error: {tmp_path}/rows.jsonl:{number}")
        )
        assert what in out.splitlines()[place]
    assert out.count("  next: ") == 2
    assert f"{tmp_path}/rows.jsonl:4: training would stop: 2 malformed rows" in err


def test_an_objective_is_no_option_and_labels_are_counted(lint: Lint) -> None:
    code, _, err = lint(GOOD, "--objective", "dpo")
    assert code == 2 and "an option of `backhand train`. `lint` detects the form of the rows from their columns." in err
    rows = [{"prompt": f"q{number}", "completion": "yes" if number % 3 else "no"} for number in range(9)]
    assert "documents per answer: yes 6, no 3\n" in lint(rows)[1]


def test_columns_of_decisions_need_decisions(lint: Lint) -> None:
    code, _, error = lint([{"text": "a", "team": "b"}], "--state", "text", "--question", "team")
    assert code == 2 and "--state is given, but lint does not read it" in error and "give --decisions;" in error
    code, _, error = lint([{"text": "a", "label": "b"}], "--messages", "text", "--classes")
    assert code == 2 and "lint --classes does not read it\n  next: leave out --classes;" in error


def test_bad_rows_that_are_left_out_stop_nothing(lint: Lint) -> None:
    code, out, err = lint([*GOOD, "{"], "--skip-bad")
    assert (code, err) == (0, "")
    assert "warning: " in out and "error" not in out
    assert "training can start; 1 kind of problems" in out


def test_warnings_are_no_errors(lint: Lint, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(GOOD[1]) + "\n", encoding="utf-8")
    garbled = {"prompt": "q", "completion": "cafÃ©"}
    code, out, _ = lint([*GOOD, GOOD[0], garbled], "--eval-data", str(held))
    assert code == 0
    assert f"warning: {tmp_path}/rows.jsonl:4 = {tmp_path}/rows.jsonl:1: 1 document equal to an earlier one" in out
    assert f"warning: {held}:1: 1 document also in the training data" in out
    assert f"warning: {tmp_path}/rows.jsonl:5: 1 document with text that looks wrongly decoded, such as 'Ã©'" in out


def test_tokens_are_shown_with_the_supervised_ones_marked(lint: Lint, tmp_path: Path) -> None:
    _, out, _ = lint(GOOD, "--show", "2")
    first, second = (out.index(f"\n{tmp_path}/rows.jsonl:{number}\n") for number in (1, 2))
    shown = out[first:second].splitlines()[2:]
    assert f"{tmp_path}/rows.jsonl:3\n" not in out[second:]
    marked = "".join(line.split(maxsplit=2)[2].strip("'") for line in shown if line.startswith("*"))
    assert marked.startswith("yes") and "question" not in marked
    assert any(line.startswith(" ") for line in shown)


def test_json_is_one_object_with_every_number(lint: Lint) -> None:
    code, out, err = lint([*GOOD, "{"], "--json", "--show", "1")
    found = json.loads(out)
    assert code == 3 and "training would stop" in err
    assert found["errors"] == 1
    assert found["train"]["rows"] == 3
    assert [finding["kind"] for finding in found["findings"]] == ["malformed"]
    tokens = found["shown"][0]["tokens"]
    assert 0 < sum(token["supervised"] for token in tokens) < len(tokens)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--data", "rows.jsonl", "--show", "-1"], 2, "--show: show -1 is not an integer of at least 0"),
        (
            ["--data", "rows.jsonl", "--max-length", "1"],
            2,
            "--max-length: max_length 1 is not an integer of at least 2",
        ),
        ([], 2, "--data: there is no data"),
        (["--data", "absent.jsonl"], 3, "absent.jsonl: there is no such file"),
        (["--data", "absent.jsonl", "--model", "no/such-model"], 4, "no/such-model"),
    ],
)
def test_bad_input_has_the_contracts_codes(
    model: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [] if "--model" in words else ["--model", str(model)]
    assert main(["lint", *named, *words]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err


def test_a_run_configuration_says_what_to_lint(
    lint: Lint, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lint(GOOD)
    settings = tmp_path / "run.toml"
    settings.write_text(
        f'[model]\nmodel = "{model}"\n[data]\ndata = ["{tmp_path}/rows.jsonl"]\neval_fraction = 0.4\n[run]\nseed = 3\n'
    )
    assert main(["lint", str(settings), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["held_out"]["documents"] == 1


def test_one_remedy_of_several_problems_is_printed_once(lint: Lint) -> None:
    code, out, _ = lint([*GOOD, *[{"prompt": number, "completion": "x"} for number in range(4)]])
    assert code == 3 and out.count("error: ") == 4 and out.count("  next: ") == 1
