"""Encode rows of rankings: two documents per text of a query, which end in `yes` and in `no`.

    query, document 1   →   prompt tokens yes,   prompt tokens no
    query, document 2   →   prompt tokens yes,   prompt tokens no

The prompt is that of Qwen3-Reranker [arXiv:2506.05176, §3; the model card]: a system message, and a user message with
instruction, query and document. The model's own chat template renders it; that of Qwen3 adds the empty thought before
the answer. If the template refuses a system message, the user message begins with its text. The score of a document is
log p(yes) - log p(no), so the last tokens are the only supervised ones.

Instruction and query come before the document. The documents of a query therefore begin with the same tokens, which are
computed once (`data.prefix_forest`), and the two documents of a text differ in the last token only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np

from backhand.data.chat import Document
from backhand.data.data_report import TruncationStats
from backhand.data.decision_examples import Replies, ending_in
from backhand.data.documents import RowRenderer
from backhand.data.embedding_examples import identity
from backhand.data.examples import Example, encode_document
from backhand.data.rows import INSTRUCTION, Completion, RankedTexts, RankingRow
from backhand.data.text_encoder import LONGEST_TEXT, EncodedText, TokenIds, too_long
from backhand.errors import DataError

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
YES, NO = "yes", "no"


def documents_of_texts(*, head: bool) -> str:
    """Return a sentence about the documents of the texts of a row, whose scores are those of a head or of answers."""
    of_text = "one document, with the query before it" if head else "two documents, which end in yes and in no"
    return f"each text of a row is {of_text}"


class Answers(NamedTuple):
    """The tokens of both answers."""

    lead: tuple[int, ...]  # before the answer, in the reply: the empty thought of some chat templates
    yes: int
    no: int


@dataclass(frozen=True)
class RankingFormat:
    """The prompt of a query with a document."""

    instruction: str = INSTRUCTION

    def encoder(self, renderer: RowRenderer, max_length: int, *, drop: bool) -> RankingEncoder:
        """Return the encoder of rows, see `row_encoder.TextFormat`."""
        return RankingEncoder(renderer, self, max_length, drop=drop)

    def text(self, query: str, document: str, source: str, *, system: bool = True) -> Completion:
        """Return the prompt with the answer `yes`.

        Args:
            system: False to put the text of the system message into the user message.
        """
        prompt = f"<Instruct>: {self.instruction}\n<Query>: {query}\n<Document>: {document}"
        return Completion(prompt if system else f"{SYSTEM}\n\n{prompt}", YES, "\n", SYSTEM if system else None, source)


class RankingEncoder:
    """Make the documents of rows of rankings.

    Args:
        renderer: renders prompts and answers.
        text_format: the prompt.
        max_length: largest number of tokens of a document with its prompt and answer.
        drop: leave out rows with a longer document, instead of cutting the document.

    Attributes:
        answers: the tokens of both answers.

    Raises:
        DataError: an answer is not one token.
    """

    def __init__(
        self, renderer: RowRenderer, text_format: RankingFormat, max_length: int, *, drop: bool = False
    ) -> None:
        self._renderer, self._format = renderer, text_format
        self._max_length, self._drop = max_length, drop
        self.answers = _answers_of(renderer)

    @cached_property
    def prompt_end(self) -> str:
        """The text between the prompt of generation and the answer."""
        return self._renderer.decode(self.answers.lead)

    def text(self, query: str, document: str, source: str) -> Completion:
        """Return the prompt with the answer `yes`, in the form that the chat template renders."""
        return self._format.text(query, document, source, system=self._takes_system)

    @cached_property
    def _takes_system(self) -> bool:
        try:
            self._renderer.documents(self._format.text("?", "?", "prompt"))
        except DataError:
            return False
        return True

    @cached_property
    def _tail(self) -> int:
        """Number of tokens between a document and the answer."""
        one, other = (self._prompt(one) for one in self._rendered(RankingRow("a", ("a", "b"), (), "prompt")))
        shorter = min(len(one), len(other))
        return int((one[-shorter:] == other[-shorter:])[::-1].argmin())

    def encode(self, rows: Sequence[RankingRow], stats: TruncationStats) -> list[Example | DataError | None]:
        """Encode rows: an example each, an error for a row that cannot be encoded, None if a row is too long."""
        rendered: list[list[Document] | DataError] = []
        for row in rows:
            try:
                rendered.append(self._rendered(row))
            except DataError as error:
                rendered.append(error)
        documents = [document for part in rendered if isinstance(part, list) for document in part]
        encodings = self._renderer.encoder.encode_in_groups(documents)
        examples: list[Example | DataError | None] = []
        for row, part in zip(rows, rendered, strict=True):
            if isinstance(part, DataError):
                examples.append(part)
                continue
            encoded = list(zip(part, islice(encodings, len(part)), strict=True))
            try:
                examples.append(self._example(row, [self._prompt(*one) for one in encoded], stats))
            except DataError as error:
                examples.append(error)
        return examples

    def _rendered(self, row: RankingRow) -> list[Document]:
        if long := next((text for text in (row.query, *row.documents) if len(text) > LONGEST_TEXT), None):
            raise too_long(len(long), row.source)
        texts = (self.text(row.query, document, row.source) for document in row.documents)
        return [document for text in texts for document in self._renderer.documents(text)]

    def _prompt(self, document: Document, encoded: EncodedText | None = None) -> TokenIds:
        """Return the tokens of a document before its answer."""
        example = encode_document(document, self._renderer.encoder, encoded)
        return example.input_ids[: example.last_answer[0] + len(self.answers.lead)]

    def _example(self, row: RankingRow, prompts: Sequence[TokenIds], stats: TruncationStats) -> Example | None:
        room = self._max_length - 1
        if any(len(prompt) > room for prompt in prompts):
            cut = [self._cut(prompt, text, room) for prompt, text in zip(prompts, row.documents, strict=True)]
            left = [prompt for prompt in cut if prompt is not None]
            if self._drop or len(left) < len(cut):
                stats.drop(row.source, 1 + max(map(len, prompts)))
                return None
            prompts = left
            stats.truncated.append(row.source)
        answers = self.answers.yes, self.answers.no
        first, *others = (ending_in(prompt, (token,), row.source) for prompt in prompts for token in answers)
        texts = RankedTexts(identity(row.query), tuple(map(identity, row.documents)), row.targets)
        return replace(first, others=tuple(others), facts=texts)

    def _cut(self, prompt: TokenIds, text: str, room: int) -> TokenIds | None:
        """Return the prompt with the end of its document left out, or None if nothing would be left of the document."""
        excess = len(prompt) - room
        if excess <= 0:
            return prompt
        if excess >= len(self._renderer.encoder.ids_of([text])[0]):
            return None
        begin = len(prompt) - self._tail
        return np.concatenate((prompt[: begin - excess], prompt[begin:]))


def _answers_of(renderer: RowRenderer) -> Answers:
    yes, no = map(Replies(renderer), (YES, NO))
    lead = next((place for place, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1]), 0)
    if yes[lead + 1 :] != no[lead + 1 :]:
        raise DataError(
            "yes and no are not one token each at the start of a reply",
            where="tokenizer",
            why="the score of a document is the difference of their log-probabilities",
            next_step="use another base model",
        )
    return Answers(yes[:lead], yes[lead], no[lead])
