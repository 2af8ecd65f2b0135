"""What a chat template does beyond writing the messages down, found by rendering small conversations."""

from __future__ import annotations

import re
from typing import Any

from backhand.data.chat import ChatRenderer, read_template
from backhand.data.messages import Conversation, Message
from backhand.data.options import TemplateOptions
from backhand.data.rows import shorten
from backhand.data.text_encoder import TextEncoder
from backhand.errors import DataError

_QUESTION, _ANSWER = "QUESTION", "ANSWER"


def probe_template(tokenizer: Any, options: TemplateOptions) -> list[str]:
    """Its habits, a sentence each; nothing if there is no template.

    Raises:
        UsageError, ArtifactError: the template cannot be read, or is not valid Jinja.
    """
    template = read_template(options.chat_template, tokenizer)
    if template is None:
        return ["there is no chat template: prompts and completions are joined as they stand"]
    encoder = TextEncoder(tokenizer, template)
    chat = ChatRenderer(
        tokenizer,
        encoder,
        template,
        from_option=options.chat_template is not None,
        template_args=options.template_args,
        system=options.system,
    )
    asked = _prompt(chat, ("user", _QUESTION))
    if asked is None:
        return ["the chat template refuses a single question"]
    habits = []
    before = asked.partition(_QUESTION)[0]
    if options.system is None and any(len(word) > 3 for word in before.split()[1:]):
        habits.append(f"the chat template puts its own words before the first message: {shorten(before)!r}")
    trimmed = _prompt(chat, ("user", f"\n {_QUESTION} \n"))
    if trimmed is not None and f"\n {_QUESTION} \n" not in trimmed:
        habits.append("the chat template trims white space from messages")
    if options.system is None and _prompt(chat, ("system", "S"), ("user", _QUESTION)) is None:
        habits.append("the chat template refuses a system message")
    if _prompt(chat, ("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION)) is None:
        habits.append("the chat template refuses a second question")
    habits += _habits_of_replies(chat, encoder)
    return habits


def _habits_of_replies(chat: ChatRenderer, encoder: TextEncoder) -> list[str]:
    turns = [("user", _QUESTION), ("assistant", f"<think>\n\n</think>\n\n{_ANSWER}")] * 2
    habits = []
    try:
        (first, *others) = chat.documents(_conversation(*turns))
    except DataError as error:
        return [f"{error.what}: {error.why}"]
    start, end = first.spans[0]
    header = re.split(f"{_ANSWER}|</?think>", first.text[start:end])[0]
    if header.strip():
        habits.append(f"the reply's header {header!r} carries loss, since the generation prompt does not write it")
    if others:
        habits.append("the chat template rewrites earlier replies; each reply becomes a document of its own")
    if first.append_eos:
        habits.append("the chat template does not end replies with a control token; the end of sequence is added")
    elif encoder.eos and not first.text.rstrip().endswith(encoder.eos):
        habits.append(f"replies end with {first.text.split()[-1][-20:]!r}, which is not the end of sequence")
    return habits


def _prompt(chat: ChatRenderer, *turns: tuple[str, str]) -> str | None:
    try:
        return chat.prompt(_conversation(*turns)).text
    except DataError:
        return None


def _conversation(*turns: tuple[str, str]) -> Conversation:
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    supervised = tuple(message["role"] == "assistant" for message in messages)
    return Conversation(tuple(messages), supervised, None, "template")
