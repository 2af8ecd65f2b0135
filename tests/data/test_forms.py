from __future__ import annotations

import json
from typing import Any

import pytest

from backhand.data.form_reader import FormReader
from backhand.data.forms import detect
from backhand.data.raw_rows import RawRow, RowErrors
from backhand.data.rows import Completion, Conversation, PlainText, Row
from backhand.errors import DataError

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}


def read(values: dict[str, Any], *, allow_prompts: bool = False) -> Row:
    return FormReader(allow_prompts=allow_prompts).read(RawRow(values, "f:1"))


def conversation(values: dict[str, Any]) -> Conversation:
    row = read(values)
    assert isinstance(row, Conversation)
    return row


def completion(values: dict[str, Any], *, allow_prompts: bool = False) -> Completion:
    row = read(values, allow_prompts=allow_prompts)
    assert isinstance(row, Completion)
    return row


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"messages": [USER, REPLY], "prompt": "p", "completion": "c"}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "conversations"),
        ({"prompt": "p", "completion": "c", "text": "t"}, "prompt/completion"),
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "instruction/input/output"),
        ({"instruction": "i", "context": "x", "response": "o", "category": "z"}, "instruction/context/response"),
        ({"question": "q", "answer": "a", "response": "r"}, "question/answer"),
        ({"id": "1", "system_prompt": "", "question": "q", "response": "a"}, "question/response"),
        ({"input": "q", "output": "a"}, "input/output"),
        ({"messages": None, "text": "t", "id": 3}, "text"),
    ],
)
def test_the_form_is_determined_by_the_columns(values: dict[str, Any], name: str) -> None:
    reader = FormReader()
    reader.read(RawRow(values, "f:1"))
    assert reader.form is not None and reader.form.name == name


def test_openai_messages_with_weights_parts_and_an_older_role() -> None:
    row = conversation(
        {
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "x", "weight": 0},
                {"role": "user", "content": "q", "weight": None},
                {"role": "assistant", "content": "y", "weight": 1, "refusal": None},
            ]
        }
    )
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert row.messages[1]["content"] == "ab"
    assert row.supervised == (False, False, False, False, True)
    assert all("weight" not in message for message in row.messages)


def test_tool_calls_hold_tables_as_templates_want_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        REPLY,
    ]
    row = conversation({"messages": messages, "tools": tools})
    assert row.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert row.messages[2]["tool_call_id"] == "c1"
    assert row.tools == tuple(tools)
    assert row.supervised == (False, True, False, True)
    assert conversation({"messages": json.dumps(messages), "tools": json.dumps(tools)}) == row


def test_older_functions_become_tools() -> None:
    row = conversation(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            ],
            "functions": [{"name": "f"}],
        }
    )
    assert row.tools == ({"type": "function", "function": {"name": "f"}},)
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_sharegpt_roles_with_a_system_column_and_function_calls() -> None:
    row = conversation(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a", "weight": 0},
            ],
            "system": "s",
        }
    )
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert row.supervised == (False, False, True, False, False)


def test_lists_of_messages_as_prompt_and_completion_train_on_the_completion_alone() -> None:
    row = conversation({"prompt": [USER, REPLY, USER], "completion": [REPLY]})
    assert len(row.messages) == 4
    assert row.supervised == (False, False, False, True)


def test_instructions_take_their_input_on_board() -> None:
    assert completion({"instruction": "i", "input": "x", "output": "o"}).prompt == "i\n\nx"
    assert completion({"instruction": "i", "input": " ", "output": "o"}).prompt == "i"
    assert completion({"instruction": "i", "input": None, "output": "o"}).prompt == "i"


def test_prompts_stay_as_they_are() -> None:
    row = completion({"prompt": " p ", "completion": " c\n", "system": "s"})
    assert (row.prompt, row.completion, row.system, row.separator) == (" p ", " c\n", "s", "")
    assert read({"text": "t "}) == PlainText("t ", "f:1")


def test_a_form_may_call_its_system_message_something_else() -> None:
    """As OpenOrca does; in no other form is system_prompt read."""
    row = completion({"system_prompt": "s", "question": "q", "response": "a"})
    assert (row.prompt, row.completion, row.system) == ("q", "a", "s")
    assert completion({"system_prompt": None, "system": "s", "question": "q", "response": "a"}).system == "s"
    assert completion({"system_prompt": "s", "question": "q", "answer": "a"}).system is None
    assert conversation({"system_prompt": "s", "question": [USER], "response": [REPLY]}).messages[0]["content"] == "s"
    reader = FormReader()
    reader.read(RawRow({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, "f:1"))
    assert reader.form is not None and reader.form.unread(reader.columns, conversation=False) == ["id"]


def test_rows_that_only_ask_are_for_generation() -> None:
    assert completion({"prompt": "p"}, allow_prompts=True).completion is None
    assert completion({"instruction": "i", "input": "x"}, allow_prompts=True).prompt == "i\n\nx"
    for values in ({"prompt": "p"}, {"prompt": "p", "completion": None}, {"instruction": "i", "output": None}):
        with pytest.raises(DataError, match=r"has (prompt|instruction) but"):
            read(values)


def test_a_single_table_with_a_list_of_tables_contains_the_rows() -> None:
    row = RawRow({"data": [{"prompt": "a", "completion": "b"}], "version": 1}, "f:1")
    with pytest.raises(DataError, match="the rows are a list under the key data"):
        detect(row, following=())
    for following in (None, [row]):
        with pytest.raises(DataError, match="fit no form of row: data, version"):
            detect(row, following=following)


def test_no_list_is_proposed_as_an_answer() -> None:
    rows = [RawRow({"snippet": f"words {n}", "kind": "ab"[n % 2], "votes": [n % 2, 1]}, f"f:{n}") for n in range(9)]
    with pytest.raises(DataError, match="fit no form of row") as refused:
        detect(rows[0], following=rows[1:])
    assert "votes" not in str(refused.value.next_step) and "kind" in str(refused.value.next_step)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "fit no form"),
        ({"foo": "a", "bar": "b"}, "bar, foo"),
        ({"messages": None}, "messages is null"),
        ({"prompt": None, "completion": None, "n": 1}, "prompt and completion are null"),
        ({"prompt": None, "completion": "c"}, "prompt is null"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference"),
        ({"prompt": "p", "completion": 5}, "completion is the number 5"),
        ({"prompt": ["p"], "completion": "c"}, "prompt[0] is the text 'p'"),
        ({"prompt": "p", "completion": ["c"]}, "completion is a list of 1"),
        ({"text": ""}, "text is empty"),
        ({"text": False}, "the truth value false"),
        ({"instruction": " ", "output": "o"}, "instruction is empty"),
        ({"messages": "hello"}, "not valid JSON"),
        ({"messages": "3"}, "the number 3"),
        ({"messages": {}}, "a table"),
        ({"messages": []}, "empty list"),
        ({"messages": ["hi"]}, "messages[0] is the text 'hi'"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is the number 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
        ({"messages": [{"role": "user", "content": [3]}]}, "content[0] is the number 3"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is null"),
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "messages[1].weight is the number 0.5"),
        ({"messages": [USER, {**REPLY, "weight": "1"}]}, "weight is the text '1'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": {}}]}, "content is missing"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "not a tool call"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "not valid JSON",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
            "not a table",
        ),
        ({"messages": [{**USER, "name": 3}]}, "name is the number 3"),
        ({"messages": [USER, REPLY], "tools": 3}, "tools is the number 3"),
        ({"messages": [USER, REPLY], "tools": "["}, "not valid JSON"),
        ({"messages": [USER, REPLY], "system": 3}, "system is the number 3"),
        ({"question": "q", "response": "a", "system_prompt": 3}, "system_prompt is the number 3"),
        ({"question": "q", "response": "a", "system_prompt": "s", "system": ""}, "two system messages"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as raised:
        read(values)
    assert said in raised.value.what
    assert raised.value.where == "f:1"


def test_capital_letters_and_spaces_in_names_of_columns_are_pointed_out() -> None:
    with pytest.raises(DataError) as raised:
        read({"Prompt": "p", " Response": "r"})
    assert raised.value.next_step == "write prompt and response in lower case"


def test_another_form_in_the_same_file_names_both_rows() -> None:
    reader = FormReader()
    reader.read(RawRow({"prompt": "p", "completion": "c"}, "f:1"))
    with pytest.raises(DataError) as raised:
        reader.read(RawRow({"text": "t"}, "f:7"))
    assert raised.value.where == "f:7"
    assert "text" in raised.value.what and "f:1" in raised.value.what
    with pytest.raises(DataError, match="completion is missing"):
        reader.read(RawRow({"prompt": "p"}, "f:8"))
    with pytest.raises(DataError, match="completion is null"):
        reader.read(RawRow({"prompt": "p", "completion": None}, "f:9"))


def test_bad_rows_before_the_first_good_one_do_not_fix_the_form() -> None:
    bad = RowErrors(skip_bad=True)
    reader = FormReader()
    raws = [RawRow({"text": ""}, "f:1"), RawRow({"prompt": "p", "completion": "c"}, "f:2")]
    assert len(list(reader.read_all(raws, bad))) == 1
    assert bad.count == 1
    assert reader.form is not None and reader.form.name == "prompt/completion"


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"question": "q", "output": "a", "system_prompt": "s"}, "rename the column output to answer"),
        ({"instruction": "q", "answer": "a"}, "rename the column answer to output"),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "answers only with --messages chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "answers only with --completion chosen"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "only with --prompt question --completion chosen"),
        ({"prompt": "q", "chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "answers only with --messages chosen"),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, "answers only with --completion chosen"),
        ({"question": "q", "chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "answers only with --messages chosen"),
        ({"question": "q", "chosen": [REPLY], "rejected": [REPLY]}, "or with --objective orpo"),
        ({"chosen": "q a", "rejected": "q b"}, "or with --objective orpo, which learns the chosen answers as well"),
    ],
)
def test_what_to_rename_is_said(values: dict[str, Any], remedy: str) -> None:
    with pytest.raises(DataError) as raised:
        read(values)
    assert remedy in str(raised.value.next_step)


def test_a_row_without_an_answer_names_its_other_columns() -> None:
    with pytest.raises(DataError) as raised:
        read({"question": "q", "reply_text": "a", "id": 3, "note": None})
    assert raised.value.why == "its other columns: reply_text, id"
    with pytest.raises(DataError) as raised:
        read({"question": "q"})
    assert raised.value.why is None and "add a column with the right answers" in str(raised.value.next_step)
