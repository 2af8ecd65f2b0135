"""Describe a chat template in sentences, for `lint`."""

from __future__ import annotations

import re
from typing import Any

from backhand.data.chat import ChatRenderer, read_template
from backhand.data.options import TemplateOptions
from backhand.data.rows import Conversation
from backhand.data.text_encoder import TextEncoder
from backhand.errors import DataError
from backhand.words import shorten

_SYSTEM, _QUESTION, _ANSWER = "SYSTEM", "QUESTION", "ANSWER"


def describe_template(tokenizer: Any, options: TemplateOptions) -> list[str]:
    """Return the properties of the chat template, one sentence each.

    Raises:
        UsageError, ArtifactError: the template cannot be read, or is not valid Jinja.
    """
    template = read_template(options.chat_template, tokenizer)
    if template is None:
        return ["there is no chat template: prompts and completions are joined without one"]
    encoder = TextEncoder(tokenizer, template)
    chat = ChatRenderer(tokenizer, encoder, template, options)
    prompt = _prompt(chat, ("user", _QUESTION))
    if prompt is None:
        return ["the chat template refuses a single user message"]
    properties = []
    before = prompt.partition(_QUESTION)[0]
    if options.system is None and any(len(word) > 3 for word in before.split()[1:]):
        properties.append(f"the chat template adds text before the first message: {shorten(before)!r}")
    trimmed = _prompt(chat, ("user", f"\n {_QUESTION} \n"))
    if trimmed is not None and f"\n {_QUESTION} \n" not in trimmed:
        properties.append("the chat template trims white space from messages")
    if options.system is None and _prompt(chat, ("system", "S"), ("user", _QUESTION)) is None:
        properties.append("the chat template refuses a system message")
    if _prompt(chat, ("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION)) is None:
        properties.append("the chat template refuses a second user message")
    properties += _reply_properties(chat, encoder)
    return properties


def default_system(tokenizer: Any) -> str | None:
    """Return the system message that the chat template writes if a conversation has none; None without one."""
    template = read_template(None, tokenizer)
    if template is None:
        return None
    chat = ChatRenderer(tokenizer, TextEncoder(tokenizer, template), template, TemplateOptions())
    given, default = _prompt(chat, ("system", _SYSTEM), ("user", _QUESTION)), _prompt(chat, ("user", _QUESTION))
    if given is None or default is None or given.count(_SYSTEM) != 1:
        return None
    before, after = given.split(_SYSTEM)
    message = default.removeprefix(before).removesuffix(after)
    same = message and _prompt(chat, ("system", message), ("user", _QUESTION)) == default == before + message + after
    return message if same else None


def _reply_properties(chat: ChatRenderer, encoder: TextEncoder) -> list[str]:
    turns = [("user", _QUESTION), ("assistant", f"<think>\n\n</think>\n\n{_ANSWER}")] * 2
    properties = []
    try:
        (first, *others) = chat.documents(_conversation(*turns))
    except DataError as error:
        return [f"{error.what}: {error.why}"]
    start, end = first.spans[0]
    header = re.split(f"{_ANSWER}|</?think>", first.text[start:end])[0]
    if header.strip():
        properties.append(
            f"the reply's header {header!r} carries loss, since the generation prompt does not contain it"
        )
    if others:
        properties.append("the chat template rewrites earlier replies; each reply becomes a document of its own")
    if first.append_eos:
        properties.append("the chat template ends replies with no control token; the end-of-sequence token is added")
    elif encoder.eos and not first.text.rstrip().endswith(encoder.eos):
        properties.append(f"replies end with {first.text.split()[-1][-20:]!r}, which is not the end-of-sequence token")
    return properties


def _prompt(chat: ChatRenderer, *turns: tuple[str, str]) -> str | None:
    try:
        return chat.prompt(_conversation(*turns)).text
    except DataError:
        return None


def _conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation.of([{"role": role, "content": content} for role, content in turns], "template")
