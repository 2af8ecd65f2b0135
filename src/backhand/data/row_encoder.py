"""Render and encode batches of rows, in worker processes on all cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from backhand.data.chat import Document, RenderingCounts
from backhand.data.class_examples import ClassEncoder, ClassFormat
from backhand.data.context import TeacherPrompts
from backhand.data.data_report import TruncationStats
from backhand.data.decision_examples import DecisionEncoder
from backhand.data.decisions import DecisionRow
from backhand.data.documents import RowRenderer
from backhand.data.embedding_examples import EmbeddingEncoder, EmbeddingFormat
from backhand.data.examples import Example, encode_document, truncate
from backhand.data.options import DataOptions
from backhand.data.pair_examples import PairEncoder, PairFormat
from backhand.data.ranking_examples import RankingEncoder, RankingFormat
from backhand.data.rows import (
    ClassRow,
    Conversation,
    EmbeddingRow,
    OneText,
    Pair,
    PlainText,
    PromptRow,
    RankingRow,
    Row,
    UnpairedRow,
    texts_of,
)
from backhand.data.stored_examples import StoredExamples, stored
from backhand.data.text_encoder import TokenIds
from backhand.errors import BackhandError, DataError
from backhand.system import lift_limits

TextFormat = EmbeddingFormat | RankingFormat | PairFormat | ClassFormat
"""The way from the texts of a row to tokens, for rows whose texts are compared."""


_TextEncoder = EmbeddingEncoder | RankingEncoder | PairEncoder | ClassEncoder


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
        self._decisions = None if options is None else DecisionEncoder(renderer, options.max_length)
        self._texts: _TextEncoder | None = None
        if options is not None and text_format is not None:
            drop, longest = options.long_rows == "drop", options.max_length
            if isinstance(text_format, RankingFormat):
                self._texts = RankingEncoder(renderer, text_format, longest, drop=drop)
            elif isinstance(text_format, PairFormat):
                self._texts = PairEncoder(renderer.encoder, text_format, longest, drop=drop)
            elif isinstance(text_format, ClassFormat):
                self._texts = ClassEncoder(renderer.encoder, text_format, longest, drop=drop)
            else:
                self._texts = EmbeddingEncoder(renderer.encoder, text_format, longest, drop=drop)

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
                examples = self._examples(one.row, texts, result.truncation)
            except DataError as error:
                result.errors[number] = error
                continue
            encoded += examples
            if prompt and (examples or self._options is None):
                result.prompts.append(_as_prompt(one, prompt[0].input_ids))
        result.examples = stored(encoded)
        result.counts = self.renderer.take_counts()
        return result

    def _encode_texts(self, encoder: _TextEncoder, rows: Sequence[Row]) -> EncodedRows:
        result = EncodedRows()
        if isinstance(encoder, RankingEncoder | PairEncoder):
            examples = encoder.encode([row for row in rows if isinstance(row, RankingRow)], result.truncation)
        elif isinstance(encoder, ClassEncoder):
            examples = encoder.encode([row for row in rows if isinstance(row, ClassRow)], result.truncation)
        else:
            examples = encoder.encode([row for row in rows if isinstance(row, EmbeddingRow)], result.truncation)
        result.errors = [example if isinstance(example, DataError) else None for example in examples]
        result.examples = stored(example for example in examples if isinstance(example, Example))
        result.counts = self.renderer.take_counts()
        return result

    def _render(self, row: Row) -> _RenderedRow:
        parts: list[list[Document]] = []
        if self._options is not None and isinstance(row, PromptRow):
            parts = [[self.renderer.prompt(row.question)[0]]]
        elif self._options is not None:
            texts, teacher = texts_of(row), self._teacher
            if teacher is not None:
                texts = texts[0], teacher.of(row)
            if teacher is not None and teacher.sampled:
                parts = [[self.renderer.prompt(text)[0]] for text in texts]
            else:
                parts = [self.renderer.documents(text) for text in texts]
        if self._prompts is None:
            return _RenderedRow(row, parts, [], None)
        text = texts_of(row)[0]
        if self._options is None and self._teacher is not None:
            text = self._teacher.of(text)
        document, reply = self._prompts.prompt(text)
        undesirable = isinstance(row, UnpairedRow) and not row.desirable
        return _RenderedRow(row, parts, [document], None if undesirable else reply)

    def _examples(self, row: Row, parts: list[list[Example]], stats: TruncationStats) -> list[Example]:
        options, decisions = self._options, self._decisions
        if options is None or decisions is None:
            return []
        if isinstance(row, PromptRow):
            prompts = _prompt_examples(row.source, parts[0], options, stats)
            return [replace(one, facts=row) for one in prompts]
        if self._teacher is not None and self._teacher.sampled:
            both = _prompt_examples(row.source, [part[0] for part in parts], options, stats)
            return [replace(student, rejected=teacher) for student, teacher in zip(both[::2], both[1::2], strict=True)]
        if isinstance(row, DecisionRow):
            encoded = [one for part in parts if (one := _only(part, row)) is not None]
            example = decisions.example(row, [one.question.canonical_order for one in row.asked], encoded)
            if example is None:
                stats.drop(row.source, max(map(len, encoded)))
            return [] if example is None else [example]
        if self._teacher is not None:
            return _taught_examples(parts[0], parts[1], row.source, options, stats)
        each = [_truncate_all(part, row.source, options, stats) for part in parts]
        if not isinstance(row, Pair | UnpairedRow):
            return each[0]
        first, *others = (_only(examples, row) for examples in each)
        if first is None or None in others:
            return []
        if isinstance(row, UnpairedRow):
            return [replace(first, desirable=row.desirable)]
        return [replace(first, rejected=others[0])]


def size_of(row: Row) -> int:
    """Return the number of characters of the texts of a row."""
    total = 0
    for text in texts_of(row):
        if isinstance(text, PlainText):
            total += len(text.text)
        elif isinstance(text, Conversation):
            total += sum(len(message["content"]) for message in text.messages)
        else:
            total += len(text.prompt) + len(text.completion or "")
    return total


def _truncate_all(examples: list[Example], source: str, options: DataOptions, stats: TruncationStats) -> list[Example]:
    if not examples:
        stats.dropped_unsupervised.append(source)
    return [example for example in (truncate(example, options, stats) for example in examples) if example is not None]


def _taught_examples(
    students: list[Example], teachers: list[Example], source: str, options: DataOptions, stats: TruncationStats
) -> list[Example]:
    """Return the student's examples, each with the teacher's, without those that are too long with the context."""
    examples = []
    for student, teacher in zip(students, teachers, strict=True):
        if len(teacher) > options.max_length:
            stats.drop(source, len(teacher))
            continue
        answer, expected = (example.input_ids[example.supervised] for example in (student, teacher))
        if not np.array_equal(answer, expected):
            raise DataError(
                "the answer is rendered differently with the context in front",
                where=source,
                why="the chat template writes other text into a reply if there is a system message",
                next_step="leave out the row, or give a chat template (--chat-template) that does not",
            )
        examples += [replace(one, rejected=teacher) for one in _truncate_all([student], source, options, stats)]
    return examples


def _prompt_examples(
    source: str, prompts: Sequence[Example], options: DataOptions, stats: TruncationStats
) -> list[Example]:
    """Return the prompts of a row with a placeholder for the answer; none if one of them is too long."""
    if not all(map(len, prompts)):
        raise DataError("the prompt is empty", where=source)
    if (longest := max(map(len, prompts))) >= options.max_length:
        stats.drop(source, longest + 1)
        return []
    examples = []
    for ids in (prompt.input_ids for prompt in prompts):
        with_placeholder = np.append(ids, ids[-1]), np.append(np.zeros(len(ids), dtype=np.bool_), True)
        examples.append(Example(*with_placeholder, source))
    return examples


def _only(examples: list[Example], row: Pair | UnpairedRow | DecisionRow) -> Example | None:
    """Return the only document of an answer, or None if it was left out."""
    if len(examples) > 1:
        raise DataError(
            "an answer of this row becomes several documents, but it is compared as a whole",
            where=row.source,
            why="the chat template rewrites earlier replies, and several of them carry loss",
            next_step="give the earlier turns as the prompt, and the last reply as the answer",
        )
    return examples[0] if examples else None


def _as_prompt(rendered: _RenderedRow, input_ids: TokenIds) -> Prompt:
    (document,) = rendered.prompt
    text = document.text if document.mark is None else document.text.replace(document.mark, "")
    return Prompt(input_ids, text, rendered.reply, document.source, texts_of(rendered.row)[0])
