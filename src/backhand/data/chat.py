"""Render conversations with the chat template, and find the spans that carry loss.

Spans are found by rendering alone. The reply at message i starts at the end of the rendering of the messages before it,
with the generation prompt. It ends at the end of the rendering of the messages up to it. So the model is trained on the
text that it has to generate. The reply includes its last control token, the end of turn. It includes no white space
after it, since generation stops at the end of turn.

Some templates, such as GLM-4's, end no turn. There the token of the next role stops generation, and that token belongs
to the reply. With thoughts, the generation prompt and the rendered reply may differ: see `data.reply_start`.

Some templates render a turn differently once other turns follow: Qwen3 removes the thoughts of earlier turns. Then the
rendering up to that turn is no prefix of the whole rendering, and the turn becomes a separate document. Differences in
white space, and an end of text that is written only after the last turn (Phi-3), do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from backhand.data.bounded_template import BoundedTemplate, TemplateLimitError, TemplateRefusal, TemplateSyntaxError
from backhand.data.options import TemplateOptions
from backhand.data.reply_start import ReplyStart, find_start
from backhand.data.rows import Conversation, Message
from backhand.data.template_probe import TemplateProbe, switches
from backhand.data.text_encoder import TextEncoder
from backhand.errors import ArtifactError, BackhandError, DataError, UsageError, short_reason
from backhand.reading import MAX_SETTINGS_BYTES, read_plain
from backhand.words import begin_alike, shorten

NO_TEMPLATE = "none"
OWN_TEMPLATE = "default"
"""Value of `chat_template` for the tokenizer's own, also where none would be used."""
OptionsT = TypeVar("OptionsT", bound=TemplateOptions)

RenderingCounts = Counter[str | tuple[str, str]]
"""Number of rows by event of rendering, and of replies by (`ReplyStart.how`, `ReplyStart.detail`)."""


@dataclass(frozen=True)
class Document:
    """Text that becomes one sequence of tokens."""

    text: str  # with `mark` after the first character of every control token that came from data
    spans: tuple[tuple[int, int], ...]  # (start, end) indices in `text`, ascending, of the tokens that carry loss
    mark: str | None  # see `backhand.data.text_encoder`
    # True if the text ends neither with an end of turn nor with an end of sequence. The end-of-sequence token is
    # appended, with loss if a span reaches the end of the text.
    append_eos: bool
    prefix: bool  # prepend the tokenizer's begin-of-sequence token; a chat template writes its own
    source: str


def read_template(option: str | None, tokenizer: Any) -> str | None:
    """Return the chat template: the option's file or text, else the tokenizer's own, or None if there is none.

    Raises:
        UsageError: the option is neither a file nor a template.
    """
    if option is None or option.strip().lower() == OWN_TEMPLATE:
        templates: Any = tokenizer.chat_template
        if templates is None or isinstance(templates, str):
            return templates
        template: str | None = templates.get("default", next(iter(templates.values()), None))
        return template
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
            why=short_reason(error),
            next_step=f"name a file, give the template itself, {NO_TEMPLATE!r} or {OWN_TEMPLATE!r}",
        ) from None


def thoughts_off(options: OptionsT, tokenizer: Any) -> OptionsT:
    """Return the options with the chat template's switches for thoughts off, unless `template_args` sets them."""
    template = read_template(options.chat_template, tokenizer)
    off = {name: value for setting in switches(template or "", {}) for name, value in setting.items() if not value}
    return replace(options, template_args={**off, **options.template_args})


def stopping_role_ids(tokenizer: Any, options: TemplateOptions) -> tuple[int, ...]:
    """Return the ids of role tokens that end replies; empty for templates that end each turn.

    Raises:
        ArtifactError: the tokenizer is not based on the `tokenizers` library.
        UsageError, ArtifactError: the template cannot be read, is not valid Jinja, or exceeds its limits.
    """
    template = read_template(options.chat_template, tokenizer)
    if template is None:
        return ()
    chat = ChatRenderer(tokenizer, TextEncoder(tokenizer, template), template, options)
    return tuple(tokenizer.convert_tokens_to_ids(chat.stopping_role_tokens()))


class ChatRenderer:
    """The chat template of one model, with its arguments.

    Args:
        template: source of the template: the option's, or the tokenizer's own. Errors of the option's template are
            usage errors.

    Attributes:
        seen: counts of events that the user should know. `leading`: replies without loss, because nothing precedes
            them. `split`: conversations that became several documents. `tools`: conversations whose tools the template
            does not render. `thoughts`: replies whose thoughts it does not render.
        starts: number of replies per `ReplyStart.how` and `ReplyStart.detail`. Only replies that do not continue the
            generation prompt are counted.
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
        self.seen: RenderingCounts = Counter()
        self._probe = TemplateProbe(template, self._render_unchanged, encoder.special, self.template_args)

    def documents(self, conversation: Conversation, *, train_on_all: bool = False) -> list[Document]:
        """Return the documents of a conversation: one, or one for each turn that the template rewrites later.

        Args:
            train_on_all: supervise every token, not only the replies.

        Raises:
            DataError: the template refuses the conversation, or a reply does not continue the generation prompt.
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
        """Return the conversation with the generation prompt. No span carries loss.

        Raises:
            DataError: the template refuses the conversation.
        """
        conversation, mark = self._prepared(conversation)
        text = self._render(conversation, conversation.messages, generation_prompt=True)
        self._look_for_tools(conversation, text)
        _check_calls(conversation.messages, text, conversation.source)
        return Document(text, (), mark, False, False, conversation.source)

    def prompt_and_reply(self, conversation: Conversation) -> tuple[Document, Document]:
        """Split a conversation before its last message, a reply, at the place where training starts it.

        Returns:
            The prompt, in which no span carries loss, and the whole document, whose span is the reply.

        Raises:
            DataError: as `documents`.
        """
        conversation, mark = self._prepared(conversation)
        turn = self._turn(conversation, len(conversation.messages) - 1)
        assert turn is not None
        self._look_for_tools(conversation, turn[0])
        prompt = Document(turn[0][: turn[1]], (), mark, False, False, conversation.source)
        return prompt, self._document(turn, [turn[1:]], mark, conversation.source)

    def stopping_role_tokens(self) -> list[str]:
        """Return the role tokens that stop generation, if the template ends no turn."""
        if self._probe.ends_turns:
            return []
        return sorted({self._probe.next_token(role).strip() for role in ("user", "tool")} - {""})

    def _prepared(self, conversation: Conversation) -> tuple[Conversation, str | None]:
        """Add the system message, and break the control tokens in the text of the conversation."""
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
            protect(message, mark, template_tokens=message["role"] != "assistant") for message in conversation.messages
        )
        tools = None if conversation.tools is None else tuple(protect(conversation.tools, mark, template_tokens=True))
        return replace(conversation, messages=messages, tools=tools), mark

    def _turn(self, conversation: Conversation, index: int) -> tuple[str, int, int] | None:
        """Return (text up to and with the reply, start of the reply, its end), or None if nothing precedes it."""
        messages = conversation.messages
        if index == 0:
            self.seen["leading"] += 1
            return None
        reply_start = self._start(conversation, index)
        text, start = reply_start.text, reply_start.start
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
        """Return the rendering up to and with a reply, and the start of the reply."""
        messages = conversation.messages
        prompt = self._render(conversation, messages[:index], generation_prompt=True)
        text = self._render(conversation, messages[: index + 1])
        if text.startswith(prompt):
            return ReplyStart(text, len(prompt))

        def can_have(empty: str, wanted: str) -> bool:
            content = messages[index]["content"]
            for shorter in dict.fromkeys((content, content.lstrip(), content.strip())):
                reply = {**messages[index], "content": empty + shorter}
                if self._try_render(conversation, (*messages[:index], reply)) == wanted:
                    return True
            return False

        def ask(args: Mapping[str, Any]) -> str | None:
            return self._try_render(conversation, messages[:index], generation_prompt=True, **args)

        reply_start = find_start(self._probe, prompt, text, can_have=can_have, ask=ask)
        if reply_start is not None:
            self.seen[reply_start.how, reply_start.detail] += 1
            return reply_start
        alike = begin_alike(prompt, text)
        raise DataError(
            "this reply does not continue the generation prompt of the chat template, so its start is unknown",
            where=conversation.source,
            why=f"the prompt has {_around(prompt, alike)!r} and the rendering {_around(text, alike)!r} (reply {index})",
            next_step="use a template that renders both alike (--chat-template, --template-args)",
        )

    def _look_for_tools(self, conversation: Conversation, text: str) -> None:
        functions = [tool.get("function", tool) for tool in conversation.tools or ()]
        names = [function["name"] for function in functions if isinstance(function, Mapping) and "name" in function]
        self.seen["tools"] += bool(names) and not any(str(name) in text for name in names)

    def _end_of_turn(self, text: str, start: int = 0) -> int | None:
        """Return the end of the last control token after `start` if only white space follows it, else None."""
        matches = list(self._encoder.special.finditer(text, start))
        end = matches[-1].end() if matches else None
        return None if end is None or text[end:].strip() else end

    def _end_inside(self, whole: str, turn: tuple[str, int, int]) -> int | None:
        """Return the end of a turn in a rendering of more turns, or None if the turn is no prefix of it."""
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
        """Return the next role's token, which ends a reply without an end of turn, or "" if the template has none."""
        after = conversation.messages[index + 1 : index + 2]
        calls = "tool_calls" in conversation.messages[index]
        return self._probe.next_token(after[0]["role"] if after else "tool" if calls else "user")

    def _document(
        self, turn: tuple[str, int, int], spans: Sequence[tuple[int, int]], mark: str | None, source: str
    ) -> Document:
        text, _, end = turn
        text = text[:end]
        return Document(text, tuple(spans), mark, self._end_of_turn(text) is None, False, source)

    def _render(self, conversation: Conversation, messages: Sequence[Message], **how: Any) -> str:
        return self._apply(conversation, self._probe.normalize_messages(messages), **how)

    def _try_render(self, conversation: Conversation, messages: Sequence[Message], **how: Any) -> str | None:
        """Render the messages, or return None if the template refuses them."""
        try:
            return self._render(conversation, messages, **how)
        except DataError:
            return None

    def _render_unchanged(self, messages: Sequence[Message]) -> str | None:
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
        except (TemplateLimitError, TemplateSyntaxError, TemplateRefusal, RecursionError) as error:
            raise self.template_error(error, conversation.source) from None

    def _compiled(self, source: str) -> BoundedTemplate:
        if source not in self._compiled_templates:
            self._compiled_templates[source] = BoundedTemplate(source)
        return self._compiled_templates[source]

    def _template_for(self, tools: list[Any] | None) -> str:
        """Return the template for these tools: a tokenizer may have a second one for conversations with tools."""
        templates = self._tokenizer.chat_template
        if tools and not self._from_option and isinstance(templates, dict) and "tool_use" in templates:
            return str(templates["tool_use"])
        return self._template

    def template_error(self, error: Exception, source: str) -> BackhandError:
        """Return the error for a template that raised `error` or ended its worker."""
        where = "chat_template" if self._from_option else "tokenizer"
        next_step = "give another template with --chat-template"
        if isinstance(error, TemplateSyntaxError):
            kind = UsageError if self._from_option else ArtifactError
            return kind("the chat template is not valid Jinja", where=where, why=str(error), next_step=next_step)
        if isinstance(error, TemplateLimitError):
            what = "the chat template exceeds the limits for templates"
            return ArtifactError(what, where=where, why=str(error), next_step=next_step)
        return DataError(
            "the chat template refuses this conversation",
            where=source,
            why=str(error),
            next_step="change the order or the roles of the messages, or use another template (--chat-template)",
        )


def _is_unseen(message: Message, text: str) -> bool:
    """Return True if a reply has thoughts that its rendering does not contain."""
    thoughts: str = message.get("reasoning_content", "")
    if not thoughts and "</think>" in message["content"]:
        thoughts = message["content"].partition("</think>")[0].rpartition("<think>")[2]
    return bool(thoughts) and thoughts.strip() not in text


def _check_calls(messages: Sequence[Message], text: str, source: str) -> None:
    """Raise DataError if a template omits tool calls, as templates without tool support do."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in text:
                raise DataError(
                    "the chat template does not render the tool calls of this conversation",
                    where=source,
                    why=f"the rendered text does not contain the called function {name!r}",
                    next_step="use a template that supports tool calls (--chat-template), or write calls as content",
                )


def _around(text: str, place: int) -> str:
    return text[max(0, place - 20) : place + 20]
