"""Conversations to text by the chat template, with the spans that carry loss, found by rendering alone.

The reply at message i begins where the rendering of the messages before it, with the generation prompt, ends, and ends
where the rendering up to and with it ends: that is what a model sees and what it then has to write. The reply's last
control token, its end of turn, belongs to it; white space that the template puts behind that does not, since generation
has stopped by then.

A template that ends no turn (GLM-4) leaves it to the next role's token to stop generation; then that token belongs to
the reply. What a template asks for and what it renders may differ where thoughts are concerned:
`backhand.data.template_habits`.

Where the template renders a turn differently once others follow (Qwen3 takes the thoughts out of earlier turns), what
is rendered up to that turn is no beginning of the whole, and the turn becomes a document of its own, with its own past.
White space and an end of text that are only written behind the last turn (Phi-3) make no such difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backhand.data.options import TemplateOptions
from backhand.data.rows import Conversation, Message
from backhand.data.template_habits import ReplyStart, TemplateHabits, find_start
from backhand.data.text_encoder import TextEncoder
from backhand.errors import ArtifactError, BackhandError, DataError, UsageError
from backhand.reading import MAX_SETTINGS_BYTES, read_plain
from backhand.words import begin_alike, shorten

if TYPE_CHECKING:
    from backhand.data.bounded_template import BoundedTemplate

NO_TEMPLATE = "none"


@dataclass(frozen=True)
class Document:
    """Text that becomes one sequence of tokens."""

    text: str  # rendered, with `mark` behind the first character of every control token that came from data
    spans: tuple[tuple[int, int], ...]  # (start, end) places in `text`, ascending, whose tokens carry loss
    mark: str | None  # see `backhand.data.text_encoder`
    # the text does not end as a turn or a document does, so the end-of-sequence token is added to it, with loss if a
    # span reaches the end
    append_eos: bool
    prefix: bool  # put the tokenizer's begin-of-sequence token first (a chat template writes its own)
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
        return read_plain(path, MAX_SETTINGS_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{shorten(option)!r} is neither a readable file nor a Jinja template",
            where="chat_template",
            why=str(error),
            next_step=f"name a file, give the template itself, or {NO_TEMPLATE!r}",
        ) from None


def stopping_role_ids(tokenizer: Any, options: TemplateOptions) -> tuple[int, ...]:
    """Ids of the tokens at which replies end because the next role begins with them; none where turns have an end.

    Raises:
        ArtifactError: the tokenizer does not stand on the `tokenizers` library.
        UsageError, ArtifactError: the template cannot be read, is not valid Jinja, or asks for more than it may have.
    """
    template = read_template(options.chat_template, tokenizer)
    if template is None:
        return ()
    chat = ChatRenderer(tokenizer, TextEncoder(tokenizer, template), template, options)
    return tuple(tokenizer.convert_tokens_to_ids(chat.stopping_role_tokens()))


class ChatRenderer:
    """The chat template of one model, with its arguments.

    Args:
        template: source of the template; the tokenizer's own if the options did not say otherwise. Where they did, its
            errors are the user's.

    Attributes:
        seen: how often something was found so far that the user should know: replies that carry no loss because nothing
            stands before them (`leading`), conversations that became several documents (`split`), whose tools the
            template does not write down (`tools`), replies whose thoughts it does not write down (`thoughts`).
        starts: how many replies begin in which way, by `ReplyStart.how` and `ReplyStart.detail`; only those where the
            template does not render what it asks for.
    """

    def __init__(self, tokenizer: Any, encoder: TextEncoder, template: str, options: TemplateOptions) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._template = template
        self._from_option = options.chat_template is not None
        self.template_args = dict(options.template_args)
        self._system = options.system
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._compiled_templates: dict[str, BoundedTemplate] = {}
        self.seen: Counter[str] = Counter()
        self.starts: Counter[tuple[str, str]] = Counter()
        self._habits = TemplateHabits(template, self._tried_as_they_stand, encoder.special, self.template_args)

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
            if messages[-1]["role"] == "assistant" and self._end_of_turn(text) is None:
                text += self._missing_end(conversation, len(messages) - 1)
            ended = self._end_of_turn(text) is not None
            return [Document(text, ((0, len(text)),), mark, not ended, False, conversation.source)]
        turns = [
            turn for i in range(len(messages)) if conversation.supervised[i] and (turn := self._turn(conversation, i))
        ]
        documents: list[Document] = []
        spans: list[tuple[int, int]] = []
        whole: tuple[str, int, int] | None = None
        for turn in reversed(turns):
            text, start, end = turn
            if whole is None or (end_in_whole := self._end_inside(whole[0], turn)) is None:
                if whole is not None:
                    documents.append(self._document(whole, spans, mark, conversation.source))
                whole, spans, end_in_whole = turn, [], end
            spans.insert(0, (start, end_in_whole))
        if whole is not None:
            documents.append(self._document(whole, spans, mark, conversation.source))
        if turns:
            self._look_for_tools(conversation, turns[-1][0])
        self.seen["split"] += len(documents) > 1
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

    def prompt_and_reply(self, conversation: Conversation) -> tuple[Document, Document]:
        """What stands before the last message, a reply that others precede, as it is trained on; and the whole.

        Returns:
            The prompt, no span of which carries loss, and the document whose span is what a model has to say there.

        Raises:
            DataError: as `documents`.
        """
        conversation, mark = self._prepared(conversation)
        turn = self._turn(conversation, len(conversation.messages) - 1)
        assert turn is not None
        self._look_for_tools(conversation, turn[0])
        asked = Document(turn[0][: turn[1]], (), mark, False, False, conversation.source)
        return asked, self._document(turn, [turn[1:]], mark, conversation.source)

    def stopping_role_tokens(self) -> list[str]:
        """The tokens that stop generation because the next role begins with them, where the template ends no turn."""
        if self._habits.ends_turns:
            return []
        return sorted({self._habits.next_token(role).strip() for role in ("user", "tool")} - {""})

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
            self.seen["leading"] += 1
            return None
        begun = self._start(conversation, index)
        text, start = begun.text, begun.start
        _check_calls(messages[: index + 1], text, conversation.source)
        if "tool_calls" in messages[index]:
            _check_calls(messages[index : index + 1], text[start:], conversation.source)
        self.seen["thoughts"] += _is_unseen(messages[index], text[start:])
        end = self._end_of_turn(text, start)
        if end is None:
            text += self._missing_end(conversation, index)
            end = self._end_of_turn(text, start)
        return text, start, len(text) if end is None else end

    def _start(self, conversation: Conversation, index: int) -> ReplyStart:
        """The rendering up to and with a reply, and where it begins."""
        messages = conversation.messages
        asked = self._render(conversation, messages[:index], generation_prompt=True)
        text = self._render(conversation, messages[: index + 1])
        if text.startswith(asked):
            return ReplyStart(text, len(asked))

        def can_have(empty: str, wanted: str) -> bool:
            content = messages[index]["content"]
            for shorter in dict.fromkeys((content, content.lstrip(), content.strip())):
                reply = {**messages[index], "content": empty + shorter}
                if self._tried(conversation, (*messages[:index], reply)) == wanted:
                    return True
            return False

        def ask(args: Mapping[str, Any]) -> str | None:
            return self._tried(conversation, messages[:index], generation_prompt=True, **args)

        begun = find_start(self._habits, asked, text, can_have=can_have, ask=ask)
        if begun is not None:
            self.starts[begun.how, begun.detail] += 1
            return begun
        alike = begin_alike(asked, text)
        raise DataError(
            "the chat template does not render this reply as it asks for one, so where it starts is not known",
            where=conversation.source,
            why=f"it asks with {_around(asked, alike)!r} and renders {_around(text, alike)!r} (reply {index})",
            next_step="use a template that renders them alike (--chat-template, --template-args)",
        )

    def _look_for_tools(self, conversation: Conversation, text: str) -> None:
        functions = [tool.get("function", tool) for tool in conversation.tools or ()]
        names = [function["name"] for function in functions if isinstance(function, Mapping) and "name" in function]
        self.seen["tools"] += bool(names) and not any(str(name) in text for name in names)

    def _end_of_turn(self, text: str, start: int = 0) -> int | None:
        """Behind the last control token from `start` on, if only white space follows that; else None."""
        end = max((match.end() for match in self._encoder.special.finditer(text, start)), default=0)
        return end if end and not text[end:].strip() else None

    def _end_inside(self, whole: str, turn: tuple[str, int, int]) -> int | None:
        """Where a turn ends in the rendering of more turns; None if that does not begin with it."""
        text, start, end = turn
        text = text[:end]
        if whole.startswith(text):
            return end
        body, eos = text.rstrip(), self._encoder.eos
        if eos and body.endswith(eos):
            body = body.removesuffix(eos).rstrip()
            return len(body) if whole.startswith(body) and self._end_of_turn(body, start) is not None else None
        return len(body) if len(body) > start and whole.startswith(body) else None

    def _missing_end(self, conversation: Conversation, index: int) -> str:
        """The next role's token, behind a reply whose turn nothing ends; empty if the template writes none."""
        after = conversation.messages[index + 1 : index + 2]
        calls = "tool_calls" in conversation.messages[index]
        return self._habits.next_token(after[0]["role"] if after else "tool" if calls else "user")

    def _document(
        self, turn: tuple[str, int, int], spans: Sequence[tuple[int, int]], mark: str | None, source: str
    ) -> Document:
        text, _, end = turn
        text = text[:end]
        return Document(text, tuple(spans), mark, self._end_of_turn(text) is None, False, source)

    def _render(self, conversation: Conversation, messages: Sequence[Message], **how: Any) -> str:
        return self._apply(conversation, self._habits.shaped(messages), **how)

    def _tried(self, conversation: Conversation, messages: Sequence[Message], **how: Any) -> str | None:
        """As `_render`; None where the template refuses."""
        try:
            return self._render(conversation, messages, **how)
        except DataError:
            return None

    def _tried_as_they_stand(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._apply(Conversation(tuple(messages), (), None, "chat template"), messages)
        except DataError:
            return None

    def _apply(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        **further_args: Any,
    ) -> str:
        tools = None if conversation.tools is None else list(conversation.tools)
        variables = {
            **self._special_tokens,
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **self.template_args,
            **further_args,
        }
        try:
            return self._compiled(self._template_for(tools)).render(variables)
        except Exception as error:  # noqa: BLE001 - a template raises whatever its expressions raise
            raise self._template_error(error, conversation.source) from None

    def _compiled(self, source: str) -> BoundedTemplate:
        if source not in self._compiled_templates:
            from backhand.data.bounded_template import BoundedTemplate

            self._compiled_templates[source] = BoundedTemplate(source)
        return self._compiled_templates[source]

    def _template_for(self, tools: list[Any] | None) -> str:
        """A tokenizer may have a second template for conversations with tools."""
        own = self._tokenizer.chat_template
        if tools and not self._from_option and isinstance(own, dict) and "tool_use" in own:
            return str(own["tool_use"])
        return self._template

    def _template_error(self, error: Exception, source: str) -> BackhandError:
        import jinja2

        from backhand.data.template_bounds import TemplateLimitError

        where = "chat_template" if self._from_option else "tokenizer"
        if isinstance(error, jinja2.TemplateSyntaxError):
            kind = UsageError if self._from_option else ArtifactError
            return kind(
                "the chat template is not valid Jinja",
                where=where,
                why=f"{shorten(str(error.message), 200)}, in line {error.lineno}",
                next_step="give another template with --chat-template",
            )
        if isinstance(error, TemplateLimitError | jinja2.exceptions.SecurityError):
            return ArtifactError(
                "the chat template asks for more than a template may have",
                where=where,
                why=shorten(str(error), 200),
                next_step="give another template with --chat-template",
            )
        return DataError(
            "the chat template refuses this conversation",
            where=source,
            why=shorten(f"{type(error).__name__}: {error}", 300),
            next_step="change the order or the roles of the messages, or use another template (--chat-template)",
        )


def _is_unseen(message: Message, text: str) -> bool:
    """Whether a reply has thoughts that are not in what was rendered of it."""
    thoughts: str = message.get("reasoning_content", "")
    if not thoughts and "</think>" in message["content"]:
        thoughts = message["content"].partition("</think>")[0].rpartition("<think>")[2]
    return bool(thoughts) and thoughts.strip() not in text


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
