from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from backhand.data.demo_task import (
    HELD_OUT,
    HELD_OUT_ROWS,
    SHOTS,
    TRAIN_ROWS,
    TRAINING,
    ChatRow,
    demo_rows,
    few_shot,
    write_demo_data,
)
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.errors import ResourceError
from tests.support.tiny_tokenizer import tiny_tokenizer

VALUES = ("first_names", "last_names", "adjectives", "nouns", "cities", "quantities")


def sentence(row: ChatRow) -> str:
    return row["messages"][1]["content"]


def answer(row: ChatRow) -> dict[str, object]:
    value = json.loads(row["messages"][2]["content"])
    assert isinstance(value, dict)
    return value


def words_of(text: object) -> set[str]:
    return set(re.findall(r"\w+", str(text)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_pattern_and_no_value_of_a_held_out_row_occurs_in_training(seed: int) -> None:
    train, held_out = demo_rows(1500, seed), demo_rows(HELD_OUT_ROWS, seed, held_out=True)
    assert HELD_OUT_ROWS >= 200
    assert not set(TRAINING.patterns) & set(HELD_OUT.patterns)
    trained_words = set().union(*(words_of(sentence(row)) for row in train))
    for row in held_out:
        for value in answer(row).values():
            assert not words_of(value) & trained_words


def test_no_word_is_in_both_sets_and_patterns_are_many() -> None:
    for words in (TRAINING, HELD_OUT):
        for name in VALUES:
            assert len(set(getattr(words, name))) == len(getattr(words, name)), name
    trained = {str(word).casefold() for name in VALUES for word in getattr(TRAINING, name)}
    assert not trained & {str(word).casefold() for name in VALUES for word in getattr(HELD_OUT, name)}
    assert len(TRAINING.patterns) >= 30 and len(HELD_OUT.patterns) >= 10
    slots = ["city", "item", "name", "quantity"]
    for words in (TRAINING, HELD_OUT):
        assert len(set(words.patterns)) == len(words.patterns)
        assert all(sorted(re.findall(r"{(\w+)}", pattern)) == slots for pattern in words.patterns)
        assert all(getattr(words, field.name) for field in fields(words))


def test_every_answer_is_strict_json_copied_from_its_sentence() -> None:
    for row in demo_rows(300, 0) + demo_rows(100, 0, held_out=True):
        read = answer(row)
        assert list(read) == ["name", "item", "quantity", "city"]
        assert json.dumps(read) == row["messages"][2]["content"]
        assert all(str(value) in sentence(row) for value in read.values())
        assert isinstance(read["quantity"], int)


def test_the_seed_decides() -> None:
    assert demo_rows(20, 1) == demo_rows(20, 1)
    assert demo_rows(20, 1) != demo_rows(20, 2)
    rows = demo_rows(TRAIN_ROWS, 0)
    assert len({sentence(row) for row in rows}) == TRAIN_ROWS >= 600


def test_examples_in_the_prompt_come_before_the_question() -> None:
    row, *examples = demo_rows(1 + SHOTS, 0)
    shown = few_shot(row, examples)["messages"]
    assert [message["role"] for message in shown] == ["system", *["user", "assistant"] * (SHOTS + 1)]
    assert shown[-2:] == row["messages"][1:]
    assert shown[1]["content"] == sentence(examples[0])


def test_written_rows_are_found_by_prepare_as_training_and_held_out(tmp_path: Path) -> None:
    train_path, held_path = write_demo_data(tmp_path / "demo", seed=3, train_rows=40, held_out_rows=10)
    assert (train_path.name, held_path.name) == ("train.jsonl", "valid.jsonl")
    train, held_out = prepare(DataOptions(data=(str(tmp_path / "demo"),)), tiny_tokenizer())
    assert held_out is not None
    assert (train.report.rows, held_out.report.rows) == (40, 10)
    assert held_out.report.notes == ()


def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("in the way")
    with pytest.raises(ResourceError):
        write_demo_data(tmp_path / "demo")


@pytest.mark.smollm2
def test_rows_are_short_enough_for_a_few_minutes_on_two_cores(tmp_path: Path) -> None:
    from backhand.nn.loading.opening import open_model

    train_path, _ = write_demo_data(tmp_path)
    train, _ = prepare(DataOptions(data=(str(train_path),)), open_model("smollm2-135m").tokenizer())
    assert train.report.tokens < 50_000
    assert train.report.longest < 100
