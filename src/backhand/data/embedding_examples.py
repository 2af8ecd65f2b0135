"""Encode rows of embeddings: one document per text.

    anchor, positive, negatives   →   [prompt +] text tokens, placeholder      one document each

The loss reads hidden states at the supervised positions, which are those before a supervised token. So every document
ends in a placeholder, which no state depends on, and the pooling determines the supervised tokens: the placeholder
alone for the last token, all for the mean. For the first token it is the second one, and the placeholder too, so that
the whole text enters the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backhand.data.data_report import TruncationStats
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example
from backhand.data.rows import ClassLabel, EmbeddingRow, PoolingName, TextIdentities
from backhand.data.text_encoder import LONGEST_TEXT, TextEncoder, TokenIds, too_long
from backhand.errors import DataError

_PLACEHOLDER = 0


@dataclass(frozen=True)
class EmbeddingFormat:
    """The way from a text to the tokens whose states become its vector."""

    pooling: PoolingName
    query_prompt: str = ""  # text before anchors
    document_prompt: str = ""  # text before all other texts

    def encoder(self, renderer: RowRenderer, max_length: int, *, drop: bool) -> EmbeddingEncoder:
        """Return the encoder of rows, see `row_encoder.TextFormat`."""
        return EmbeddingEncoder(renderer.encoder, self, max_length, drop=drop)

    def prompts(self, row: EmbeddingRow) -> list[str]:
        """Return the prompt of each text of a row. Both texts of a scored pair are documents."""
        first = self.document_prompt if row.score is not None or len(row.texts) == 1 else self.query_prompt
        return [first, *[self.document_prompt] * (len(row.texts) - 1)]


class EmbeddingEncoder:
    """Make examples of rows of embeddings.

    A text is encoded as sentence-transformers encodes it: with the special tokens that the tokenizer puts around every
    text. If the vector is the state of the last token, and the tokenizer puts none after the text, the end-of-sequence
    token follows.

    Args:
        encoder: of the model's tokenizer.
        text_format: pooling and prompts.
        max_length: largest number of tokens of a text.
        drop: leave out rows with a longer text, instead of cutting it.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, and the pooling needs one.
    """

    def __init__(
        self, encoder: TextEncoder, text_format: EmbeddingFormat, max_length: int, *, drop: bool = False
    ) -> None:
        self._encoder, self._format = encoder, text_format
        self._max_length, self._drop = max_length, drop
        self._suffix = suffix_of(encoder, text_format.pooling)

    def encode(self, rows: Sequence[EmbeddingRow], stats: TruncationStats) -> list[Example | DataError | None]:
        """Encode rows: an example each, an error for a text without tokens, None if a text is too long."""
        long = [next((text for text in row.texts if len(text) > LONGEST_TEXT), None) for row in rows]
        texts = [
            prompt + text
            for row, one in zip(rows, long, strict=True)
            if one is None
            for prompt, text in zip(self._format.prompts(row), row.texts, strict=True)
        ]
        encoded = iter(self._encoder.ids_of(texts))
        return [
            self._example(row, [next(encoded) for _ in row.texts], stats)
            if one is None
            else too_long(len(one), row.source)
            for row, one in zip(rows, long, strict=True)
        ]

    def _example(
        self, row: EmbeddingRow, texts: Sequence[TokenIds], stats: TruncationStats
    ) -> Example | DataError | None:
        before, after = self._encoder.prefix_ids, self._suffix
        if any(not len(ids) for ids in texts):
            return DataError("a text has no tokens", where=row.source, next_step="remove the row")
        room = self._max_length - len(before) - len(after)
        if any(len(ids) > room for ids in texts):
            if self._drop:
                stats.drop(row.source, len(before) + max(map(len, texts)) + len(after))
                return None
            stats.truncated.append(row.source)
        pooling = self._format.pooling
        first, *others = (pooled_document([*before, *ids[:room], *after], pooling, row.source) for ids in texts)
        identities = tuple(map(identity, row.texts))
        return Example(
            first.input_ids,
            first.supervised,
            row.source,
            others=tuple(others),
            facts=TextIdentities(identities, row.score, None if row.label is None else identity(row.label)),
        )


def pooled_document(
    ids: Sequence[int], pooling: PoolingName, source: str, class_label: ClassLabel | None = None
) -> Example:
    """Return a document with a placeholder at its end, whose supervised tokens select the states of the pooling."""
    supervised = np.full(len(ids) + 1, pooling == "mean")
    supervised[0], supervised[-1] = False, True
    if pooling == "cls":
        supervised[1] = True
    return Example(np.array([*ids, _PLACEHOLDER], dtype=np.int32), supervised, source, facts=class_label)


def suffix_of(encoder: TextEncoder, pooling: PoolingName) -> tuple[int, ...]:
    """Return the tokens after every text.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, and the pooling needs one.
    """
    if encoder.suffix_ids or pooling != "last":
        return encoder.suffix_ids
    if encoder.eos_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, whose hidden state becomes the vector of a text",
            where="pooling",
            next_step="give --pooling mean, or set eos_token in tokenizer_config.json",
        )
    return (encoder.eos_id,)


def identity(text: str) -> int:
    """Return a digest of a text, 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "little")
