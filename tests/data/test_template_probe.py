from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from backhand.data.template_probe import TemplateProbe
from backhand.data.text_encoder import TextEncoder
from tests.support.tokenizer_kinds import ALTERNATING, WITH_TOOLS, WITHOUT_END, byte_level

_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [_CALL]},
]
_CALLS = "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments }}]{% endfor %}"


def probe(template: str) -> TemplateProbe:
    tokenizer = byte_level()

    def render(messages: Sequence[dict[str, Any]]) -> str | None:
        try:
            return str(tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False))
        except Exception:  # noqa: BLE001 - a template raises whatever its expressions raise
            return None

    return TemplateProbe(template, render, TextEncoder(tokenizer).special)


def each(written: str) -> str:
    return "{% for m in messages %}" + written + "{% endfor %}"


def test_messages_stay_as_they_are_but_for_a_second_name_of_thoughts() -> None:
    assert probe(WITH_TOOLS).normalize_messages(MESSAGES) == [*MESSAGES[:2], MESSAGES[2] | {"thinking": "hm"}]
    assert probe(WITH_TOOLS).normalize_messages(MESSAGES[:2]) == MESSAGES[:2]
    assert probe(ALTERNATING).normalize_messages(MESSAGES[1:2]) == MESSAGES[1:2]


@pytest.mark.parametrize("calls", [_CALLS, _CALLS.replace("{{ call.function.a", "{{ '' + call.function.a")])
def test_arguments_are_text_where_a_table_is_refused_or_shown_as_python_has_it(calls: str) -> None:
    (*_, reply) = probe(each("{{ m.content }}" + calls)).normalize_messages(MESSAGES)
    assert reply["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}]
    assert _CALL["function"] == {"name": "f", "arguments": {"x": "é"}}


def test_contents_are_parts_where_only_these_are_written() -> None:
    normalized = probe(each("{% for part in m.content %}{{ part.text }}{% endfor %}")).normalize_messages(MESSAGES)
    assert [message["content"] for message in normalized] == [[{"type": "text", "text": text}] for text in "sqa"]
    assert (
        probe(each("{{ m.content[0].text if m.content is not string else m.content }}")).normalize_messages(
            MESSAGES[:2]
        )
        == (MESSAGES[:2])
    )


@pytest.mark.parametrize(
    ("condition", "role"),
    [
        ("m.role in ['developer', 'user', 'assistant']", "developer"),
        ("m.role in ['system', 'developer', 'user', 'assistant']", "system"),
        ("m.role == 'user'", "system"),
    ],
)
def test_the_name_of_the_system(condition: str, role: str) -> None:
    normalized = probe(each("{% if " + condition + " %}{{ m.content }}{% endif %}")).normalize_messages(MESSAGES)
    assert [message["role"] for message in normalized] == [role, "user", "assistant"]


def test_what_stops_a_reply_that_nothing_ends() -> None:
    roles = probe(each("{{ '<|im_start|>' if m.role == 'user' else '<|endoftext|>' }}{{ m.content }}"))
    assert not roles.ends_turns
    assert roles.next_token("user") == "<|im_start|>"
    spaced = probe(each("{{ '\n<|im_start|>' if m.role == 'user' else '' }}{{ m.content }}"))
    assert spaced.next_token("user") == "\n<|im_start|>"
    assert spaced.next_token("tool") == "\n<|im_start|>", "it writes no calls, so only the user's is known"
    assert probe(WITHOUT_END).next_token("user") == ""
    assert probe(WITH_TOOLS).ends_turns
    assert not probe("{{ raise_exception('no') }}").ends_turns
    assert probe("{{ raise_exception('no') }}").next_token("tool") == ""


def test_what_is_written_around_a_thought() -> None:
    thought = "{% if m.reasoning_content %}<t>{{ m.reasoning_content }}</t>\n{% endif %}"
    assert probe(each("<|im_start|>" + thought + "{{ m.content }}")).written_thought == ("<t>", "</t>\n")
    assert probe(each("{{ m.content }}" + thought)).written_thought is None
    assert probe(WITH_TOOLS).written_thought is None
