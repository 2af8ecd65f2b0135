from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backhand.data.examples import Example
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare, prepare_prompts
from backhand.data.stored_examples import PreparedData
from backhand.errors import DataError, UsageError
from tests.support.tokenizer_kinds import RETHINKING, THINKING, WITH_TOOLS, byte_level, normalizing, sentence_pieces

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def prepared(tmp_path: Path, rows: list[Any], tokenizer: Any = None, **options: Any) -> PreparedData:
    data = write(tmp_path / "rows.jsonl", rows)
    train, held_out = prepare(DataOptions(data=(data,), **options), tokenizer or byte_level())
    assert held_out is None
    return train


def supervised_text(example: Example, tokenizer: Any = None) -> str:
    text: str = (tokenizer or byte_level()).decode(example.input_ids[example.supervised])
    return text


def whole_text(example: Example, tokenizer: Any = None) -> str:
    text: str = (tokenizer or byte_level()).decode(example.input_ids)
    return text


def test_three_forms_of_one_row_become_the_same_tokens(tmp_path: Path) -> None:
    rows = [CHAT, {"prompt": "q", "completion": "yes"}, {"instruction": "q", "input": "", "output": "yes"}]
    digests = {prepared(tmp_path, [row]).digest for row in rows}
    assert len(digests) == 1
    (example,) = prepared(tmp_path, [CHAT]).examples
    assert whole_text(example) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert supervised_text(example) == "yes<|im_end|>"


def test_without_a_template_prompt_and_completion_are_joined_unchanged(tmp_path: Path) -> None:
    tokenizer = sentence_pieces()
    tokenizer.chat_template = None
    data = prepared(tmp_path, [{"prompt": "yes </s>", "completion": " no"}], tokenizer)
    (example,) = data.examples
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert supervised_text(example, tokenizer).strip() == "no</s>"
    assert whole_text(example, tokenizer).replace(" ", "") == "<s>yes</s>no</s>"
    assert data.report.notes == (
        "1 row joined without rendering, because there is no chat template",
        "1 row with control tokens of the model in their text, which are read as plain text",
    )


def test_without_a_template_instructions_get_blank_lines(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    row = {"instruction": "i", "input": "x", "output": "yes", "system": "s"}
    (example,) = prepared(tmp_path, [row], tokenizer).examples
    assert whole_text(example) == "s\n\ni\n\nx\n\nyes<|im_end|>"
    assert supervised_text(example) == "yes<|im_end|>"


def test_rows_that_are_rendered_already_keep_their_control_tokens(tmp_path: Path) -> None:
    row = {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "completion": "yes<|im_end|>"}
    data = prepared(tmp_path, [row], chat_template="none")
    assert data.digest == prepared(tmp_path, [CHAT]).digest
    assert data.report.notes == ("1 row joined without rendering, control tokens included",)


def test_text_rows_are_documents_of_their_own(tmp_path: Path) -> None:
    tokenizer = sentence_pieces()
    rows = [{"text": "yes"}, {"text": "<s>yes</s>"}]
    data = prepared(tmp_path, rows, tokenizer)
    plain, written = data.examples
    assert plain.input_ids.tolist() == [1, *tokenizer.encode("yes", add_special_tokens=False), 2]
    assert [ids[0] for ids in (plain.input_ids, written.input_ids)] == [1, 1], "no second begin-of-sequence token"
    assert [ids.tolist().count(2) for ids in (plain.input_ids, written.input_ids)] == [1, 1]
    assert all(example.supervised.tolist() == [False] + [True] * (len(example) - 1) for example in data.examples)
    assert "encoded as control tokens" in data.report.notes[0]


def test_training_on_all_tokens(tmp_path: Path) -> None:
    (example,) = prepared(tmp_path, [CHAT], train_on="all").examples
    assert example.supervised.tolist() == [False] + [True] * (len(example) - 1)
    assert whole_text(example).endswith("yes<|im_end|>\n")


def test_a_rewriting_template_makes_several_documents_of_a_row(tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "<think>a</think>yes"), ("user", "q"), ("assistant", "<think>b</think>no")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = prepared(tmp_path, [row], chat_template=RETHINKING)
    assert [supervised_text(e) for e in data.examples] == [
        "<think>a</think>yes<|im_end|>",
        "<think>b</think>no<|im_end|>",
    ]
    assert (data.report.rows, data.report.documents) == (1, 2)
    assert "several documents" in data.report.notes[0]


def test_counts_of_what_was_cut_and_left_out(tmp_path: Path) -> None:
    rows = [
        CHAT,
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no " * 40}]},
        {"messages": [{"role": "user", "content": "q " * 40}, {"role": "assistant", "content": "no"}]},
        {"messages": [{"role": "user", "content": "q"}]},
        '{"messages": 3}',
        "{",
    ]
    report = prepared(tmp_path, rows, max_length=40, skip_bad=True).report
    assert (report.rows, report.documents) == (2, 2)
    assert (report.truncated, report.dropped_long, report.dropped_unsupervised, report.skipped_bad) == (1, 1, 1, 2)
    assert [error.where for error in report.bad_rows] == [f"{tmp_path / 'rows.jsonl'}:{i}" for i in (5, 6)]
    report = prepared(tmp_path, rows, max_length=40, skip_bad=True, long_rows="drop").report
    assert (report.documents, report.dropped_long, report.dropped_unsupervised) == (1, 2, 1)


def test_nothing_supervised_is_an_error_that_says_why(tmp_path: Path) -> None:
    long_prompt = {"messages": [{"role": "user", "content": "q " * 40}, {"role": "assistant", "content": "no"}]}
    with pytest.raises(DataError, match="all documents are longer than max_length 20") as raised:
        prepared(tmp_path, [long_prompt] * 3, max_length=20)
    assert raised.value.why == "91 tokens; cut at max_length, they have nothing left to learn"
    assert raised.value.next_step == "give --max-length 91, which keeps at least 90% of them"
    with pytest.raises(DataError, match="nothing in the data carries loss"):
        prepared(tmp_path, [{"messages": [{"role": "user", "content": "q"}]}])


@pytest.mark.parametrize("content", ["\n\n", "{}\n", "{\n"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_files_without_a_row_are_errors(tmp_path: Path, content: str, skip_bad: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as raised:
        prepare(DataOptions(data=(str(path),), skip_bad=skip_bad), byte_level())
    assert str(path) in str(raised.value.where)


def test_a_file_without_a_row_is_not_explained_by_another_file(tmp_path: Path) -> None:
    mixed, all_bad = tmp_path / "mixed.jsonl", tmp_path / "all_bad.jsonl"
    mixed.write_text('{"prompt": "q", "completion": "a"}\n' + "{\n" * 9)
    all_bad.write_text('{"prompt": 3, "completion": "a"}\n')
    with pytest.raises(DataError) as raised:
        prepare(DataOptions(data=(str(mixed), str(all_bad)), skip_bad=True), byte_level())
    assert raised.value.where == str(all_bad)
    assert f"{all_bad}:1" in str(raised.value.why) and str(mixed) not in str(raised.value)


def test_a_conversation_without_any_template_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template") as raised:
        prepared(tmp_path, [CHAT], tokenizer)
    assert "--chat-template" in str(raised.value.next_step)
    with pytest.raises(DataError, match="no chat template"):
        prepared(tmp_path, [CHAT], chat_template="none")


@pytest.mark.parametrize("options", [{"system": "s"}, {"template_args": {"a": 1}}])
def test_options_for_a_template_that_is_not_there_contradict(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        prepared(tmp_path, [{"prompt": "q", "completion": "a"}], chat_template="none", **options)
    assert raised.value.where in options


def test_several_files_may_have_several_forms(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [CHAT, CHAT])
    two = tmp_path / "two.csv"
    two.write_text("prompt,completion\nq,yes\n")
    train, _ = prepare(DataOptions(data=(one, str(two))), byte_level())
    assert [(form.form, form.rows) for form in train.report.sources] == [("messages", 2), ("prompt/completion", 1)]
    assert len({example.key for example in train.examples}) == 1
    assert train.report.lines()[0] == f"{one}: messages, 2 rows"
    train, _ = prepare(DataOptions(data=(one, str(two)), max_rows=1), byte_level())
    assert train.report.rows == 1


def test_held_out_rows_from_a_file_with_a_warning_for_those_that_were_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "yes"} for i in range(6)]
    data, held = write(tmp_path / "train.jsonl", rows[:4]), write(tmp_path / "held.jsonl", rows[3:])
    train, held_out = prepare(DataOptions(data=(data,), eval_data=(held,)), byte_level())
    assert held_out is not None
    assert (len(train.examples), len(held_out.examples)) == (4, 3)
    assert (
        f"1 of 3 held-out documents also occur in the training data, for example {held}:1" in held_out.report.notes[0]
    )
    assert held_out.report.repeated == 1 and train.report.repeated == 0


def test_held_out_rows_from_a_fraction_or_from_the_neighbouring_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "yes"} for i in range(10)]
    data = write(tmp_path / "train.jsonl", rows)
    train, held_out = prepare(DataOptions(data=(data,), eval_fraction=0.3), byte_level(), seed=1)
    assert held_out is not None
    assert (len(train.examples), len(held_out.examples)) == (7, 3)
    write(tmp_path / "valid.jsonl", [CHAT])
    train, held_out = prepare(DataOptions(data=(str(tmp_path),)), byte_level())
    assert held_out is not None
    assert (len(train.examples), len(held_out.examples)) == (10, 1)


def test_a_list_on_one_line_is_held_out_from_as_one_row_a_line_is(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{number}", "completion": "yes"} for number in range(10)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    sides = [
        prepare(DataOptions(data=(data,), eval_fraction=0.3), byte_level(), seed=1)
        for data in (write(tmp_path / "rows.jsonl", rows), str(tmp_path / "list.json"))
    ]
    (train, held_out), (listed, listed_out) = sides
    assert held_out is not None and listed_out is not None
    assert (len(listed.examples), listed.report.rows, listed_out.report.rows) == (7, 7, 3)
    assert (listed.digest, listed_out.digest) == (train.digest, held_out.digest)


def test_no_data_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no data"):
        prepare(DataOptions(), byte_level())


def test_prompts_end_where_training_begins_to_supervise(tmp_path: Path) -> None:
    tokenizer = byte_level()
    for template, reply in ((None, "istant"), ("none", "istant\n")):
        rows: list[Any] = [{"prompt": "the ass", "completion": "istant\n", "system": "s"}]
        options = DataOptions(data=(write(tmp_path / "rows.jsonl", rows),), chat_template=template)
        (prompt,), report = prepare_prompts(options, options, tokenizer)
        (example,) = prepare(options, tokenizer)[0].examples
        assert prompt.input_ids.tolist() == example.input_ids[: example.supervised.argmax()].tolist()
        assert prompt.reply == reply
        assert report.rows == 1


def test_prompts_of_conversations_texts_and_questions(tmp_path: Path) -> None:
    tokenizer = byte_level()
    turns = [("user", "q1"), ("assistant", "one"), ("user", "q2 <|im_end|>"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]

    def prompts(row: dict[str, Any]) -> tuple[str, str | None]:
        options = DataOptions(data=(write(tmp_path / "rows.jsonl", [row]),))
        (prompt,), _ = prepare_prompts(options, options, tokenizer)
        assert tokenizer.decode(prompt.input_ids) == prompt.text
        return prompt.text, prompt.reply

    asked = (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nq2 <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts({"messages": messages}) == (asked, "two")
    assert prompts({"messages": messages[:-1]}) == (asked, None)
    assert prompts({"prompt": messages[:-1]}) == (asked, None)
    assert prompts({"prompt": messages[:-1], "completion": messages[-1:]}) == (asked, "two")
    assert prompts({"question": "q"}) == ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", None)
    assert prompts({"text": "once"}) == ("once", None)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}


@pytest.mark.parametrize(
    ("template", "template_args", "reply", "expected"),
    [
        (THINKING, {}, {"content": "yes"}, "<think>\n\n</think>\n\nyes"),
        (THINKING, {"enable_thinking": False}, {"content": "yes"}, "yes"),
        (THINKING, {}, {"content": "yes", "reasoning_content": "hm"}, "<think>\nhm\n</think>\n\nyes"),
        (WITH_TOOLS, {}, {"content": "", "tool_calls": [CALL]}, '<tool_call>add {"n": 1}</tool_call>'),
        (WITH_TOOLS, {}, {"content": " end with <|im_end|> "}, "end with <|im_end|>"),
        # What the template does not render as it asks for it is no turn of its own: the row's words stay.
        (RETHINKING, {"enable_thinking": False}, {"content": "yes"}, "yes"),
    ],
)
def test_the_reply_to_a_prompt_is_all_that_the_template_writes_of_it(
    tmp_path: Path, template: str, template_args: dict[str, Any], reply: dict[str, Any], expected: str
) -> None:
    rows: list[Any] = [{"messages": [CHAT["messages"][0], {"role": "assistant", **reply}]}]
    data = write(tmp_path / "rows.jsonl", rows)
    options = DataOptions(data=(data,), chat_template=template, template_args=template_args)
    (prompt,), _ = prepare_prompts(options, options, byte_level())
    assert prompt.reply == expected


def test_the_reply_to_a_prompt_is_read_from_its_tokens(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "\ufb01ne"}
    options = DataOptions(data=(write(tmp_path / "rows.jsonl", [row]),))
    (prompt,), _ = prepare_prompts(options, options, normalizing())
    assert prompt.reply == "fine", "no tokens that this model could say are the ligature"


def test_tools_that_the_template_leaves_out_are_counted_once_for_a_prompt(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    options = DataOptions(data=(write(tmp_path / "rows.jsonl", [{**CHAT, "tools": tools}]),))
    _, report = prepare_prompts(options, options, byte_level())
    assert report.notes == ("1 row with tools that the chat template does not render",)


def test_a_date_in_the_template_is_pointed_out(tmp_path: Path) -> None:
    template = "{{ date_string or strftime_now('%Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert "date_string" in prepared(tmp_path, [CHAT], chat_template=template).report.notes[-1]
    fixed = prepared(tmp_path, [CHAT], chat_template=template, template_args={"date_string": "1"})
    assert fixed.report.notes == ()


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            {"prompt": "q", "completion": "yes", "system": "s", "system_prompt": "p"},
            "not read: the column system_prompt",
        ),
        ({**CHAT, "system": "s", "tools": None, "id": 3, "lang": "en"}, "not read: the columns id, lang"),
        ({"instruction": "q", "input": "", "output": "yes", "history": []}, "not read: the column history"),
        ({"text": "t", "system": "s"}, "not read: the column system"),
    ],
)
def test_columns_that_nothing_is_taken_from_are_named(tmp_path: Path, row: dict[str, Any], note: str) -> None:
    assert note in prepared(tmp_path, [row]).report.notes


def test_lists_of_messages_in_prompt_and_completion_read_the_other_columns(tmp_path: Path) -> None:
    lists = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:], "system": "s", "tools": None}
    assert not [note for note in prepared(tmp_path, [lists]).report.notes if "not read" in note]


def test_what_carries_no_loss_is_explained_by_its_own_cause(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "q"}]
    with pytest.raises(DataError, match="nothing in the data carries loss") as raised:
        prepared(tmp_path, [{"messages": turns}])
    assert raised.value.why == "1 without a supervised token, 1 row starting with a reply, which carries no loss"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match="nothing in the data carries loss") as raised:
        prepared(tmp_path, [{"messages": turns}], skip_bad=True)
    assert str(raised.value.why).startswith("1 malformed row, the first malformed: ")
    assert "assistant turns" not in str(raised.value.next_step)
