"""Find the start of a reply that does not continue the generation prompt of its chat template.

A template requests a reply with its generation prompt, and the rendered reply usually continues that prompt. Templates
of models that think differ: the prompt opens a thought, or closes an empty one, and the reply of the row has none, or
has one. There are three ways to proceed. They are tried by rendering, in this order:

1. `emptied`: insert an empty thought before the reply. It is the one that the prompt itself closes, or the one that the
   template writes around reasoning_content. The new rendering must continue the prompt and be otherwise unchanged.
2. `switched`: use the prompt that the template renders under one of its switches (enable_thinking), if the reply
   continues that prompt.
3. `headed`: start the reply after the role's header. The rest of the prompt is not in the document.

Only in the first way does generation with the unchanged template use the prompt that the rows were trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backhand.data.template_probe import TemplateProbe, header_end

_BEGINS_TAG = re.compile(r"\s*[<\[◁]")
_ENDS_CLOSED = re.compile(r"(?:</[^<>]*>|<[^<>|]*\|>|\[/[^\[\]]*\]|◁/[^◁▷]*▷)\s*$")


@dataclass(frozen=True)
class ReplyStart:
    """The start of a reply in a rendered conversation."""

    text: str  # rendered up to and with the reply
    start: int  # index in the text at which the reply starts
    # `asked` if it continues the unchanged generation prompt, else one of the three ways above
    how: Literal["asked", "emptied", "switched", "headed"] = "asked"
    detail: str = ""  # the inserted empty thought, the switch as `NAME=VALUE`, or the rest of the prompt


def find_start(
    probe: TemplateProbe,
    prompt: str,
    text: str,
    *,
    can_have: Callable[[str, str], bool],
    ask: Callable[[Mapping[str, Any]], str | None],
) -> ReplyStart | None:
    """Return the start of the reply in `text`, which does not start with `prompt`.

    Args:
        probe: of the chat template.
        prompt: the messages before the reply, with the generation prompt.
        text: the rendering up to and with the reply.
        can_have: takes an empty thought and the text that contains it. It returns True if the template renders that
            text when the thought is put before the reply's content.
        ask: renders `prompt` with further variables.

    Returns:
        None if the two differ before the prompt could open a thought: in the role's header, or earlier.
    """
    place = header_end(prompt, text)
    rest = prompt[place:]
    around = probe.written_thought
    empty_thoughts = [rest] if _ENDS_CLOSED.search(rest) else []
    empty_thoughts += ["".join(around)] if around is not None else []
    for empty in empty_thoughts:
        with_empty = text[:place] + empty + text[place:]
        if with_empty.startswith(prompt) and can_have(empty, with_empty):
            return ReplyStart(with_empty, len(prompt), "emptied", empty)
    for setting in probe.settings:
        other = ask(setting)
        if other is not None and text.startswith(other):
            words = ", ".join(f"{name}={json.dumps(value)}" for name, value in setting.items())
            return ReplyStart(text, len(other), "switched", words)
    if _BEGINS_TAG.match(rest):
        return ReplyStart(text, place, "headed", rest)
    return None
