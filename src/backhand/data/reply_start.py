"""Where a reply begins, when the chat template does not render it as it asks for one.

A template asks for a reply with its generation prompt, and what it renders of the reply usually goes on from there.
Templates of models that think break this: the prompt opens a thought (or closes an empty one), and the reply of the row
has none (or has one). Three ways out, in this order, each found by rendering:

1. an empty thought is written before the reply, if the rendering then goes on from the prompt and is otherwise the
   same: the one that the prompt itself has closed, or the one that the template writes around reasoning_content;
2. the prompt that the template writes under a switch of its own (`enable_thinking`), if the reply goes on from that;
3. the reply begins behind the role's header, and the rest of the prompt is not in the document.

Only in the first does generation with the template as it stands ask as the rows were trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

SWITCHES = ("enable_thinking", "thinking", "think", "reasoning", "enable_reasoning")
"""Variables by which templates in circulation switch thoughts on and off."""

_LONGEST_TAG = 100
THOUGHT, ANSWER = "THOUGHT", "ANSWER"
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
    asked: str,
    text: str,
    *,
    can_have: Callable[[str, str], bool],
    ask: Callable[[Mapping[str, Any]], str | None],
    settings: Iterable[Mapping[str, Any]],
    written_thought: Callable[[], tuple[str, str] | None],
) -> ReplyStart | None:
    """Where the reply begins in `text`, which does not begin with `asked`.

    Args:
        asked: the messages before the reply, with the generation prompt.
        can_have: given an empty thought and the text with it, whether the template renders that text if the thought
            stands before the reply's content.
        ask: renders `asked` with further variables.
        settings: such variables, in the order in which they are tried.
        written_thought: what the template writes before and behind a thought of reasoning_content, if it writes it.

    Returns:
        None if the two differ before the prompt could begin a thought: in the role's header, or further up.
    """
    place = _header_end(asked, text)
    rest = asked[place:]
    around = written_thought()
    empty_thoughts = [rest] if _ENDS_CLOSED.search(rest) else []
    empty_thoughts += ["".join(around)] if around is not None else []
    for empty in empty_thoughts:
        with_empty = text[:place] + empty + text[place:]
        if with_empty.startswith(asked) and can_have(empty, with_empty):
            return ReplyStart(with_empty, len(asked), "emptied", empty)
    for setting in settings:
        other = ask(setting)
        if other is not None and text.startswith(other):
            words = ", ".join(f"{name}={json.dumps(value)}" for name, value in setting.items())
            return ReplyStart(text, len(other), "switched", words)
    if _BEGINS_TAG.match(rest):
        return ReplyStart(text, place, "headed", rest)
    return None


def thought_around(rendered: str, without: str) -> tuple[str, str] | None:
    """What a template writes before and behind a thought, from the same reply rendered with THOUGHT and without one."""
    if THOUGHT not in rendered or ANSWER not in rendered[rendered.index(THOUGHT) :]:
        return None
    before, _, behind = rendered.partition(THOUGHT)
    return before[_header_end(before, without) :], behind.partition(ANSWER)[0]


def _header_end(asked: str, text: str) -> int:
    """How far both are alike, before a tag that only begins alike or that is closed at once in `text`."""
    place = next((i for i, (a, b) in enumerate(zip(asked, text, strict=False)) if a != b), min(len(asked), len(text)))
    for left, right in _BRACKETS:
        opened = asked.rfind(left, 0, place)
        if opened > asked.rfind(right, 0, place) and right in asked[place:]:
            return opened
    tag = _OPENING.search(asked, max(0, place - _LONGEST_TAG), place)
    if tag is not None and text[place:].lstrip().startswith(f"{tag[1]}/{tag[2]}"):
        return tag.start()
    return place
