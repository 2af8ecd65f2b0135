"""How a chat template reads messages, and what it writes around them, found by rendering small conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from backhand.data.messages import Message
from backhand.data.reply_start import ANSWER, THOUGHT, thought_around

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
class TemplateHabits:
    """What one chat template does; each habit is looked for when it is first asked for.

    Args:
        render: given messages, what the template makes of them as they stand; None where it refuses.
    """

    template: str
    render: Callable[[Sequence[Message]], str | None]
    special: re.Pattern[str]
    _next_tokens: dict[str, str] = field(default_factory=dict, init=False)

    def shaped(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in the form in which the template reads them."""
        as_they_are = not self._reads_parts and self._system_role == "system"
        if as_they_are and not any("reasoning_content" in message or "tool_calls" in message for message in messages):
            return list(messages)
        shaped = []
        for message in messages:
            if "reasoning_content" in message:
                # gpt-oss and LFM 2.5 read them under this name.
                message = {"thinking": message["reasoning_content"], **message}
            if "tool_calls" in message and self._reads_arguments_as_text:
                message = {**message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            if message["role"] == "system" and self._system_role != "system":
                message = {**message, "role": self._system_role}
            if self._reads_parts:
                message = _in_parts(message)
            shaped.append(message)
        return shaped

    @cached_property
    def written_thought(self) -> tuple[str, str] | None:
        """What the template writes before and behind the thoughts of a reply; None if it does not write them down."""
        with_thought = self._rendered(_QUESTION, {**_REPLY, "reasoning_content": THOUGHT})
        without = self._rendered(_QUESTION, _REPLY)
        return None if with_thought is None or without is None else thought_around(with_thought, without)

    @cached_property
    def ends_turns(self) -> bool:
        """Whether a control token stands behind a reply before anything else does."""
        text = self._rendered(_QUESTION, _REPLY) or ""
        return self.special.match(text.rpartition(ANSWER)[2].lstrip()) is not None

    def next_token(self, role: str) -> str:
        """The control token with which a turn of a role begins behind a reply that nothing ends; empty if none does.

        It comes with the white space before it.
        """
        if role not in self._next_tokens:
            asked, last, then = (_CALL, "VALUE", _RESULT) if role == "tool" else (_REPLY, ANSWER, _QUESTION)
            alone, more = self._rendered(_QUESTION, asked) or "", self._rendered(_QUESTION, asked, then) or ""
            tail = alone[alone.rfind(last) :] if last in alone else ""
            behind = more[more.rfind(tail) + len(tail) :] if tail and tail in more else ""
            begun = self.special.search(behind)
            found = behind[: begun.end()] if begun is not None and not behind[: begun.start()].strip() else ""
            self._next_tokens[role] = found if found or role != "tool" else self.next_token("user")
        return self._next_tokens[role]

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template writes contents down only where they are lists of parts, as some for images do."""
        return self._writes("QUESTION", [_in_parts(_QUESTION)]) and not self._writes("QUESTION", [_QUESTION])

    @cached_property
    def _reads_arguments_as_text(self) -> bool:
        """Whether the template joins the arguments of a call as text: it refuses a table, or shows Python's form."""
        (call,) = _CALL["tool_calls"]
        shown = str(call["function"]["arguments"])
        as_text = {**_CALL, "tool_calls": [_with_text_arguments(call)]}
        wants_text = not self._writes("VALUE", [_QUESTION, _CALL]) or self._writes(shown, [_QUESTION, _CALL])
        return wants_text and self._writes("VALUE", [_QUESTION, as_text])

    @cached_property
    def _system_role(self) -> str:
        """`developer` where the template writes a system message down only under that name."""
        if "developer" not in self.template:
            return "system"
        system, developer = ({"role": role, "content": "SYSTEM"} for role in ("system", "developer"))
        known = self._writes("SYSTEM", [system, _QUESTION]) or not self._writes("SYSTEM", [developer, _QUESTION])
        return "system" if known else "developer"

    def _rendered(self, *messages: Message) -> str | None:
        return self.render(self.shaped(messages))

    def _writes(self, text: str, messages: Sequence[Message]) -> bool:
        return text in (self.render(messages) or "")


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
