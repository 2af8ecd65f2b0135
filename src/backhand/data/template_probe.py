"""Probe a chat template by rendering test messages: how it reads messages, and what it writes around them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from backhand.data.rows import Message
from backhand.words import begin_alike

SWITCHES = ("enable_thinking", "thinking", "think", "reasoning", "enable_reasoning")
"""Variables by which templates in use switch thoughts on and off."""

THOUGHT, ANSWER = "THOUGHT", "ANSWER"
_QUESTION: Message = {"role": "user", "content": "QUESTION"}
_REPLY: Message = {"role": "assistant", "content": ANSWER}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call00000", "function": {"name": "NAME", "arguments": {"KEY": "VALUE"}}}
    ],
}
_RESULT: Message = {"role": "tool", "content": "RESULT", "name": "NAME", "tool_call_id": "call00000"}


@dataclass(eq=False)
class TemplateProbe:
    """Properties of one chat template, each probed when it is first used.

    Args:
        template: source of the template.
        render: renders messages unchanged, or returns None if the template refuses them.
        special: matches the control tokens of the tokenizer.
        args: variables of the template.
    """

    template: str
    render: Callable[[Sequence[Message]], str | None]
    special: re.Pattern[str]
    args: Mapping[str, Any] = field(default_factory=dict)
    _next_tokens: dict[str, str] = field(default_factory=dict, init=False)

    def normalize_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages in the form that the template reads."""
        as_they_are = not self._reads_parts and self._system_role == "system"
        if as_they_are and not any("reasoning_content" in message or "tool_calls" in message for message in messages):
            return list(messages)
        normalized = []
        for message in messages:
            if "reasoning_content" in message:
                # gpt-oss and LFM 2.5 read thoughts under this name.
                message = {"thinking": message["reasoning_content"], **message}
            if "tool_calls" in message and self._reads_arguments_as_text:
                message = {**message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            if message["role"] == "system" and self._system_role != "system":
                message = {**message, "role": self._system_role}
            if self._reads_parts:
                message = _in_parts(message)
            normalized.append(message)
        return normalized

    @cached_property
    def written_thought(self) -> tuple[str, str] | None:
        """Text that the template writes before and after the thoughts of a reply, or None if it omits thoughts."""
        rendered = self._rendered(_QUESTION, {**_REPLY, "reasoning_content": THOUGHT})
        without = self._rendered(_QUESTION, _REPLY)
        before, thought, after = (rendered or "").partition(THOUGHT)
        if not thought or ANSWER not in after or without is None:
            return None
        return before[header_end(before, without) :], after.partition(ANSWER)[0]

    @cached_property
    def settings(self) -> list[dict[str, bool]]:
        """Settings of the template's thought switches, in the order in which they are tried."""
        return switches(self.template, self.args)

    @cached_property
    def ends_turns(self) -> bool:
        """True if a control token directly follows a reply."""
        text = self._rendered(_QUESTION, _REPLY) or ""
        return self.special.match(text.rpartition(ANSWER)[2].lstrip()) is not None

    def next_token(self, role: str) -> str:
        """Return the control token that starts a turn of this role after a reply without an end of turn, or "".

        White space before the token is included.
        """
        if role not in self._next_tokens:
            message, last, then = (_CALL, "VALUE", _RESULT) if role == "tool" else (_REPLY, ANSWER, _QUESTION)
            alone, more = self._rendered(_QUESTION, message) or "", self._rendered(_QUESTION, message, then) or ""
            tail = alone[alone.rfind(last) :] if last in alone else ""
            after = more[more.rfind(tail) + len(tail) :] if tail and tail in more else ""
            match = self.special.search(after)
            token = after[: match.end()] if match is not None and not after[: match.start()].strip() else ""
            self._next_tokens[role] = token if token or role != "tool" else self.next_token("user")
        return self._next_tokens[role]

    @cached_property
    def _reads_parts(self) -> bool:
        """True if the template renders contents only as lists of parts, as some templates for images do."""
        return self._writes("QUESTION", [_in_parts(_QUESTION)]) and not self._writes("QUESTION", [_QUESTION])

    @cached_property
    def _reads_arguments_as_text(self) -> bool:
        """True if the template needs a call's arguments as text: it refuses a table or prints it as Python does."""
        (call,) = _CALL["tool_calls"]
        shown = str(call["function"]["arguments"])
        as_text = {**_CALL, "tool_calls": [_with_text_arguments(call)]}
        wants_text = not self._writes("VALUE", [_QUESTION, _CALL]) or self._writes(shown, [_QUESTION, _CALL])
        return wants_text and self._writes("VALUE", [_QUESTION, as_text])

    @cached_property
    def _system_role(self) -> str:
        """`developer` if the template renders a system message only under that role, else `system`."""
        if "developer" not in self.template:
            return "system"
        system, developer = ({"role": role, "content": "SYSTEM"} for role in ("system", "developer"))
        known = self._writes("SYSTEM", [system, _QUESTION]) or not self._writes("SYSTEM", [developer, _QUESTION])
        return "system" if known else "developer"

    def _rendered(self, *messages: Message) -> str | None:
        return self.render(self.normalize_messages(messages))

    def _writes(self, text: str, messages: Sequence[Message]) -> bool:
        return text in (self.render(messages) or "")


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def switches(template: str, args: Mapping[str, Any]) -> list[dict[str, bool]]:
    """Return the settings of the switches in a template that differ from `args`, off before on."""
    names = [name for name in SWITCHES if re.search(rf"\b{name}\b", template)]
    return [{name: value} for name in names for value in (False, True) if args.get(name) is not value]


_LONGEST_TAG = 100
_BRACKETS = (("<", ">"), ("[", "]"), ("◁", "▷"))
_OPENING = re.compile(r"(<|\[|◁)([^<>/|\[\]◁▷]+)(?:>|\]|▷)\s*$")


def header_end(prompt: str, text: str) -> int:
    """Return the length of the common prefix, without a tag that differs or that `text` closes immediately.

    Args:
        prompt: messages with the generation prompt.
        text: the same messages with a reply.
    """
    place = begin_alike(prompt, text)
    for left, right in _BRACKETS:
        opened = prompt.rfind(left, 0, place)
        if opened > prompt.rfind(right, 0, place) and right in prompt[place:]:
            return opened
    tag = _OPENING.search(prompt, max(0, place - _LONGEST_TAG), place)
    if tag is not None and text[place:].lstrip().startswith(f"{tag[1]}/{tag[2]}"):
        return tag.start()
    return place
