"""Rows of decisions: questions inferred or given, the servers' prompt, orders of options, labels of one token."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from backhand.data.chat import thoughts_off
from backhand.data.decision_examples import DecisionEncoder
from backhand.data.decisions import Asked, DecisionRow, LabelTokens, inferred_question, question_of, state_text
from backhand.data.documents import RowRenderer
from backhand.data.lint import lint
from backhand.data.options import DataOptions, TemplateOptions
from backhand.data.packing import RowPacker
from backhand.data.prepare import prepare
from backhand.data.stored_examples import PreparedData
from backhand.errors import DataError, UsageError
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.trl_templates import tokenizer_for

TEAM = {"type": "choice", "instructions": "Which team?", "criteria": {"sales": None, "billing": "money"}}
URGENT = {"type": "noul", "instructions": "Urgent?", "criteria": {"true": "within the hour"}}
MOOD = {"type": "score", "instructions": "How upset?", "criteria": ["calm", "angry", "furious"]}


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(data: str, **options: Any) -> PreparedData:
    made = DataOptions(data=(data,), **{"eval_fraction": 0.0, "option_rows": 0, **options})
    return prepare(made, tiny_tokenizer(), purpose="decisions")[0]


def texts(data: PreparedData, row: int = 0) -> list[str]:
    return [tiny_tokenizer().decode(document.input_ids) for document in data.examples[row].documents]


# vLLM's question_types.py at 02cc9cd and SGLang's PROMPT_FORMAT_VERSION 1 render these questions so.
PROMPTS = {
    "choice": (TEAM, "state\n\nQuestion: Which team?\nA: billing - money\nB: sales\n"),
    "noul": (URGENT, "state\n\nQuestion: Urgent?\nyes: within the hour\n"),
    "score": (MOOD, "state\n\nQuestion: How upset?\n0: calm\n1: angry\n2: furious\n"),
}
CLOSINGS = {"choice": "the letter of one option", "noul": "yes or no", "score": "the number of one level"}


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_prompt_is_the_one_that_servers_render(kind: str) -> None:
    spec, prompt = PROMPTS[kind]
    question = question_of("q", spec, "row")
    assert question.prompt("state", question.canonical_order) == f"{prompt}Answer with {CLOSINGS[kind]} only."
    assert question_of("q", question.to_json(), "row") == question


def test_options_can_come_in_any_order_and_are_sorted() -> None:
    turned = {**TEAM, "criteria": dict(reversed(list(TEAM["criteria"].items())))}  # type: ignore[attr-defined]
    assert question_of("q", TEAM, "row") == question_of("q", turned, "row")
    assert question_of("q", TEAM, "row").keys == ("billing", "sales")


def test_levels_with_equal_names_keep_their_numbers() -> None:
    names = {"low high": ("low", "high"), "low low high": ("0: low", "1: low", "2: high")}
    for levels, expected in names.items():
        spec = {"type": "score", "instructions": "", "criteria": levels.split()}
        assert question_of("q", spec, "row").option_names == expected


@pytest.mark.parametrize(
    ("answers", "kind", "keys"),
    [
        (["yes", "no"], "noul", ("true", "false")),
        ([True, False], "noul", ("true", "false")),
        (["0", "1"], "noul", ("true", "false")),
        ([3, 1, 2.0], "score", ("0", "1", "2")),
        (["1", "2", "4"], "choice", ("1", "2", "4")),
        (["b", "a", " a"], "choice", ("a", "b")),
    ],
)
def test_the_type_follows_from_the_answers(answers: list[Any], kind: str, keys: tuple[str, ...]) -> None:
    question = inferred_question("q", "", answers, "row")
    assert (question.type, question.keys) == (kind, keys)


@pytest.mark.parametrize(
    ("spec", "answer", "targets"),
    [
        (TEAM, "sales", (0, 1)),
        (TEAM, {"sales": 0.25, "billing": 0.75}, (0.75, 0.25)),
        (URGENT, True, (1, 0)),
        (URGENT, "No", (0, 1)),
        (URGENT, 0.25, (0.25, 0.75)),
        (MOOD, 2, (0, 0, 1)),
        (MOOD, "angry", (0, 1, 0)),
        (MOOD, {"0": 0.5, "2": 0.5}, (0.5, 0, 0.5)),
    ],
)
def test_answers_are_options_or_probabilities(spec: Any, answer: Any, targets: tuple[float, ...]) -> None:
    assert question_of("q", spec, "row").targets(answer, "row") == targets


@pytest.mark.parametrize("answer", ["support", {"sales": 0.5}, {"sales": 0.5, "other": 0.5}, {"sales": "1"}])
def test_other_answers_are_refused(answer: Any) -> None:
    with pytest.raises(DataError, match=r"none of its options|are not numbers from 0 to 1"):
        question_of("team", TEAM, "rows.jsonl:3").targets(answer, "rows.jsonl:3")


def test_a_table_becomes_a_question_per_column(tmp_path: Path) -> None:
    rows = [
        {"title": f"title {n}", "text": "words", "team": ["a team", "b team", "c team"][n % 3], "mood": n % 4}
        for n in range(12)
    ]
    rows[5]["mood"] = ""  # type: ignore[assignment]
    data = read(
        table(tmp_path / "rows.csv", rows), state=r"{title}\n{text}", question={"team": "Which team?", "mood": "Mood?"}
    )
    assert {name: one.type for name, one in data.questions.items()} == {"team": "choice", "mood": "score"}
    assert len(data.examples) == 12
    assert [len(one.documents) for one in data.examples] == [10, 10, 10, 10, 10, 6, 10, 10, 10, 10, 10, 10]
    first = texts(data)
    assert all(text.startswith("<|im_start|>user\ntitle 0\nwords\n\nQuestion: ") for text in first)
    assert [text[-1] for text in first[3:7]] == ["0", "1", "2", "3"]
    answers = [text.removesuffix("<|im_end|>").rpartition("assistant\n")[2] for text in first[7:]]
    assert answers == ["a team", "b team", "c team"], "choices are also answered by name"
    notes = " ".join(data.report.notes)
    assert "team is a choice of a team, b team, c team" in notes and "mood is a score" in notes
    assert notes.endswith("; 11 of 12 rows to train on answer it") and notes.count("answer it") == 1


def test_the_counts_of_rows_add_up(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "team": "ab"[n % 2], "when": ("soon", "late", "")[n % 3]} for n in range(80)]
    path = table(tmp_path / "rows.csv", rows)
    options = DataOptions(data=(path,), state="text", question={"team": "", "when": ""}, eval_fraction=0.1)
    train, held_out = prepare(options, tiny_tokenizer(), purpose="decisions")
    assert held_out is not None
    assert "8 of these 80 rows, of which the other 72 are trained on" in held_out.report.notes
    first, *_ = (note for note in train.report.notes if "were added" in note)
    assert first.startswith("16 of these 88 rows were added") and first.endswith("the other 72 are from the data")
    answered = sum(len(row.asked) > 1 for row in train.examples.facts(DecisionRow))
    assert (
        f"the question when is a choice of late, soon; {answered} of 72 rows to train on answer it"
        in train.report.notes
    )
    letters = "the question team is a choice of a, b; llama.cpp cannot ask it, since its options are single letters"
    assert letters in train.report.notes


def test_each_document_ends_in_the_label_of_its_option(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": "abcde"[n % 5]} for n in range(40)]
    data = read(lines(tmp_path / "rows.jsonl", rows), option_order="random")
    orders = set()
    for row in range(40):
        shown = texts(data, row)
        prompt = shown[0].rpartition("Answer with")[0]
        order = [line.partition(": ")[2] for line in prompt.splitlines() if line[1:3] == ": "]
        assert sorted(order) == [*"abcde"]
        orders.add(tuple(order))
        labels = {option: "ABCDE"[place] for place, option in enumerate(order)}
        assert [text[-1] for text in shown[:5]] == [labels[option] for option in "abcde"]
        decision = data.examples[row].facts
        assert decision is not None and decision.asked[0].targets is not None
        assert decision.asked[0].targets.index(1) == row % 5
    assert len(orders) > 20, "training rows show their options in many orders"
    again = read(lines(tmp_path / "rows.jsonl", rows), option_order="random")
    assert again.digest == data.digest


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("qwen2_5", ""),
        ("qwen3", ""),
        ("qwen3_6", ""),
        ("nemotron_3_nano", ""),
        ("gptoss", "<|channel|>final<|message|>"),
        ("glm4moe", "\n"),
    ],
)
def test_the_label_follows_the_prompt_that_servers_render(name: str, before: str) -> None:
    """Servers switch thoughts off. Some templates write more before an answer, which then belongs to the prompt."""
    tokenizer = tokenizer_for(name)
    question = question_of("team", TEAM, "row")
    renderer = RowRenderer(tokenizer, thoughts_off(TemplateOptions(), tokenizer))
    encoder = DecisionEncoder(renderer, 4000)
    (example,) = encoder.encode([DecisionRow("state", (Asked(question, (1.0, 0.0)),), "row")])
    assert example is not None
    messages = [{"role": "user", "content": question.prompt("state", question.canonical_order)}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert [tokenizer.decode(one.input_ids) for one in example.documents] == [
        f"{prompt}{before}{label}" for label in "AB"
    ]
    assert encoder.prompt_end == before


def test_texts_that_merge_with_the_end_of_the_prompt_are_no_labels() -> None:
    replies = {"A": (5, 6, 1, 2), "0": (5, 6, 3, 2), "B": (5, 7, 2), "sport": (5, 8, 9, 2), "tea": (5, 6, 8, 9, 2)}
    labels = LabelTokens(replies.__getitem__)
    assert [labels.answer(text) for text in ("A", "tea", "B", "sport")] == [(1, 2), (8, 9, 2), None, None]
    with pytest.raises(DataError, match="the label 'B' is not one token"):
        labels.of(question_of("team", TEAM, "row"))


def test_each_epoch_has_orders_of_its_own(tmp_path: Path) -> None:
    """The orders follow from seed, epoch and row, so that a resumed run trains on the same prompts."""
    rows = [{"text": f"words {n}", "label": "abcde"[n % 5]} for n in range(40)]
    made = DataOptions(
        data=(lines(tmp_path / "rows.jsonl", rows),), option_order="random", eval_fraction=0.0, option_rows=0
    )

    def prompts(seed: int, epochs: int) -> list[str]:
        data, _ = prepare(made, tiny_tokenizer(), purpose="decisions", seed=seed, epochs=epochs)
        assert len(data.examples) == 40 and len(data.of_all_epochs) == 40 * epochs
        return [tiny_tokenizer().decode(one.input_ids[:-1]) for one in data.of_all_epochs]

    two = prompts(seed=0, epochs=2)
    assert prompts(seed=0, epochs=1) == two[:40]
    assert sum(one != other for one, other in zip(two[:40], two[40:], strict=True)) > 30
    assert sum(one != other for one, other in zip(two, prompts(seed=1, epochs=2), strict=True)) > 60


@pytest.mark.parametrize(("option_rows", "copies"), [(0, 0), (1, 1), (6, 2)])
def test_the_name_of_each_option_is_a_text_to_decide_about(tmp_path: Path, option_rows: int, copies: int) -> None:
    """All of them are at most a quarter of the other rows: of 40 rows and 4 options, 2 for each option."""
    rows = [{"text": f"words {n}", "label": "abcd"[n % 4], "mood": n % 3} for n in range(40)]
    options = {"state": "text", "question": {"label": "Which?", "mood": "Mood?"}, "option_order": "random"}
    data = read(lines(tmp_path / "rows.jsonl", rows), option_rows=option_rows, **options)
    assert len(data.examples) == 40 + 4 * copies
    added = data.examples.facts(DecisionRow)[40:]
    assert [row.state for row in added] == sorted([*"abcd"] * copies)
    for row, number in zip(added, range(40, 40 + len(added)), strict=True):
        (asked,) = row.asked
        assert asked.question.name == "label" and asked.targets is not None
        assert asked.question.keys[asked.targets.index(1)] == row.state
        shown = texts(data, number)
        assert all(text.startswith(f"<|im_start|>user\n{row.state}\n\nQuestion: Which?\n") for text in shown)
        order = [line.partition(": ")[2] for line in shown[0].splitlines() if line[1:3] == ": "]
        assert [text[-1] for text in shown[:4]] == ["ABCD"[order.index(option)] for option in "abcd"]
        assert row.by_name and row.source == f"the option {row.state} of label"
    noted = [note for note in data.report.notes if "--option-rows" in note]
    assert [note.partition(" ")[0] for note in noted] == ([str(4 * copies)] if copies else [])
    assert data.report.rows == len(data.examples) and data.report.option_rows == 4 * copies


def test_the_row_of_an_option_has_its_description(tmp_path: Path) -> None:
    questions = {"team": TEAM}
    rows = [{"state": f"words {n}", "questions": questions, "answers": {"team": "sales"}} for n in range(8)]
    data = read(lines(tmp_path / "rows.jsonl", rows), option_rows=6)
    assert [row.state for row in data.examples.facts(DecisionRow)[8:]] == ["billing - money", "sales"]


def test_training_rows_show_options_in_canonical_order(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": "abcde"[n % 5]} for n in range(20)]
    data = read(lines(tmp_path / "rows.jsonl", rows))
    assert all([text[-1] for text in texts(data, row)[:5]] == [*"ABCDE"] for row in range(20))


def test_held_out_rows_show_options_in_canonical_order(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": "abcde"[n % 5]} for n in range(40)]
    made = DataOptions(data=(lines(tmp_path / "rows.jsonl", rows),), eval_fraction=0.5, option_rows=0)
    train, held_out = prepare(made, tiny_tokenizer(), purpose="decisions")
    assert held_out is not None and len(train.examples) == len(held_out.examples) == 20
    for row in range(20):
        assert [text[-1] for text in texts(held_out, row)] == [*"ABCDE"]
    assert {example.source for example in train.examples}.isdisjoint(example.source for example in held_out.examples)


def test_all_questions_of_a_row_share_its_state(tmp_path: Path) -> None:
    state = "a long state of many words " * 20
    row = {"state": state, "questions": {"team": TEAM, "mood": MOOD}, "answers": {"team": "sales", "mood": 1}}
    data = read(lines(tmp_path / "rows.jsonl", [row, {**row, "state": f"other {state}"}]))
    packer = RowPacker(data.examples, share_prefixes=True)
    longest = max(len(document) for document in data.examples[0].documents)
    assert packer.packed_tokens([0]) < 1.5 * longest < packer.lengths[0] / 3


def test_rows_with_unequal_questions_keep_their_own(tmp_path: Path) -> None:
    other = {**TEAM, "criteria": {"legal": None, "press": None, "sales": None}}
    rows = [
        {"state": "a", "questions": {"team": TEAM}, "answers": {"team": "billing"}},
        {"state": "b", "questions": {"team": other, "mood": MOOD}, "answers": {"team": "press"}},
    ]
    data = read(lines(tmp_path / "rows.jsonl", rows))
    assert [len(one.documents) for one in data.examples] == [2 + 2, 3 + 3], "labels and names"
    assert [*data.questions] == ["mood"]


def test_a_label_of_several_tokens_is_an_error_before_training(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": ["yes", "no"][n % 2]} for n in range(4)]
    with pytest.raises(DataError, match="the label 'yes' is not one token"):
        read(lines(tmp_path / "rows.jsonl", rows))


def test_more_options_than_labels_are_an_error(tmp_path: Path) -> None:
    rows = [{"text": "words", "label": f"label {n}"} for n in range(27)]
    with pytest.raises(DataError, match="27 options, but there are labels for 26"):
        read(lines(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match="name another column with --question; or, if they are quantities"):
        read(lines(tmp_path / "numbers.jsonl", [{"text": "words", "label": n / 2} for n in range(27)]))


def test_objects_of_a_program_in_a_state_are_text() -> None:
    """Deciding wrote them as text, and training ended in a TypeError."""
    assert state_text({"price": Decimal(1)}) == '{"price": "1"}'


def test_one_answer_only_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label has one answer only: a"):
        read(lines(tmp_path / "rows.jsonl", [{"text": "words", "label": "a"}] * 3))


def test_answers_of_single_rows_are_an_error(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "words", "label": f"{n}.01.2019"} for n in range(22)]
    with pytest.raises(DataError, match="22 of 22 training rows have an answer that no other training row") as refused:
        read(lines(tmp_path / "rows.jsonl", rows))
    assert "column of the answers" in str(refused.value.why)
    assert "with --completion, or give --questions FILE" in str(refused.value.next_step)
    named = [{"state": "words", "answers": {"day": row["label"]}} for row in rows]
    with pytest.raises(DataError, match="22 of 22 training rows") as refused:
        read(lines(tmp_path / "named.jsonl", named))
    assert "with --question, or" in str(refused.value.next_step)
    read(lines(tmp_path / "few.jsonl", rows[:19]))
    read(lines(tmp_path / "repeated.jsonl", [*rows, *({"text": "words", "label": "none"} for _ in rows)]))


def test_an_unknown_key_of_a_question_is_an_error(tmp_path: Path) -> None:
    row = {"state": "a", "questions": {"team": TEAM | {"criterion": "?"}}, "answers": {"team": "sales"}}
    with pytest.raises(DataError, match="the question 'team' has the unknown key 'criterion'") as refused:
        read(lines(tmp_path / "rows.jsonl", [row]))
    assert refused.value.next_step == "did you mean criteria?"


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    data = table(tmp_path / "rows.csv", [{"text": "words", "team": "a"}, {"text": "words", "team": "b"}])
    with pytest.raises(UsageError, match="there is no column 'tea'"):
        read(data, state="text", question={"tea": ""})


@pytest.mark.parametrize(
    ("rows", "named", "empty"),
    [
        ([{"words": "a", "team": "x"}, {"words": "b", "team": ""}, {"words": "c", "team": "y"}], True, "team"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": ""}, {"text": "c", "label": "y"}], False, "label"),
    ],
)
def test_a_row_without_any_answer_names_the_empty_column(
    rows: list[dict[str, Any]], named: bool, empty: str, tmp_path: Path
) -> None:
    data = table(tmp_path / "rows.csv", rows)
    options: dict[str, Any] = {"state": "words", "question": {"team": ""}} if named else {}
    with pytest.raises(DataError, match="no question of this row has an answer") as raised:
        read(data, **options)
    assert str(raised.value.where).endswith(":3") and raised.value.why == f"{empty} is empty"
    assert len(read(data, skip_bad=True, **options).examples) == 2


def test_the_report_counts_the_documents_that_are_trained_on(tmp_path: Path) -> None:
    """The names of options were missing in its counts, and its documents were taken for rows."""
    data = read(lines(tmp_path / "rows.jsonl", [{"text": f"words {n}", "label": "ab"[n % 2]} for n in range(6)]))
    report, documents = data.report, data.examples.documents
    assert report.rows == 6 and report.documents == len(documents) == 6 * 4
    assert report.supervised_tokens == int(documents.column("supervised").sum()) > 24
    assert report.tokens == int(documents.column("tokens").sum())
    assert any(line.startswith("24 documents of 6 rows with ") for line in report.lines())
    assert any("one document per label" in note for note in report.notes)


def test_answers_made_of_others_are_noted(tmp_path: Path) -> None:
    tags = ["law", "food", "law, food", "law, age"]
    data = read(lines(tmp_path / "rows.jsonl", [{"text": f"words {n}", "label": tags[n % 4]} for n in range(8)]))
    (note,) = (note for note in data.report.notes if note.startswith("warning: "))
    assert "2 options of the question label are made of others, such as 'law, food'" in note
    assert '--objective classify, and write several labels of a text as a list, in a table as ["law", "food"]' in note
    assert any("a choice of food, law, 'law, age', 'law, food'" in note for note in data.report.notes)
    many = [{"text": f"words {n}", "label": f"law{n}" if n < 20 else f"law1, law{n - 18}"} for n in range(30)]
    with pytest.raises(DataError, match="30 options") as refused:
        read(lines(tmp_path / "many.jsonl", many))
    assert "several labels of a text as a list" in str(refused.value.next_step)


def test_a_column_of_shares_is_named_as_the_answer_and_a_list_of_votes_is_refused(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "shares": {"bad": n / 8, "good": 1 - n / 8}, "votes": [n, 1]} for n in range(8)]
    cells = [{**row, "shares": json.dumps(row["shares"])} for row in rows]
    for path in (lines(tmp_path / "rows.jsonl", rows), table(tmp_path / "rows.csv", cells)):
        for columns in ({"prompt": "text", "completion": "shares"}, {"state": "text", "question": {"shares": ""}}):
            data = read(path, **columns)
            (question,) = data.questions.values()
            assert question.keys == ("bad", "good")
            assert [one.asked[0].targets for one in data.examples.facts(DecisionRow)][2] == (0.25, 0.75)
    with pytest.raises(DataError, match="the answer to votes is a list, and a decision is one answer") as refused:
        read(str(tmp_path / "rows.jsonl"), state="text", question={"votes": ""})
    assert "the share of each in a table" in str(refused.value.next_step)


def test_negative_levels_are_noted(tmp_path: Path) -> None:
    for first, noted in ((-3, True), (0, False)):
        rows = [{"text": f"words {n}", "label": first + n % 7} for n in range(28)]
        notes = read(lines(tmp_path / f"{first}.jsonl", rows)).report.notes
        assert any("order of these numbers, add 3 to each" in note for note in notes) == noted


def findings(data: str, **options: Any) -> dict[str, Any]:
    made = DataOptions(data=(data,), **{"eval_fraction": 0.0, **options})
    report, _ = lint(made, tiny_tokenizer(), purpose="decisions")
    return {finding.kind: finding for finding in report.findings}


def test_lint_names_held_out_rows_whose_answer_is_not_learned(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": "c" if n == 19 else "ab"[n % 2]} for n in range(20)]
    for seed in range(40):  # the seed draws the held-out rows
        made = DataOptions(data=(lines(tmp_path / "rows.jsonl", rows),), eval_fraction=0.3)
        report, _ = lint(made, tiny_tokenizer(), purpose="decisions", seed=seed)
        if report.findings:
            break
    (found,) = report.findings
    assert found.kind == "untrained_answer" and found.what.endswith("no training row, which is not learned (label: c)")
    assert found.where == (f"{tmp_path / 'rows.jsonl'}:20",) and found.remedy == "add training rows with these answers"


def test_lint_finds_problems_of_questions(tmp_path: Path) -> None:
    team = {**TEAM, "criteria": {"sales": None, "Sales ": None, "billing": None, "legal": None}}
    rows = [
        {"state": f"words {n}", "questions": {"team": team}, "answers": {"team": ["sales", "billing"][n % 2]}}
        for n in range(6)
    ]
    rows += [{**rows[1], "answers": {"team": "sales"}}, rows[2]]
    found = findings(lines(tmp_path / "rows.jsonl", rows))
    assert found.keys() == {"unused_option", "alike_options", "contradiction", "duplicate"}
    assert found["duplicate"].count == 1 and found["duplicate"].where[0].endswith("rows.jsonl:3")
    assert found["unused_option"].what.startswith("2 rows with options that no training row has as its answer")
    assert "legal" in found["unused_option"].what and "(team: Sales  next to sales)" in found["alike_options"].what
    (where,) = found["contradiction"].where
    assert where.endswith("rows.jsonl:7 ≠ " + where.split(" ≠ ")[1]) and where.endswith("rows.jsonl:2")


def test_options_named_alike_have_the_places_of_the_rare_one(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": "EXIM4" if n in (4, 7) else ("exim4", "apt")[n % 2]} for n in range(20)]
    alike = findings(lines(tmp_path / "rows.jsonl", rows))["alike_options"]
    assert [place.rpartition(":")[2] for place in alike.where] == ["5", "8"]
    assert alike.what.startswith("2 rows with options named alike (label: EXIM4 next to exim4)")


def test_a_question_whose_answers_are_numbers_is_a_regression(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": f"{n},5"} for n in range(40)]
    with pytest.raises(DataError, match="label has 40 options") as refused:
        findings(lines(tmp_path / "rows.jsonl", rows))
    assert "--objective classify" in str(refused.value.next_step)


def test_lint_names_a_frequent_answer_and_malformed_rows(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": "rare" if n == 7 else "usual"} for n in range(20)]
    found = findings(lines(tmp_path / "rows.jsonl", rows))
    assert found.keys() == {"one_answer"} and "usual in 95% of the rows of label" in found["one_answer"].what
    outside = [{"state": "a", "questions": {"team": TEAM}, "answers": {"team": one}} for one in ("sales", "press")]
    found = findings(lines(tmp_path / "other.jsonl", outside))
    assert "none of its options" in found["malformed"].what and found["malformed"].where[0].endswith("other.jsonl:2")


def test_rows_without_problems_have_no_findings(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "label": "abc"[n % 3]} for n in range(9)]
    assert findings(lines(tmp_path / "rows.jsonl", rows)) == {}


def test_a_long_row_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "words " * (100 if n == 1 else 1), "label": "ab"[n % 2]} for n in range(4)]
    data = read(lines(tmp_path / "rows.jsonl", rows), max_length=200)
    assert len(data.examples) == 3 and data.report.dropped_long == 1
    assert "1 row longer than max_length, left out: " in data.report.left_out()[0]
    assert data.report.rows == 3 and data.report.too_long() == "1 of 4 rows is longer than --max-length and left out"
    assert not any("longer than" in note for note in data.report.notes)
    longer = [row | {"text": f"words {n} " * (100 if n else 1)} for n, row in enumerate(rows)]
    note = read(lines(tmp_path / "longer.jsonl", longer), max_length=200).report.notes[0]
    assert note.startswith("warning: 3 of 4 rows are longer than --max-length and left out; --max-length ")
    assert " of 3 rows with " in replace(data.report, documents=9).lines()[1]


def test_rows_that_are_all_too_long_are_answered_with_their_lengths(tmp_path: Path) -> None:
    rows = [{"text": "words " * (n + 1), "label": "ab"[n % 2]} for n in range(10)]
    with pytest.raises(DataError, match="all rows are longer than max_length 8") as raised:
        read(lines(tmp_path / "rows.jsonl", rows), max_length=8)
    kept = int((raised.value.next_step or "").split()[2].rstrip(","))
    assert f"{kept + 6} tokens" in str(raised.value.why)  # the longest has one word more
    assert len(read(tmp_path / "rows.jsonl", max_length=kept).examples) == 9
