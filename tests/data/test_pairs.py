"""Pairs and labelled answers: TRL's forms, what their rows become, and what lint finds in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backhand.data.data_report import TruncationStats
from backhand.data.examples import Example
from backhand.data.form_reader import FormReader
from backhand.data.lint import Finding, lint
from backhand.data.options import DataOptions
from backhand.data.pack import pack
from backhand.data.packing import RowPacker
from backhand.data.prepare import prepare
from backhand.data.raw_rows import RawRow
from backhand.data.rows import Completion, Conversation, Pair, UnpairedRow
from backhand.errors import DataError
from tests.support.tiny_tokenizer import tiny_tokenizer

ASKED = {"role": "user", "content": "the user asks"}
GOOD = {"role": "assistant", "content": "a name"}
BAD = {"role": "assistant", "content": "the assistant answers the user"}
EXPLICIT = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}


def read(values: dict[str, Any], purpose: Any = "pairs") -> Any:
    return FormReader(purpose=purpose).read(RawRow(values, "f:1"))


@pytest.mark.parametrize(
    "values",
    [
        EXPLICIT,
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "the user asks", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
        {"prompt": "the user asks", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
    ids=["explicit", "implied", "whole-conversations", "prompt-as-text", "prompt-twice"],
)
def test_conversations(values: dict[str, Any]) -> None:
    pair = read(values)
    assert isinstance(pair, Pair) and isinstance(pair.chosen, Conversation) and isinstance(pair.rejected, Conversation)
    assert [m["content"] for m in pair.chosen.messages] == ["the user asks", "a name"]
    assert [m["content"] for m in pair.rejected.messages] == ["the user asks", "the assistant answers the user"]
    assert pair.chosen.supervised == pair.rejected.supervised == (False, True)


def test_a_prompt_of_whole_conversations_is_not_put_before_them_again(tmp_path: Path) -> None:
    whole = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    (once,) = prepared(tmp_path / "rows.jsonl", [EXPLICIT])
    for prompt in ("the user asks", [ASKED]):
        (example,) = prepared(tmp_path / "rows.jsonl", [{"prompt": prompt, **whole}])
        assert example.key == once.key


def test_turns_in_common_carry_no_loss() -> None:
    begin = [ASKED, GOOD, {"role": "user", "content": "and what for"}]
    pair = read({"chosen": [*begin, GOOD], "rejected": [*begin, BAD]})
    assert pair.chosen.supervised == (False, False, False, True)


@pytest.mark.parametrize(
    ("values", "prompt", "sides"),
    [
        ({"prompt": "Q ", "chosen": "yes", "rejected": "no"}, "Q ", ("yes", "no")),
        ({"question": "Q ", "chosen": "yes", "rejected": "no"}, "Q ", ("yes", "no")),
        ({"chosen": "Q: yes", "rejected": "Q: no"}, "Q:", (" yes", " no")),
        ({"chosen": "Q\nyes", "rejected": "Q\nno"}, "Q\n", ("yes", "no")),
    ],
)
def test_texts(values: dict[str, Any], prompt: str, sides: tuple[str, str]) -> None:
    pair = read(values)
    assert isinstance(pair.chosen, Completion) and isinstance(pair.rejected, Completion)
    assert pair.chosen.prompt == pair.rejected.prompt == prompt
    assert (pair.chosen.completion, pair.rejected.completion) == sides


def test_an_implied_prompt_is_trls() -> None:
    from trl.data_utils import extract_prompt

    for values in ({"chosen": "Q: yes", "rejected": "Q: no"}, {"chosen": "a b cd", "rejected": "a b ce"}):
        theirs, pair = extract_prompt(values), read(values)
        assert (pair.chosen.prompt, pair.chosen.completion) == (theirs["prompt"], theirs["chosen"])
        assert pair.rejected.completion == theirs["rejected"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": "p", "completion": "c"}, "do not fit pairs"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": "no"}, "one of chosen and rejected is text"),
        ({"chosen": "yes", "rejected": "no"}, "no common prompt"),
        ({"chosen": "same", "rejected": "same"}, "chosen and rejected are the same text"),
        ({"chosen": "Q", "rejected": "Q and more"}, "chosen is a prefix of rejected, so it contains no answer"),
        ({"chosen": "Q and more", "rejected": "Q"}, "rejected is a prefix of chosen, so it contains no answer"),
        ({"chosen": [{**ASKED, "content": "x"}, GOOD], "rejected": [ASKED, BAD]}, "no question"),
        ({"prompt": "p", "chosen": 3, "rejected": "no"}, "chosen is the number 3"),
        ({"prompt": [ASKED], "chosen": [], "rejected": [BAD]}, "chosen is an empty list"),
    ],
)
def test_what_is_no_pair_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(values)


@pytest.mark.parametrize(
    ("label", "found"), [(True, True), (False, False), (1, True), ("false", False), ("True", True)]
)
def test_labels(label: object, found: bool) -> None:
    row = read({"prompt": "p", "completion": "c", "label": label}, "labels")
    assert isinstance(row, UnpairedRow) and row.desirable is found


def test_a_label_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="neither true nor false"):
        read({"prompt": "p", "completion": "c", "label": "maybe"}, "labels")
    with pytest.raises(DataError, match="do not fit labels"):
        read({"prompt": "p", "completion": "c"}, "labels")


def written(path: Path, rows: list[dict[str, Any]]) -> DataOptions:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataOptions(data=(str(path),))


def prepared(path: Path, rows: list[dict[str, Any]], purpose: Any = "pairs", **options: Any) -> tuple[Example, ...]:
    return prepare(replace(written(path, rows), **options), tiny_tokenizer(), purpose=purpose)[0].examples


def text_of(example: Example, *, supervised: bool) -> str:
    return str(tiny_tokenizer().decode(example.input_ids[example.supervised == supervised].tolist()))


def test_a_pair_becomes_two_documents_with_the_same_prompt(tmp_path: Path) -> None:
    (example,) = prepared(tmp_path / "rows.jsonl", [EXPLICIT])
    one, other = example.documents
    assert text_of(one, supervised=True) == "a name<|im_end|>"
    assert text_of(other, supervised=True) == "the assistant answers the user<|im_end|>"
    asked = one.prompt_tokens
    assert asked == other.prompt_tokens and one.input_ids[:asked].tolist() == other.input_ids[:asked].tolist()
    assert one.key != prepared(tmp_path / "rows.jsonl", [{**EXPLICIT, "rejected": [GOOD]}])[0].key


def test_both_sides_are_in_one_batch_and_the_prompt_once(tmp_path: Path) -> None:
    long = {**EXPLICIT, "prompt": [{"role": "user", "content": "the user asks the assistant for a list " * 4}]}
    examples = prepared(tmp_path / "rows.jsonl", [long, {**long, "chosen": [BAD], "rejected": [GOOD]}])
    packer = RowPacker(examples, share_prefixes=True)
    batch = packer.packed([1], "cpu")
    assert batch.lengths[0] >= 60
    assert batch.parents == (-1, 0, 0, -1)[: len(batch.lengths)]
    assert batch.supervised_tokens == packer.supervised_tokens([1]) == examples[1].supervised_tokens
    assert packer.documents([1, 0]) == [2, 3, 0, 1]
    assert batch.document_ends == (2, 1)  # the shorter one first
    assert packer.packed_tokens([1]) == packer.lengths[1] - batch.lengths[0]
    assert sum(packer.forest([1]).lengths) == packer.packed_tokens([1])
    alone = pack(examples[1].documents)
    assert sum(alone.lengths) == packer.lengths[1]


def test_a_pair_goes_whole_where_a_side_has_nothing_left(tmp_path: Path) -> None:
    (example,) = prepared(tmp_path / "rows.jsonl", [EXPLICIT])
    shortest = example.prompt_tokens + 1
    (cut,) = prepared(tmp_path / "rows.jsonl", [EXPLICIT], max_length=shortest)
    assert [len(document) for document in cut.documents] == [shortest, shortest]
    with pytest.raises(DataError, match="all rows are longer than max_length"):
        prepared(tmp_path / "rows.jsonl", [EXPLICIT], max_length=example.prompt_tokens)
    length = len(example)
    assert length < len(example.documents[1])
    with pytest.raises(DataError, match="all rows are longer than max_length"):
        prepared(tmp_path / "rows.jsonl", [EXPLICIT], max_length=length, long_rows="drop")


def test_held_out_pairs_stay_whole(tmp_path: Path) -> None:
    rows = [{**EXPLICIT, "prompt": [{"role": "user", "content": f"number {n}"}]} for n in range(10)]
    train, held_out = prepare(
        DataOptions(data=written(tmp_path / "rows.jsonl", rows).data, eval_fraction=0.3),
        tiny_tokenizer(),
        purpose="pairs",
    )
    assert held_out is not None
    assert (len(train.examples), len(held_out.examples)) == (7, 3)
    assert all(example.rejected is not None for example in (*train.examples, *held_out.examples))
    assert train.report.documents == 14


def found(path: Path, rows: list[dict[str, Any]], purpose: Any = None, **options: Any) -> dict[str, Finding]:
    report, _ = lint(replace(written(path, rows), **options), tiny_tokenizer(), purpose=purpose)
    return {finding.kind: finding for finding in report.findings}


def test_lint_finds_what_is_wrong_with_pairs(tmp_path: Path) -> None:
    other = {**EXPLICIT, "prompt": [{"role": "user", "content": "a date"}]}
    rows = [EXPLICIT, {**other, "rejected": [GOOD]}, {**other, "rejected": [{"role": "assistant", "content": ""}]}]
    findings = found(tmp_path / "rows.jsonl", rows)
    assert findings["equal_pair"].where == (f"{tmp_path / 'rows.jsonl'}:2",)
    assert findings["empty_reply"].where == (f"{tmp_path / 'rows.jsonl'}:3",)
    assert "duplicate" not in findings
    implied = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    differing = {**implied, "rejected": [{**ASKED, "content": "?"}, BAD]}
    (malformed,) = found(tmp_path / "rows.jsonl", [implied, differing]).values()
    assert malformed.severity == "error" and "no common prompt" in malformed.what
    again = found(tmp_path / "rows.jsonl", [EXPLICIT, EXPLICIT])
    assert again.keys() == {"duplicate"}


def test_lint_finds_labels_of_one_kind_and_answers_cut_off(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"number {n}"}], "completion": [GOOD], "label": True} for n in range(3)
    ]
    assert "one_label" in found(tmp_path / "rows.jsonl", rows, "labels")
    assert not found(tmp_path / "rows.jsonl", [*rows, {**rows[0], "completion": [BAD], "label": False}], "labels")
    cut = TruncationStats()
    (kept,) = prepared(tmp_path / "rows.jsonl", rows[:1], "labels")
    longer = {
        "prompt": [{"role": "user", "content": "a much longer question " * 9}],
        "completion": [GOOD],
        "label": False,
    }
    options = written(tmp_path / "rows.jsonl", [rows[0], longer])
    train, _ = prepare(replace(options, max_length=len(kept)), tiny_tokenizer(), purpose="labels", truncation=cut)
    assert len(train.examples) == 1 and cut.dropped_long == [f"{tmp_path / 'rows.jsonl'}:2"]
