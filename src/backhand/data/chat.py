"""Conversations to text by the chat template, with the spans that carry loss, found by rendering alone.

The reply at message i begins where the rendering of the messages before it, with the generation prompt, ends, and ends
where the rendering up to and with it ends: that is what a model sees and what it then has to write. The reply's last
control token, its end of turn, belongs to it; white space that the template puts behind that does not, since generation
has stopped by then.

Where the template renders a turn differently once others follow (Qwen3 takes the thoughts out of earlier turns), what
is rendered up to that turn is no beginning of the whole, and the turn becomes a document of its own, with its own past.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backhand.data.messages import Conversation, Message
from backhand.data.rows import shorten
from backhand.data.text_encoder import TextEncoder
from backhand.errors import ArtifactError, BackhandError, DataError, UsageError

NO_TEMPLATE = "none"


@dataclass(frozen=True)
class Document:
    """Text that becomes one sequence of tokens.

    Attributes:
        text: rendered, with `mark` behind the first character of every control token that came from data.
        spans: (start, end) places in `text`, ascending, whose tokens carry loss.
        mark: see `backhand.data.text_encoder`.
        append_eos: the text does not end as a turn or a document does, so the end-of-sequence token is added to it,
            with loss if a span reaches the end.
        prefix: put the tokenizer's begin-of-sequence token first (a chat template writes its own).
        source: where the row stands.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    mark: str | None
    append_eos: bool
    prefix: bool
    source: str


def read_template(option: str | None, tokenizer: Any) -> str | None:
    """The chat template to use: the option's file or text, else the tokenizer's own; None if there is none.

    Raises:
        UsageError: the option is neither a file nor a template.
    """
    if option is None:
        own = tokenizer.chat_template
        return own if own is None or isinstance(own, str) else own.get("default", next(iter(own.values()), None))
    if option.strip().lower() == NO_TEMPLATE:
        return None
    if "{%" in option or "{{" in option:
        return option
    path = Path(option)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{shorten(option)!r} is neither a readable file nor a Jinja template",
            where="chat_template",
            why=str(error),
            next_step=f"name a file, give the template itself, or {NO_TEMPLATE!r}",
        ) from None


class ChatRenderer:
    """The chat template of one model, with its arguments.

    Args:
        tokenizer: the model's transformers tokenizer.
        encoder: knows the tokenizer's control tokens.
        template: source of the template; the tokenizer's own if the option did not say otherwise.
        from_option: the template comes from `--chat-template`, so its errors are the user's.
        template_args: variables for the template.
        system: put before conversations without a system message.

    Attributes:
        leading_replies: replies that carry no loss because nothing stands before them, so far.
        split_conversations: conversations that became several documents, so far.
        unseen_tools: conversations whose tools the template does not write down, so far.
        unseen_thoughts: replies whose reasoning_content it does not write down, so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder: TextEncoder,
        template: str,
        *,
        from_option: bool = False,
        template_args: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._template = template
        self._from_option = from_option
        self.template_args = dict(template_args or {})
        self._system = system
        self.leading_replies = 0
        self.split_conversations = 0
        self.unseen_tools = 0
        self.unseen_thoughts = 0

    def documents(self, conversation: Conversation, *, train_on_all: bool = False) -> list[Document]:
        """The documents of a conversation: one, or one for each turn that the template rewrites later.

        Args:
            train_on_all: every token carries loss, not only those of the replies.

        Raises:
            DataError: the template refuses the conversation, or renders a reply otherwise than it asks for one.
        """
        conversation, mark = self._prepared(conversation)
        messages = conversation.messages
        if train_on_all:
            text = self._render(conversation, messages)
            _check_calls(messages, text, conversation.source)
            self._look_for_tools(conversation, text)
            ends = self._ends_turn(text)
            return [Document(text, ((0, len(text)),), mark, not ends, False, conversation.source)]
        turns = [
            turn for i in range(len(messages)) if conversation.supervised[i] and (turn := self._turn(conversation, i))
        ]
        documents: list[Document] = []
        spans: list[tuple[int, int]] = []
        whole: tuple[str, int, int] | None = None
        for turn in reversed(turns):
            text, start, end = turn
            if whole is None or not whole[0].startswith(text[:end]):
                if whole is not None:
                    documents.append(self._document(whole, spans, mark, conversation.source))
                whole, spans = turn, []
            spans.insert(0, (start, end))
        if whole is not None:
            documents.append(self._document(whole, spans, mark, conversation.source))
        if turns:
            self._look_for_tools(conversation, turns[-1][0])
        self.split_conversations += len(documents) > 1
        return documents[::-1]

    def prompt(self, conversation: Conversation) -> Document:
        """The conversation with the beginning of a reply, for generation; no span carries loss.

        Raises:
            DataError: the template refuses the conversation.
        """
        conversation, mark = self._prepared(conversation)
        text = self._render(conversation, conversation.messages, generation_prompt=True)
        self._look_for_tools(conversation, text)
        _check_calls(conversation.messages, text, conversation.source)
        return Document(text, (), mark, False, False, conversation.source)

    def reply(self, conversation: Conversation) -> Document:
        """The document of the last message, a reply that others precede; its span is what a model has to say there.

        Raises:
            DataError: as `documents`.
        """
        conversation, mark = self._prepared(conversation)
        turn = self._turn(conversation, len(conversation.messages) - 1)
        assert turn is not None
        return self._document(turn, [turn[1:]], mark, conversation.source)

    def _prepared(self, conversation: Conversation) -> tuple[Conversation, str | None]:
        """With the system message, and with the control tokens of its text broken apart."""
        if self._system is not None and conversation.messages[0]["role"] != "system":
            conversation = replace(
                conversation,
                messages=({"role": "system", "content": self._system}, *conversation.messages),
                supervised=(False, *conversation.supervised),
            )
        mark = self._encoder.mark_for(list(conversation.messages), conversation.tools, self.template_args)
        if mark is None:
            return conversation, None
        protect = self._encoder.protect
        messages = tuple(
            protect(message, mark, written=message["role"] != "assistant") for message in conversation.messages
        )
        tools = None if conversation.tools is None else tuple(protect(conversation.tools, mark, written=True))
        return replace(conversation, messages=messages, tools=tools), mark

    def _turn(self, conversation: Conversation, index: int) -> tuple[str, int, int] | None:
        """(text up to and with the reply, where the reply starts, where it ends); None if nothing stands before it."""
        messages = conversation.messages
        if index == 0:
            self.leading_replies += 1
            return None
        asked = self._render(conversation, messages[:index], generation_prompt=True)
        text = self._render(conversation, messages[: index + 1])
        if not text.startswith(asked):
            alike = next((i for i, (a, b) in enumerate(zip(asked, text, strict=False)) if a != b), len(text))
            raise DataError(
                "the chat template does not render this reply as it asks for one, so where it starts is not known",
                where=conversation.source,
                why=f"it asks with {_around(asked, alike)!r} and renders {_around(text, alike)!r} (reply {index})",
                next_step="use a template that renders them alike (--chat-template, --template-args)",
            )
        _check_calls(messages[: index + 1], text, conversation.source)
        thoughts = str(messages[index].get("reasoning_content", "")).strip()
        self.unseen_thoughts += bool(thoughts) and thoughts not in text[len(asked) :]
        return text, len(asked), self._end_of_turn(text, len(asked))

    def _look_for_tools(self, conversation: Conversation, text: str) -> None:
        functions = [tool.get("function", tool) for tool in conversation.tools or ()]
        names = [function["name"] for function in functions if isinstance(function, Mapping) and "name" in function]
        self.unseen_tools += bool(names) and not any(str(name) in text for name in names)

    def _end_of_turn(self, text: str, start: int) -> int:
        """Behind the last control token of the reply, if only white space follows that; else the end of the text."""
        end = max((match.end() for match in self._encoder.special.finditer(text, start)), default=start)
        return end if end > start and not text[end:].strip() else len(text)

    def _document(
        self, turn: tuple[str, int, int], spans: Sequence[tuple[int, int]], mark: str | None, source: str
    ) -> Document:
        text, _, end = turn
        text = text[:end]
        return Document(text, tuple(spans), mark, not self._ends_turn(text), False, source)

    def _ends_turn(self, text: str) -> bool:
        last = max((match.end() for match in self._encoder.special.finditer(text)), default=-1)
        return last >= 0 and not text[last:].strip()

    def _render(
        self, conversation: Conversation, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> str:
        tools = None if conversation.tools is None else list(conversation.tools)
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self._template_for(tools),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.template_args,
            )
        except Exception as error:  # noqa: BLE001 - a template raises whatever its expressions raise
            raise self._template_error(error, conversation.source) from None
        return str(rendered)

    def _template_for(self, tools: list[Any] | None) -> str:
        """A tokenizer may have a second template for conversations with tools."""
        own = self._tokenizer.chat_template
        if tools and not self._from_option and isinstance(own, dict) and "tool_use" in own:
            return str(own["tool_use"])
        return self._template

    def _template_error(self, error: Exception, source: str) -> BackhandError:
        jinja = sys.modules.get("jinja2")
        if jinja is not None and isinstance(error, jinja.TemplateSyntaxError):
            kind = UsageError if self._from_option else ArtifactError
            return kind(
                "the chat template is not valid Jinja",
                where="chat_template" if self._from_option else "tokenizer",
                why=f"{error.message}, in line {error.lineno}",
                next_step="give another template with --chat-template",
            )
        return DataError(
            "the chat template refuses this conversation",
            where=source,
            why=f"{type(error).__name__}: {error}",
            next_step="change the order or the roles of the messages, or use another template (--chat-template)",
        )


def _check_calls(messages: Sequence[Message], text: str, source: str) -> None:
    """Raise DataError where a template leaves tool calls out, as those do that know of no tools."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in text:
                raise DataError(
                    "the chat template does not write down the tool calls of this conversation",
                    where=source,
                    why=f"{name!r} is called, and stands nowhere in the text that it renders",
                    next_step="use a template that knows tool calls (--chat-template), or write the calls as content",
                )


def _around(text: str, place: int) -> str:
    return text[max(0, place - 20) : place + 20]
