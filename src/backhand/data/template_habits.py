"""How a chat template reads messages, what it writes around them, and where a reply begins, found by rendering."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from backhand.data.rows import Message
from backhand.words import begin_alike

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
class TemplateHabits:
    """What one chat template does; each habit is looked for when it is first asked for.

    Args:
        render: given messages, what the template makes of them as they stand; None where it refuses.
    """

    template: str
    render: Callable[[Sequence[Message]], str | None]
    special: re.Pattern[str]
    args: Mapping[str, Any] = field(default_factory=dict)  # its variables
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
        rendered = self._rendered(_QUESTION, {**_REPLY, "reasoning_content": THOUGHT})
        without = self._rendered(_QUESTION, _REPLY)
        before, thought, behind = (rendered or "").partition(THOUGHT)
        if not thought or ANSWER not in behind or without is None:
            return None
        return before[_header_end(before, without) :], behind.partition(ANSWER)[0]

    @cached_property
    def settings(self) -> list[dict[str, bool]]:
        """Of the switches of its own, in the order in which they are tried."""
        return switches(self.template, self.args)

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


# Where a reply begins, when the chat template does not render it as it asks for one.
#
# A template asks for a reply with its generation prompt, and what it renders of the reply usually goes on from there.
# Templates of models that think break this: the prompt opens a thought (or closes an empty one), and the reply of the
# row has none (or has one). Three ways out, in this order, each found by rendering:
#
# 1. an empty thought is written before the reply, if the rendering then goes on from the prompt and is otherwise the
#    same: the one that the prompt itself has closed, or the one that the template writes around reasoning_content;
# 2. the prompt that the template writes under a switch of its own (enable_thinking), if the reply goes on from that;
# 3. the reply begins behind the role's header, and the rest of the prompt is not in the document.
#
# Only in the first does generation with the template as it stands ask as the rows were trained on.


SWITCHES = ("enable_thinking", "thinking", "think", "reasoning", "enable_reasoning")
"""Variables by which templates in circulation switch thoughts on and off."""

_LONGEST_TAG = 100
_BRACKETS = (("<", ">"), ("[", "]"), ("◁", "▷"))
_BEGINS_TAG = re.compile(r"\s*[<\[◁]")
_ENDS_CLOSED = re.compile(r"(?:</[^<>]*>|<[^<>|]*\|>|\[/[^\[\]]*\]|◁/[^◁▷]*▷)\s*$")
_OPENING = re.compile(r"(<|\[|◁)([^<>/|\[\]◁▷]+)(?:>|\]|▷)\s*$")


@dataclass(frozen=True)
class ReplyStart:
    """Where a reply begins."""

    text: str  # rendered up to and with the reply
    start: int  # where in it the reply begins
    # `asked` where it goes on from the generation prompt as it stands, else one of the ways above
    how: Literal["asked", "emptied", "switched", "headed"] = "asked"
    detail: str = ""  # the empty thought that was written, the switch as `NAME=VALUE`, or what else the prompt writes


def switches(template: str, args: Mapping[str, Any]) -> list[dict[str, bool]]:
    """The settings of the switches in a template that differ from `args`, off before on."""
    names = [name for name in SWITCHES if re.search(rf"\b{name}\b", template)]
    return [{name: value} for name in names for value in (False, True) if args.get(name) is not value]


def find_start(
    habits: TemplateHabits,
    asked: str,
    text: str,
    *,
    can_have: Callable[[str, str], bool],
    ask: Callable[[Mapping[str, Any]], str | None],
) -> ReplyStart | None:
    """Where the reply begins in `text`, which does not begin with `asked`.

    Args:
        asked: the messages before the reply, with the generation prompt.
        can_have: given an empty thought and the text with it, whether the template renders that text if the thought
            stands before the reply's content.
        ask: renders `asked` with further variables.

    Returns:
        None if the two differ before the prompt could begin a thought: in the role's header, or further up.
    """
    place = _header_end(asked, text)
    rest = asked[place:]
    around = habits.written_thought
    empty_thoughts = [rest] if _ENDS_CLOSED.search(rest) else []
    empty_thoughts += ["".join(around)] if around is not None else []
    for empty in empty_thoughts:
        with_empty = text[:place] + empty + text[place:]
        if with_empty.startswith(asked) and can_have(empty, with_empty):
            return ReplyStart(with_empty, len(asked), "emptied", empty)
    for setting in habits.settings:
        other = ask(setting)
        if other is not None and text.startswith(other):
            words = ", ".join(f"{name}={json.dumps(value)}" for name, value in setting.items())
            return ReplyStart(text, len(other), "switched", words)
    if _BEGINS_TAG.match(rest):
        return ReplyStart(text, place, "headed", rest)
    return None


def _header_end(asked: str, text: str) -> int:
    """How far both are alike, before a tag that only begins alike or that is closed at once in `text`."""
    place = begin_alike(asked, text)
    for left, right in _BRACKETS:
        opened = asked.rfind(left, 0, place)
        if opened > asked.rfind(right, 0, place) and right in asked[place:]:
            return opened
    tag = _OPENING.search(asked, max(0, place - _LONGEST_TAG), place)
    if tag is not None and text[place:].lstrip().startswith(f"{tag[1]}/{tag[2]}"):
        return tag.start()
    return place
