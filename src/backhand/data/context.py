"""Prompts of the teacher in distillation: a context in front of every prompt, or a demonstration in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from backhand.data.messages import read_turns
from backhand.data.rows import TEMPLATE_PLACES, Completion, Conversation, Message, OneText, PlainText, Row
from backhand.errors import DataError, UsageError
from backhand.reading import MAX_SETTINGS_BYTES, read_plain
from backhand.words import shorten

_LONGEST_NAME = 255
"""Largest number of characters of a context that may be the name of a file."""


def context_text(context: str) -> str:
    """Return the text of the option `context`: the contents of the file, or the option itself if it is a text.

    Contents end with a newline, so that the result of a returned text is the text itself, also if it is one word.

    Raises:
        UsageError: it is one word, and no readable file has this name; or the file is empty.
    """
    if len(context) > _LONGEST_NAME or "\n" in context or (" " in context.strip() and not Path(context).exists()):
        return context
    try:
        text = read_plain(Path(context), MAX_SETTINGS_BYTES).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{shorten(context)!r} is neither a readable file nor a text of several words",
            where="context",
            why=str(error),
            next_step="name a file in UTF-8, or give the prompt itself",
        ) from None
    if not text:
        raise UsageError("the file is empty", where=f"context, {context}", next_step="write the prompt into it")
    return f"{text}\n"


def context_messages(text: str) -> tuple[Message, ...]:
    """Return the messages of a context: those of a JSON list of messages, else one system message.

    Raises:
        DataError: a message of the list is malformed.
    """
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list):
            return tuple(message for message, _ in read_turns("context", listed, "context"))
    return ({"role": "system", "content": text.strip()},)


def with_context(row: Row, context: tuple[Message, ...]) -> OneText:
    """Return a row with the context in front. A system message of the row continues that of the context.

    Raises:
        DataError: the row is plain text, pairs or decisions.
    """
    alone = len(context) == 1 and context[0]["role"] == "system"
    if isinstance(row, Completion):
        if alone:  # without a chat template, a system message is joined to the prompt
            text = context[0]["content"]
            return replace(row, system=text if row.system is None else f"{text}\n\n{row.system}")
        messages: list[Message] = [] if row.system is None else [{"role": "system", "content": row.system}]
        messages.append({"role": "user", "content": row.prompt})
        if row.completion is not None:
            messages.append({"role": "assistant", "content": row.completion})
        row = Conversation.of(messages, row.source)
    if not isinstance(row, Conversation):
        what = "plain text" if isinstance(row, PlainText) else "this form"
        raise DataError(
            f"a row of {what} has no prompt that the context could be in front of",
            where=row.source,
            next_step="write the rows as prompt and completion, or as messages",
        )
    front, own, carries = list(context), row.messages, row.supervised
    if own[0]["role"] == "system":
        text = own[0]["content"]
        if front[0]["role"] == "system":
            front[0] = {**front[0], "content": f"{front[0]['content']}\n\n{text}"}
        else:
            front.insert(0, own[0])
        own, carries = own[1:], carries[1:]
    return replace(row, messages=(*front, *own), supervised=(*(False for _ in front), *carries))


def with_demonstration(row: Row, template: str) -> OneText:
    """Return the prompt of a row with its answer as a demonstration, as the template says, and without the answer.

    Raises:
        DataError: the row has no prompt that an answer follows.
    """
    if isinstance(row, Completion) and row.completion is not None:
        return replace(row, prompt=_filled(template, row.prompt, row.completion), completion=None)
    if isinstance(row, Conversation) and [one["role"] for one in row.messages[-2:]] == ["user", "assistant"]:
        *before, asked, answer = row.messages
        asked = {**asked, "content": _filled(template, asked["content"], answer["content"])}
        return replace(row, messages=(*before, asked), supervised=(*row.supervised[:-2], False))
    raise DataError(
        "the row has no demonstration, which is an answer to its last prompt",
        where=row.source,
        next_step="write the rows as prompt and completion, or as messages that end with user and assistant",
    )


def _filled(template: str, prompt: str, demonstration: str) -> str:
    values = dict(zip(TEMPLATE_PLACES, (prompt, demonstration), strict=True))
    places = "|".join(map(re.escape, values))
    return re.sub(places, lambda place: values[place[0]], template)


@dataclass(frozen=True)
class TeacherPrompts:
    """The prompts that the teacher reads: with a context, or with the row's own answer as a demonstration."""

    context: str | None = None  # see `context_messages`; None for demonstrations
    template: str = ""  # see `with_demonstration`
    sampled: bool = False  # True if answers are sampled later, so that rows are prompts

    @cached_property
    def _messages(self) -> tuple[Message, ...] | None:
        return None if self.context is None else context_messages(self.context)

    def of(self, row: Row) -> OneText:
        """Return the row as the teacher reads it. Raises DataError if the row has not the necessary form."""
        return with_demonstration(row, self.template) if self._messages is None else with_context(row, self._messages)
