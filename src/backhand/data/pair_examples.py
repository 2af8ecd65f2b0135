"""Encode rows of rankings for a cross-encoder: one document per text of a query.

    query, document   →   [CLS] query [SEP] document [SEP], placeholder

The tokens and their types are those of `tokenizer(query, document)`: BERT's second text has the token type 1. As in
`embedding_examples`, the pooling determines the supervised tokens.

A pair that is too long is cut as transformers cuts it ("longest_first"), since sentence-transformers does the same: the
longer text loses its end, until both have the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from backhand.data.class_examples import ClassFormat
from backhand.data.data_report import TruncationStats
from backhand.data.documents import RowRenderer
from backhand.data.embedding_examples import identity, pooled_document
from backhand.data.examples import Example
from backhand.data.rows import RankedTexts, RankingRow
from backhand.data.text_encoder import LONGEST_TEXT, TextEncoder, TokenIds, too_long
from backhand.errors import DataError, UsageError


@dataclass(frozen=True)
class PairFormat(ClassFormat):
    """The way from a query and a document to the tokens whose states the score head reads."""

    token_types: bool = False  # the model tells the two texts apart by token types

    def encoder(self, renderer: RowRenderer, max_length: int, *, drop: bool) -> PairEncoder:  # type: ignore[override]
        """Return the encoder of rows, see `row_encoder.TextFormat`."""
        return PairEncoder(renderer.encoder, self, max_length, drop=drop)


class PairEncoder:
    """Make examples of rows of rankings for a score head.

    Args:
        encoder: of the model's tokenizer.
        text_format: pooling and token types.
        max_length: largest number of tokens of a pair.
        drop: leave out rows with a longer pair, instead of cutting it.

    Raises:
        UsageError: a pair has no room for two texts.
    """

    def __init__(self, encoder: TextEncoder, text_format: PairFormat, max_length: int, *, drop: bool = False) -> None:
        self._encoder, self._format, self._drop = encoder, text_format, drop
        self._around = around = encoder.pair_tokens
        self._max_length = max_length
        self._room = max_length - len(around.before) - len(around.between) - len(around.after)
        if self._room < 2:
            raise UsageError(
                f"max_length {max_length} has no room for two texts",
                where="max_length",
                why=f"the tokenizer puts {max_length - self._room} tokens around them",
                next_step="give a larger --max-length",
            )

    def encode(self, rows: Sequence[RankingRow], stats: TruncationStats) -> list[Example | DataError | None]:
        """Encode rows: an example each, an error for a row that cannot be encoded, None if a row is too long."""
        texts = [(row.query, *row.documents) for row in rows]
        long = [next((text for text in of_row if len(text) > LONGEST_TEXT), None) for of_row in texts]
        short = [text for of_row, one in zip(texts, long, strict=True) if one is None for text in of_row]
        encoded = iter(self._encoder.ids_of(short))
        return [
            self._example(row, [next(encoded) for _ in of_row], stats)
            if one is None
            else too_long(len(one), row.source)
            for row, of_row, one in zip(rows, texts, long, strict=True)
        ]

    def _example(
        self, row: RankingRow, texts: Sequence[TokenIds], stats: TruncationStats
    ) -> Example | DataError | None:
        if any(not len(ids) for ids in texts):
            return DataError("a text has no tokens", where=row.source, next_step="remove the row")
        query, *documents = texts
        if any(len(query) + len(ids) > self._room for ids in documents):
            if self._drop:
                stats.drop(row.source, self._max_length - self._room + len(query) + max(map(len, documents)))
                return None
            stats.truncated.append(row.source)
        first, *others = (self._document(query, ids, row.source) for ids in documents)
        ranking = RankedTexts(identity(row.query), tuple(map(identity, row.documents)), row.targets)
        return replace(first, others=tuple(others), facts=ranking)

    def _document(self, query: TokenIds, document: TokenIds, source: str) -> Example:
        before, between, after, of_first = self._around
        first, second = longest_first(len(query), len(document), self._room)
        tokens = [*before, *query[:first].tolist(), *between, *document[:second].tolist(), *after]
        example = pooled_document(self._format.read_tokens(tokens), self._format.pooling, source)
        if of_first is None or not self._format.token_types:
            return example
        return replace(example, second_text=len(before) + first + of_first)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the number of tokens of both texts of a pair that has room for `room`, as the tokenizers library cuts."""
    shorter, longer = sorted((first, second))
    longer = max(shorter, room - shorter) if shorter + longer > room else longer
    if shorter + longer > room:
        shorter = room // 2
        longer = room - shorter
    return (shorter, longer) if first <= second else (longer, shorter)
