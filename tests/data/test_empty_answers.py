from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.data.lint import lint
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare, prepare_prompts
from backhand.errors import DataError
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

_ASKED = {"role": "user", "content": "q"}
_CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}


def rows(path: Path, *values: dict[str, Any]) -> DataOptions:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return DataOptions(data=(str(path),))


def replied(*replies: dict[str, Any]) -> dict[str, Any]:
    turns = [turn for reply in replies for turn in (_ASKED, {"role": "assistant", "content": " \n", **reply})]
    return {"messages": turns, "note": "n"}


@pytest.mark.parametrize(
    ("row", "column", "others"),
    [
        ({"prompt": "q", "completion": " \n", "response": "yes", "score": 3}, "completion", "response, score"),
        ({"instruction": "q", "input": "", "output": ""}, "output", "none"),
        ({"question": "q", "answer": "", "gold": "x"}, "answer", "gold"),
        ({"prompt": [_ASKED], "completion": [{"role": "assistant", "content": ""}], "id": 1}, "completion", "id"),
        (replied({}, {}), "the replies in messages", "note"),
        (replied({"weight": 1}, {"content": "said", "weight": 0}), "the replies in messages", "note"),
    ],
)
def test_a_file_without_an_answer_is_an_error(row: dict[str, Any], column: str, others: str, tmp_path: Path) -> None:
    options = rows(tmp_path / "rows.jsonl", row, row)
    for look in (prepare, lint):
        with pytest.raises(DataError, match="every answer is empty, in 2 rows") as raised:
            look(options, tiny_tokenizer())
        assert raised.value.where == options.data[0]
        assert f"read from {column}, " in str(raised.value.why)
        assert str(raised.value.why).endswith(f"other columns: {others}")
        assert raised.value.next_step


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "q", "chosen": " ", "rejected": "no"}, "chosen is empty in every pair, in 2 rows"),
        ({"prompt": "q", "chosen": "yes", "rejected": ""}, "rejected is empty in every pair, in 2 rows"),
        ({"prompt": "q", "chosen": "", "rejected": ""}, "chosen or rejected is empty in every pair, in 2 rows"),
    ],
)
def test_pairs_with_an_empty_side_are_an_error_that_names_the_side(
    row: dict[str, Any], what: str, tmp_path: Path
) -> None:
    options = rows(tmp_path / "rows.jsonl", row, row)
    with pytest.raises(DataError, match=what) as raised:
        prepare(options, tiny_tokenizer(), purpose="pairs")
    assert "read from chosen and rejected, since" in str(raised.value.why)


def test_labelled_answers_that_are_empty_are_those_of_the_completion(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "", "label": True}
    with pytest.raises(DataError, match="every answer is empty") as raised:
        prepare(rows(tmp_path / "rows.jsonl", row, row), tiny_tokenizer(), purpose="labels")
    assert "read from completion, since" in str(raised.value.why)


def test_one_answer_is_enough_and_the_others_are_counted(tmp_path: Path) -> None:
    empty, full = {"prompt": "q", "completion": ""}, {"prompt": "q", "completion": "yes"}
    options = rows(tmp_path / "rows.jsonl", empty, full, empty, empty)
    train, _ = prepare(options, tiny_tokenizer())
    assert train.report.empty_answers == 3
    assert any("3 rows of 4 with an empty answer" in line for line in train.report.lines())
    report, _ = lint(options, tiny_tokenizer())
    assert report.to_json()["train"]["empty_answers"] == 3
    assert any("3 rows of 4" in note for note in report.train.notes)
    (found,) = (finding for finding in report.findings if finding.kind == "empty_reply")
    assert found.count == 3


def test_a_second_file_without_an_answer_is_found_among_good_ones(tmp_path: Path) -> None:
    good = rows(tmp_path / "good.jsonl", {"prompt": "q", "completion": "yes"}).data
    bad = rows(tmp_path / "bad.jsonl", {"prompt": "q", "completion": "", "text": "yes"}).data
    with pytest.raises(DataError) as raised:
        prepare(DataOptions(data=(*good, *bad)), tiny_tokenizer())
    assert raised.value.where == bad[0]


@pytest.mark.parametrize("row", [replied({"content": "x"}, {}), replied({"reasoning_content": "hm"}), {"text": "t"}])
def test_what_is_no_empty_answer(row: dict[str, Any], tmp_path: Path) -> None:
    train, _ = prepare(rows(tmp_path / "rows.jsonl", row), tiny_tokenizer())
    assert train.report.empty_answers == 0


def test_a_tool_call_is_an_answer(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}<|im_end|>{% endfor %}"
    options = rows(tmp_path / "rows.jsonl", {"messages": [_ASKED, _CALL]})
    train, _ = prepare(DataOptions(data=options.data, chat_template=template), tiny_tokenizer())
    assert train.report.empty_answers == 0


def test_where_everything_carries_loss_or_nothing_is_learnt_empty_answers_stop_nobody(tmp_path: Path) -> None:
    options = rows(tmp_path / "rows.jsonl", {"prompt": "q", "completion": ""})
    train, _ = prepare(DataOptions(data=options.data, train_on="all"), tiny_tokenizer())
    assert train.report.empty_answers == 1
    ((prompt,), report) = prepare_prompts(options, options, tiny_tokenizer())
    assert prompt.reply == ""
    assert not any("empty answer" in note for note in report.notes)


def test_lint_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tiny_model("llama-tied", num_hidden_layers=1), tmp_path / "model")
    (data,) = rows(tmp_path / "rows.jsonl", {"prompt": "q", "completion": "", "chosen_answer": "x"}).data
    assert main(["lint", "--model", str(model), "--data", data]) == 3
    error = capsys.readouterr().err
    assert "every answer is empty, in 1 row" in error
    assert "other columns: chosen_answer" in error


def test_a_file_without_a_good_row_says_why_the_first_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a",}\n')
    with pytest.raises(DataError) as raised:
        prepare(DataOptions(data=(str(tmp_path / "rows.jsonl"),), skip_bad=True), tiny_tokenizer())
    assert "this is not valid JSON" in str(raised.value.why) and "at column" in str(raised.value.why)
