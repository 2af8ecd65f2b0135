"""Any row to the documents it becomes for one model: through its chat template, or joined as it stands."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from backhand.data.chat import NO_TEMPLATE, ChatRenderer, Document, read_template
from backhand.data.examples import encode_document
from backhand.data.options import TemplateOptions
from backhand.data.rows import Completion, Conversation, Message, OneText, PlainText
from backhand.data.text_encoder import TextEncoder
from backhand.errors import DataError, UsageError
from backhand.words import count_of

_STARTS = {
    "emptied": "without thoughts, where the generation prompt begins one: the empty thought {shown} is written before "
    "the reply, as the prompt or the chat template writes it",
    "switched": "that the chat template asks for with {detail} only: generate with --template-args {detail} (other "
    "programs call them chat_template_kwargs), or the prompt is another than the one trained on",
    "headed": "learnt right behind the role's header, because the generation prompt then writes {shown} and the chat "
    "template renders no such thing in a reply: a model that is asked with that template as it stands begins with what "
    "it was not trained on; take that piece out of its generation prompt and give the file to training and generation "
    "(--chat-template FILE)",
}
"""Of the ways in which a reply may begin, by `ReplyStart.how`, those of which the user should know, and why."""


_SEEN = {
    "joined": "joined as they stand, {why_joined}",
    "protected": "with control tokens of the model in their text, read as plain text",
    "control": "of plain text with control tokens of the model in it, which count as such",
    "eos": "whose last reply has no end-of-turn token: the end-of-sequence token is added",
    "system": "of plain text, which do not take the system message",
    "split": "made into several documents, because the chat template rewrites earlier turns",
    "leading": "beginning with a reply, which carries no loss",
    "tools": "with tools that the chat template does not write down for the model",
    "thoughts": "with thoughts in a reply that the chat template does not write down",
}
"""What is counted while rendering, and said of so many rows."""


class RowRenderer:
    """Makes documents of rows, as one model and one set of options want them.

    Conversations need a chat template. A prompt with its completion, or an instruction with its output, is rendered as
    a user turn and its reply where there is a template, and joined where there is none: prompt and completion as they
    stand, instruction, input and output with blank lines between them, then the end-of-sequence token. A text row is a
    document of its own: control tokens that are written in it count as such, since there is no other way to write them.

    Args:
        train_on_all: every token of a row carries loss, not only those of replies and completions.

    Attributes:
        encoder: turns the documents into token ids.
        has_template: whether conversations can be rendered.

    Raises:
        UsageError: the chat template cannot be read, or a system message is given where no template could take it.
    """

    def __init__(self, tokenizer: Any, options: TemplateOptions, *, train_on_all: bool = False) -> None:
        template = read_template(options.chat_template, tokenizer)
        self._tokenizer = tokenizer
        self._template = template
        self.has_template = template is not None
        self._rendered_already = (options.chat_template or "").strip().lower() == NO_TEMPLATE
        self._train_on_all = train_on_all
        self._system = options.system
        self.encoder = TextEncoder(tokenizer, template)
        self._chat: ChatRenderer | None = None
        self._seen: Counter[str] = Counter()
        if template is not None:
            self._chat = ChatRenderer(tokenizer, self.encoder, template, options)
            self._seen = self._chat.seen
        elif options.template_args or options.system is not None:
            field = "template_args" if options.template_args else "system"
            raise UsageError(
                f"{field} is given, but there is no chat template to use it",
                where=field,
                next_step="give --chat-template, or a model whose tokenizer has one",
            )

    def documents(self, row: OneText) -> list[Document]:
        """The documents that a row is trained on as; none if nothing in it could carry loss.

        Raises:
            DataError: the chat template is missing or refuses the row.
        """
        if isinstance(row, PlainText):
            return [self._plain(row)]
        if isinstance(row, Completion) and self._chat is None:
            return [self._joined(row)]
        documents = self._renderer(row).documents(_as_conversation(row), train_on_all=self._train_on_all)
        self._seen["protected"] += any(one.mark is not None and one.mark in one.text for one in documents)
        self._seen["eos"] += any(document.append_eos for document in documents)
        return documents

    def prompt(self, row: OneText) -> tuple[Document, str | None]:
        """What a model sees of the row before its last reply, and that reply; for a text row the text and None.

        The prompt ends where the reply begins in training. Of a chat template the reply is all that it writes from
        there (thoughts and tool calls with the content), without control tokens; the content as it stands where the
        template refuses it.

        Raises:
            DataError: the chat template is missing or refuses the row.
        """
        if isinstance(row, PlainText):
            document = self._plain(row)
            return Document(document.text, (), None, False, document.prefix, row.source), None
        if isinstance(row, Completion) and self._chat is None:
            prompt, _, mark = self._parts(row)
            return Document(prompt, (), mark, False, not self._begun(prompt), row.source), row.completion
        conversation = _as_conversation(row)
        last = max((i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"), default=0)
        if last == 0 or last < len(conversation.messages) - 1:
            return self._renderer(row).prompt(conversation), None
        try:
            asked, document = self._renderer(row).prompt_and_reply(conversation)
        except DataError:
            before = replace(
                conversation, messages=conversation.messages[:last], supervised=conversation.supervised[:last]
            )
            return self._renderer(row).prompt(before), str(conversation.messages[last]["content"])
        return asked, self._said(document)

    def _said(self, document: Document) -> str:
        """A reply, read from its tokens as completions are."""
        example = encode_document(document, self.encoder)
        said = example.input_ids[example.supervised].tolist()
        return str(self._tokenizer.decode(said, skip_special_tokens=True)).strip()

    def notes(self) -> tuple[str, ...]:
        """What the user should know of the rendering, a sentence each."""
        chat = self._chat
        why_joined = "control tokens included" if self._rendered_already else "for want of a chat template"
        notes = [
            f"{count_of(count, 'row')} {what.format(why_joined=why_joined)}"
            for kind, what in _SEEN.items()
            if (count := self._seen[kind])
        ]
        notes += _about_starts(chat.starts) if chat else []
        if chat and "strftime_now" in (self._template or "") and "date_string" not in chat.template_args:
            notes.append("the chat template writes today's date; fix it with --template-args 'date_string=…'")
        return tuple(notes)

    def _renderer(self, row: OneText) -> ChatRenderer:
        if self._chat is not None:
            return self._chat
        raise DataError(
            "this row is a conversation, but there is no chat template",
            where=row.source,
            why="--chat-template none" if self._rendered_already else "the model's tokenizer has none",
            next_step="take the Instruct variant of the model, give --chat-template FILE, or write the rows as "
            "prompt and completion",
        )

    def _plain(self, row: PlainText) -> Document:
        self._seen["control"] += self.encoder.special.search(row.text) is not None
        self._seen["system"] += self._system is not None
        return Document(
            row.text, ((0, len(row.text)),), None, not self._ended(row.text), not self._begun(row.text), row.source
        )

    def _joined(self, row: Completion) -> Document:
        self._seen["joined"] += 1
        prompt, completion, mark = self._parts(row)
        self._seen["protected"] += mark is not None
        text = prompt + completion
        span = (0 if self._train_on_all else len(prompt), len(text))
        return Document(text, (span,), mark, not self._ended(text), not self._begun(text), row.source)

    def _parts(self, row: Completion) -> tuple[str, str, str | None]:
        """Prompt and completion as they are joined, and the mark that breaks the control tokens in them, if any."""
        prompt = row.prompt + row.separator if not row.system else f"{row.system}\n\n{row.prompt}{row.separator}"
        completion = row.completion or ""
        mark = None if self._rendered_already else self.encoder.mark_for(prompt, completion)
        protect = self.encoder.protect
        return protect(prompt, mark, written=False), protect(completion, mark, written=False), mark

    def _ended(self, text: str) -> bool:
        eos = self.encoder.eos
        return eos is not None and text.rstrip().endswith(eos)

    def _begun(self, text: str) -> bool:
        bos = self.encoder.bos
        return bos is not None and text.startswith(bos)


def _about_starts(starts: Counter[tuple[str, str]]) -> list[str]:
    """What it means at generation that replies do not go on from the generation prompt, a sentence for each way."""
    notes = []
    for how, what in _STARTS.items():
        details = Counter({detail: count for (other, detail), count in starts.items() if other == how})
        if details:
            ((detail, _),) = details.most_common(1)
            count = count_of(details.total(), "reply").replace("replys", "replies")
            notes.append(f"{count} {what.format(shown=repr(detail), detail=detail)}")
    return notes


def _as_conversation(row: Conversation | Completion) -> Conversation:
    if isinstance(row, Conversation):
        return row
    messages: list[Message] = [{"role": "user", "content": row.prompt}]
    if row.system:
        messages.insert(0, {"role": "system", "content": row.system})
    if row.completion is not None:
        messages.append({"role": "assistant", "content": row.completion})
    return Conversation.of(messages, row.source)
