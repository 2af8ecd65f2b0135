"""Render rows into documents: through a chat template, or joined as plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from backhand.data.bounded_template import exceeded
from backhand.data.chat import NO_TEMPLATE, OWN_TEMPLATE, ChatRenderer, Document, RenderingCounts, read_template
from backhand.data.examples import encode_document
from backhand.data.options import TemplateOptions
from backhand.data.rows import Completion, Conversation, Message, OneText, PlainText, characters_of
from backhand.data.text_encoder import LONGEST_TEXT, TextEncoder, too_long
from backhand.data.workers import WorkerEndedError
from backhand.errors import BackhandError, DataError, ResourceError, UsageError
from backhand.system import lift_limits
from backhand.words import count_of

_REPLY_START_NOTES = {
    "emptied": "without thoughts, although the generation prompt opens one: the empty thought {shown} is inserted "
    "before the reply, as the prompt or the chat template writes it",
    "switched": "which the chat template renders only with {detail}: generate with --template-args {detail} (other "
    "programs call them chat_template_kwargs), so that the prompt is the one trained on",
    "headed": "trained on directly after the role's header, because the generation prompt then writes {shown} and the "
    "chat template renders no such text in a reply. With the unchanged template, generation starts from a prompt that "
    "was never trained on. Remove that text from the generation prompt and give the file to training and generation "
    "(--chat-template FILE)",
}
"""Notes on replies that do not continue the generation prompt, by `ReplyStart.how`."""


_RENDERING_NOTES = {
    "joined": "joined without rendering, {why_joined}",
    "protected": "with control tokens of the model in their text, which are read as plain text",
    "control": "of plain text containing control tokens of the model, which are encoded as control tokens",
    "eos": "whose last reply has no end-of-turn token: the end-of-sequence token is added",
    "system": "of plain text, to which the system message is not added",
    "split": "made into several documents, because the chat template rewrites earlier turns",
    "leading": "starting with a reply, which carries no loss",
    "tools": "with tools that the chat template does not render",
    "thoughts": "with thoughts in a reply that the chat template does not render",
}
"""Notes on events that are counted while rows are rendered; each follows the number of rows."""


class RowRenderer:
    """Render rows into documents for one tokenizer and one set of options.

    Conversations need a chat template. With a template, a prompt with its completion, or an instruction with its
    output, becomes a user turn and its reply. Without one they are joined: prompt and completion without a separator,
    instruction, input and output with blank lines between them. The end-of-sequence token follows. A text row is one
    document. Control tokens in it are encoded as control tokens, since text rows have no other way to contain them.

    Args:
        train_on_all: supervise every token of a row, not only replies and completions.

    Attributes:
        encoder: encodes the documents.
        has_template: True if conversations can be rendered.

    Raises:
        UsageError: the chat template cannot be read, or a system message is given without a template that could use it.
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
        self._seen: RenderingCounts = Counter()
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
        """Return the documents of a row to train on; none if nothing in it could carry loss.

        Raises:
            DataError: the chat template is missing or refuses the row.
        """
        self._seen["texts"] += 1
        if isinstance(row, PlainText) or (isinstance(row, Completion) and self._chat is None):
            document = self._plain(row) if isinstance(row, PlainText) else self._joined(row)
            self._count_bare(document)
            return [document]
        documents = self._renderer(row).documents(_as_conversation(row), train_on_all=self._train_on_all)
        self._seen["protected"] += any(one.mark is not None and one.mark in one.text for one in documents)
        self._seen["eos"] += any(document.append_eos for document in documents)
        return documents

    def prompt(self, row: OneText) -> tuple[Document, str | None]:
        """Return the part of the row before its last reply as a document, and the reply; (text, None) for a text row.

        The prompt ends where the reply starts in training. With a chat template, the reply is everything that the
        template renders after that place, including thoughts and tool calls, without control tokens. If the template
        refuses the reply, it is the unrendered content.

        Raises:
            DataError: the chat template is missing or refuses the row.
        """
        self._seen["texts"] += 1
        if isinstance(row, PlainText):
            document = self._plain(row)
            self._count_bare(document)
            return replace(document, spans=(), append_eos=False), None
        if isinstance(row, Completion) and self._chat is None:
            prompt, _, mark = self._parts(row)
            document = Document(prompt, (), mark, False, not self._starts_with_bos(prompt), row.source)
            self._count_bare(document)
            return document, row.completion
        conversation = _as_conversation(row)
        last = max((i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"), default=0)
        if last == 0 or last < len(conversation.messages) - 1:
            return self._renderer(row).prompt(conversation), None
        try:
            prompt_document, document = self._renderer(row).prompt_and_reply(conversation)
        except DataError:
            before = replace(
                conversation, messages=conversation.messages[:last], supervised=conversation.supervised[:last]
            )
            return self._renderer(row).prompt(before), str(conversation.messages[last]["content"])
        return prompt_document, self._decode_reply(document)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of these tokens, with control tokens."""
        return str(self._tokenizer.decode(list(token_ids)))

    def _decode_reply(self, document: Document) -> str:
        """Decode a reply from its tokens, as completions are decoded at generation."""
        lift_limits()
        example = encode_document(document, self.encoder)
        ids = example.input_ids[example.supervised].tolist()
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def take_counts(self) -> RenderingCounts:
        """Return the counts of events since the last call."""
        counts = self._seen.copy()
        self._seen.clear()
        return counts

    @property
    def all_bare(self) -> bool:
        """True if all texts became documents and prompts without a chat template and without control tokens."""
        return 0 < self._seen["texts"] == self._seen["bare"]

    def add_counts(self, counts: RenderingCounts) -> None:
        """Add the counts of a worker's renderer."""
        self._seen.update(counts)

    def worker_error(self, ended: WorkerEndedError) -> BackhandError:
        """Return the error for a worker that ended while it rendered and encoded rows."""
        if self._chat is not None:
            return self._chat.template_error(exceeded(ended), "")
        return ResourceError(f"a process that encodes rows {ended}", next_step="report this with a row that does it")

    def notes(self) -> tuple[str, ...]:
        """Return one sentence per event of rendering that the user should know."""
        chat = self._chat
        why_joined = "control tokens included" if self._rendered_already else "because there is no chat template"
        notes = [
            f"{count_of(count, 'row')} {what.format(why_joined=why_joined)}"
            for kind, what in _RENDERING_NOTES.items()
            if (count := self._seen[kind])
        ]
        notes += _about_starts(self._seen) if chat else []
        if chat and "strftime_now" in (self._template or "") and "date_string" not in chat.template_args:
            notes.append("the chat template writes today's date; fix it with --template-args 'date_string=…'")
        return tuple(notes)

    def _renderer(self, row: OneText) -> ChatRenderer:
        if (characters := characters_of(row)) > LONGEST_TEXT:  # its template would get the blame
            raise too_long(characters, row.source)
        if self._chat is not None:
            return self._chat
        default = f" or {OWN_TEMPLATE}" if self._rendered_already else ""
        raise DataError(
            "this row is a conversation, but there is no chat template",
            where=row.source,
            why="--chat-template none" if self._rendered_already else "the model's tokenizer has none",
            next_step=f"use the Instruct variant of the model, give --chat-template FILE{default}, or write the rows "
            "as prompt and completion",
        )

    def _plain(self, row: PlainText) -> Document:
        self._seen["control"] += self.encoder.special.search(row.text) is not None
        self._seen["system"] += self._system is not None
        return Document(
            row.text,
            ((0, len(row.text)),),
            None,
            not self._ends_with_eos(row.text),
            not self._starts_with_bos(row.text),
            row.source,
        )

    def _joined(self, row: Completion) -> Document:
        self._seen["joined"] += 1
        prompt, completion, mark = self._parts(row)
        self._seen["protected"] += mark is not None
        text = prompt + completion
        span = (0 if self._train_on_all else len(prompt), len(text))
        return Document(text, (span,), mark, not self._ends_with_eos(text), not self._starts_with_bos(text), row.source)

    def _parts(self, row: Completion) -> tuple[str, str, str | None]:
        """Return prompt and completion as they are joined, and the mark that breaks their control tokens, if any."""
        prompt = row.prompt + row.separator if not row.system else f"{row.system}\n\n{row.prompt}{row.separator}"
        completion = row.completion or ""
        mark = None if self._rendered_already else self.encoder.mark_for(prompt, completion)
        protect = self.encoder.protect
        return protect(prompt, mark, template_tokens=False), protect(completion, mark, template_tokens=False), mark

    def _count_bare(self, document: Document) -> None:
        """Count a document without control tokens that count, other than the end-of-sequence token at its end."""
        text = document.text.rstrip().removesuffix(self.encoder.eos or "")
        self._seen["bare"] += document.mark is not None or self.encoder.special.search(text) is None

    def _ends_with_eos(self, text: str) -> bool:
        eos = self.encoder.eos
        return eos is not None and text.rstrip().endswith(eos)

    def _starts_with_bos(self, text: str) -> bool:
        bos = self.encoder.bos
        return bos is not None and text.startswith(bos)


def _about_starts(seen: RenderingCounts) -> list[str]:
    """Return one note per way in which replies do not continue the generation prompt."""
    notes = []
    for how, what in _REPLY_START_NOTES.items():
        details = Counter({key[1]: count for key, count in seen.items() if isinstance(key, tuple) and key[0] == how})
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
