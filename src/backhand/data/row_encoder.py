"""Render and encode batches of rows, in worker processes on all cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from backhand.data.chat import Document, RenderingCounts
from backhand.data.context import TeacherPrompts
from backhand.data.data_report import TruncationStats
from backhand.data.document_encoder import DocumentEncoder
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, encode_document
from backhand.data.options import DataOptions
from backhand.data.row_kind import row_kind
from backhand.data.rows import OneText, Row
from backhand.data.stored_examples import StoredExamples, stored
from backhand.data.text_encoder import TokenIds
from backhand.errors import BackhandError, DataError
from backhand.system import lift_limits


class TextEncoderOfRows(Protocol):
    """Encodes batches of rows whose texts are compared."""

    def encode(self, rows: Sequence[Any], stats: TruncationStats) -> Sequence[Example | DataError | None]:
        """Encode rows: an example each, an error for an unusable row, None if a text is too long."""
        ...


class TextFormat(Protocol):
    """The way from the texts of a row to tokens, for rows whose texts are compared."""

    def encoder(self, renderer: RowRenderer, max_length: int, *, drop: bool) -> TextEncoderOfRows:
        """Return the encoder of these rows.

        Args:
            max_length: largest number of tokens of a text.
            drop: leave out rows with a longer text, instead of cutting it.
        """
        ...


@dataclass(frozen=True)
class Prompt:
    """A prompt for generation, with its reference reply.

    Attributes:
        input_ids: (tokens,) int32, up to the start of the reply.
        text: the same prompt as rendered, with control tokens.
        reply: the reference reply without control tokens: the last reply as the chat template renders it, or the
            completion unchanged. None if the row is plain text, has no answer or one that is labelled undesirable.
        source: location of the row.
        row: the row; None for a prompt that was cut out of an example.
    """

    input_ids: TokenIds
    text: str
    reply: str | None
    source: str
    row: OneText | None = None


@dataclass
class EncodedRows:
    """A batch of encoded rows.

    Attributes:
        errors: per row, its error or None. The list is shorter than the batch if an error stopped the work.
        stopped: the error that stopped the work, or None.
        examples: of the rows without an error, except those that were left out.
        truncation: locations of truncated and dropped documents.
        counts: events of rendering.
    """

    errors: list[DataError | None] = field(default_factory=list)
    stopped: BackhandError | None = None
    examples: StoredExamples = field(default_factory=lambda: stored(()))
    prompts: list[Prompt] = field(default_factory=list)
    truncation: TruncationStats = field(default_factory=TruncationStats)
    counts: RenderingCounts = field(default_factory=Counter)


@dataclass(frozen=True)
class _RenderedRow:
    row: Row
    parts: list[list[Document]]  # the documents of each text of the row
    prompt: list[Document]  # the prompt, if prompts are made
    reply: str | None


class RowEncoder:
    """Make examples, prompts or both of rows.

    Args:
        renderer: renders the rows.
        options: of the examples; None to make no examples.
        prompts: renders the prompts; None to make no prompts.
        teacher: the teacher's prompts. With `options`, each example has a second document, `rejected`, which is the
            teacher's; otherwise the prompts are the teacher's.
        text_format: of rows of embeddings, rankings or classes; None for other rows.
    """

    def __init__(
        self,
        renderer: RowRenderer,
        options: DataOptions | None,
        prompts: RowRenderer | None,
        teacher: TeacherPrompts | None = None,
        text_format: TextFormat | None = None,
    ) -> None:
        self.renderer = renderer
        self._options = options
        self._prompts = prompts
        self._teacher = teacher
        self._encoders: dict[str, DocumentEncoder] = {}
        self._texts: TextEncoderOfRows | None = None
        if options is not None and text_format is not None:
            drop = options.long_rows == "drop"
            self._texts = text_format.encoder(renderer, options.max_length, drop=drop)

    def _encoder(self, row: Row, options: DataOptions) -> DocumentEncoder:
        """Return the encoder of the documents of a row."""
        name = row.kind if self._teacher is None else "taught"
        if name not in self._encoders:
            if self._teacher is None:
                self._encoders[name] = row_kind(name).encoder(self.renderer, options)
            else:
                self._encoders[name] = self._teacher.encoder(self.renderer, options)
        return self._encoders[name]

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode a batch of rows."""
        if self._texts is not None:
            return self._encode_texts(self._texts, rows)
        result = EncodedRows()
        rendered: list[_RenderedRow] = []
        for row in rows:
            try:
                rendered.append(self._render(row))
            except DataError as error:
                result.errors.append(error)
            except BackhandError as error:
                result.stopped = error
                break
            else:
                result.errors.append(None)
        lift_limits()  # they are for templates, and encoding a long text needs more
        succeeded = iter([number for number, error in enumerate(result.errors) if error is None])
        encoder = self.renderer.encoder
        documents = [document for one in rendered for part in (*one.parts, one.prompt) for document in part]
        encodings = encoder.encode_in_groups(documents)
        encoded: list[Example] = []
        for one in rendered:
            number = next(succeeded)
            parts = [[(document, next(encodings)) for document in part] for part in (*one.parts, one.prompt)]
            try:
                *texts, prompt = [[encode_document(one, encoder, other) for one, other in part] for part in parts]
                examples = []
                if self._options is not None:
                    examples = self._encoder(one.row, self._options).examples(one.row, texts, result.truncation)
            except DataError as error:
                result.errors[number] = error
                continue
            encoded += examples
            if prompt and (examples or self._options is None):
                result.prompts.append(_as_prompt(one, prompt[0].input_ids))
        result.examples = stored(encoded)
        result.counts = self.renderer.take_counts()
        return result

    def _encode_texts(self, encoder: TextEncoderOfRows, rows: Sequence[Row]) -> EncodedRows:
        result = EncodedRows()
        examples = encoder.encode(rows, result.truncation)
        result.errors = [example if isinstance(example, DataError) else None for example in examples]
        result.examples = stored(example for example in examples if isinstance(example, Example))
        result.counts = self.renderer.take_counts()
        return result

    def _render(self, row: Row) -> _RenderedRow:
        parts = [] if self._options is None else self._encoder(row, self._options).documents(row)
        if self._prompts is None:
            return _RenderedRow(row, parts, [], None)
        text = row.parts[0]
        if self._options is None and self._teacher is not None:
            text = self._teacher.of(text)
        document, reply = self._prompts.prompt(text)
        return _RenderedRow(row, parts, [document], reply if row.has_reference_reply else None)


def _as_prompt(rendered: _RenderedRow, input_ids: TokenIds) -> Prompt:
    (document,) = rendered.prompt
    text = document.text if document.mark is None else document.text.replace(document.mark, "")
    return Prompt(input_ids, text, rendered.reply, document.source, rendered.row.parts[0])
