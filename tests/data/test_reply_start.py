from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backhand.data.chat import ChatRenderer
from backhand.data.lint import lint
from backhand.data.messages import read_conversation
from backhand.data.options import DataOptions, TemplateOptions
from backhand.data.prepare import prepare, prepare_prompts
from backhand.data.rows import Conversation
from backhand.data.template_probe import switches
from backhand.data.text_encoder import TextEncoder
from tests.support.tokenizer_kinds import byte_level

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n"

OPENING = _TURNS + _ASKS + "<think>\n{% endif %}"
"""As DeepSeek-R1: the prompt opens a thought, and nothing writes an empty one."""

WRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + _ASKS + "<think>\n{% endif %}"
)
"""The prompt opens a thought, and one of the row's is written; none where the row has none."""

CLOSING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}" + _ASKS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}"
    "<think>\n{% endif %}{% endif %}"
)
"""As Nemotron 3: an empty thought of another form than the prompt opens, and a switch."""


def starts(chat: ChatRenderer) -> dict[object, int]:
    """Replies that do not continue the generation prompt, by how they start."""
    return {key: count for key, count in chat.seen.items() if isinstance(key, tuple)}


def renderer(template: str, **args: Any) -> ChatRenderer:
    tokenizer = byte_level()
    return ChatRenderer(tokenizer, TextEncoder(tokenizer, template), template, TemplateOptions(template_args=args))


def talk(*contents: str, **more: str) -> Conversation:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    messages[-1] |= more
    return read_conversation("messages", messages, {}, "f:1")


def reply_start(chat: ChatRenderer, conversation: Conversation) -> tuple[str, str]:
    """Return the text between the last turn's start and its reply, and the reply."""
    document = chat.documents(conversation)[-1]
    ((start, end),) = document.spans[-1:]
    return document.text[document.text.rindex("<|im_start|>") : start], document.text[start:end]


def test_an_empty_thought_as_the_template_writes_thoughts_goes_on_from_the_prompt() -> None:
    chat = renderer(WRITING)
    assert reply_start(chat, talk("q", "x")) == ("<|im_start|>assistant\n<think>\n", "\n</think>\n\nx<|im_end|>")
    assert starts(chat) == {("emptied", "<think>\n\n</think>\n\n"): 1}
    thoughtful = talk("q", "x", reasoning_content="hm")
    assert reply_start(chat, thoughtful) == ("<|im_start|>assistant\n<think>\n", "hm\n</think>\n\nx<|im_end|>")
    assert sum(starts(chat).values()) == 1


def test_without_a_way_to_write_one_the_reply_begins_after_the_header() -> None:
    chat = renderer(OPENING)
    assert reply_start(chat, talk("q", "x")) == ("<|im_start|>assistant\n", "x<|im_end|>")
    assert reply_start(chat, talk("q", "<b>x</b>")) == ("<|im_start|>assistant\n", "<b>x</b><|im_end|>")
    assert reply_start(chat, talk("q", "")) == ("<|im_start|>assistant\n", "<|im_end|>")
    assert starts(chat) == {("headed", "<think>\n"): 3}
    (document,) = chat.documents(talk("q", "x", "r", "y"))
    assert len(document.spans) == 2


def test_an_empty_thought_of_another_form_begins_where_the_switched_prompt_ends() -> None:
    chat = renderer(CLOSING)
    assert reply_start(chat, talk("q", "x")) == ("<|im_start|>assistant\n<think></think>", "x<|im_end|>")
    assert starts(chat) == {("switched", "enable_thinking=false"): 1}
    off = renderer(CLOSING, enable_thinking=False)
    assert reply_start(off, talk("q", "x")) == reply_start(chat, talk("q", "x"))
    assert not starts(off)
    assert reply_start(off, talk("q", "<think>\nhm</think>x")) == (
        "<|im_start|>assistant\n<think>\n",
        "hm</think>x<|im_end|>",
    )
    assert starts(off) == {("switched", "enable_thinking=true"): 1}


def test_without_a_switch_a_thought_closed_at_once_is_learnt_whole() -> None:
    template = CLOSING.replace("enable_thinking", "no_such_switch")
    assert reply_start(renderer(template), talk("q", "x")) == ("<|im_start|>assistant\n", "<think></think>x<|im_end|>")


@pytest.mark.parametrize("template", [OPENING, WRITING, CLOSING])
@pytest.mark.parametrize("content", ["", "<", "<think", "[", "</think>", "\n\nx", "<|im_end|>", "THOUGHT", "ANSWER"])
def test_whatever_a_reply_begins_with_it_is_learnt_whole_and_found(template: str, content: str) -> None:
    chat = renderer(template)
    (document,) = chat.documents(talk("q", content))
    ((start, end),) = document.spans
    said = document.text[start:end].replace(document.mark or "", "")
    assert said.endswith(f"{content}<|im_end|>")
    assert end == len(document.text)
    assert document.text[:start].startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")


def test_switches_are_whole_words_that_the_arguments_have_not_set() -> None:
    template = "{% if enable_thinking and my_reasoning %}{% endif %}"
    assert switches(template, {}) == [{"enable_thinking": False}, {"enable_thinking": True}]
    assert switches(template, {"enable_thinking": True}) == [{"enable_thinking": False}]
    assert switches("{{ 'I am thinking' }}", {"thinking": False}) == [{"thinking": True}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (OPENING, ("2 replies trained on directly after the role's header", repr("<think>\n"), "--chat-template FILE")),
        (WRITING, ("2 replies without thoughts", repr("<think>\n\n</think>\n\n"))),
        (CLOSING, ("2 replies which the chat template renders only with", "--template-args enable_thinking=false")),
    ],
)
def test_the_run_and_lint_say_what_it_means_at_generation(
    template: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "completion": "x"}) + "\n" for q in "ab"))
    options = DataOptions(data=(str(path),), chat_template=template)
    train, _ = prepare(options, byte_level())
    report, _ = lint(options, byte_level())
    for notes in (train.report.notes, train.report.lines(), report.train.notes, report.to_json()["train"]["notes"]):
        assert any(all(word in note for word in words) for note in notes), notes


@pytest.mark.parametrize("template", [OPENING, WRITING, CLOSING])
def test_prompts_of_rows_with_an_answer_end_where_training_has_the_reply_begin(template: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "x"}))
    options = DataOptions(data=(str(path),), chat_template=template)
    train, _ = prepare(options, byte_level())
    ((prompt,), _) = prepare_prompts(options, options, byte_level())
    (example,) = train.examples
    assert prompt.input_ids.tolist() == example.input_ids[~example.supervised].tolist()
    assert prompt.reply is not None and prompt.reply.endswith("x")
