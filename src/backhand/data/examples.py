"""Documents as token ids with a mask of supervised tokens: encoding, truncation and reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from backhand.data.chat import Document
from backhand.data.data_report import TruncationStats
from backhand.data.options import DataOptions
from backhand.data.rows import RowFacts
from backhand.data.text_encoder import EncodedText, TextEncoder, TokenIds
from backhand.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One document, or the documents of a pair or of a decision, as token ids.

    Attributes:
        input_ids: (tokens,) int32.
        supervised: (tokens,) bool; `supervised[i]` is True if token i is a target. The first token is never a target,
            because no token before it could predict it.
        source: location of its row.
        rejected: the document with the rejected answer of a pair, whose chosen answer is this document; else None.
        desirable: the label of an unpaired answer; None for other rows.
        facts: facts of the row in addition to the tokens, see `rows.RowFacts`; None for other rows.
        others: the documents of a row of decisions, embeddings or rankings after this one.
        second_text: index of the first token with token type 1, if the document is a pair of texts; else 0.
    """

    input_ids: TokenIds
    supervised: npt.NDArray[np.bool_]
    source: str
    rejected: Example | None = None
    desirable: bool | None = None
    facts: RowFacts | None = None
    others: tuple[Example, ...] = ()
    second_text: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def facts_as(self, kind: type[T]) -> T:
        """Return the facts, which must be of this kind."""
        assert isinstance(self.facts, kind)
        return self.facts

    @property
    def documents(self) -> tuple[Example, ...]:
        """The documents that enter the model: this one, then the rejected side of a pair or the other labels."""
        return (self, *self.others) if self.rejected is None else (self, self.rejected)

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens of all its documents."""
        return sum(int(document.supervised.sum()) for document in self.documents)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens before the first supervised token."""
        return int(self.supervised.argmax())

    @property
    def last_answer(self) -> tuple[int, int]:
        """(start, end) of the last span of supervised tokens; (0, 0) for plain text, which is one supervised span."""
        places = np.flatnonzero(self.supervised)
        gaps = np.flatnonzero(~self.supervised[: places[-1]]) if len(places) else places
        begin = int(gaps[-1]) + 1 if len(gaps) else 0
        return (begin, int(places[-1]) + 1) if begin > 1 else (0, 0)

    @property
    def key(self) -> bytes:
        """SHA-256 of tokens, supervision and label. Two examples have equal keys if all three are equal."""
        parts = [part for document in self.documents for part in (document.input_ids, document.supervised)]
        label = [] if self.desirable is None else [b"desirable" if self.desirable else b"undesirable"]
        if self.facts is not None:
            label.append(self.facts.key.encode())
        return hashlib.sha256(b"|".join([*(part.tobytes() for part in parts), *label])).digest()


def encode_document(document: Document, encoder: TextEncoder, encoded: EncodedText | None = None) -> Example:
    """Encode a document and mark the tokens that end inside a span as supervised.

    No token crosses the start or the end of a span: it is split there, as at generation.

    Args:
        encoded: the result of `TextEncoder.encode_plain` for this document, or None.

    Raises:
        DataError: the document needs an end-of-sequence token and the tokenizer has none.
    """
    places = sorted({place for span in document.spans for place in span if 0 < place < len(document.text)})
    if encoded is None:
        encoded = encoder.encode(document.text, source=document.source, mark=document.mark)
    if (breaks := _straddled(document.text, encoded.ends, places)) != []:
        encoded = encoder.encode(document.text, source=document.source, mark=document.mark, breaks=breaks)
    supervised = np.zeros(len(encoded.input_ids), dtype=np.bool_)
    for start, end in document.spans:
        supervised |= (encoded.ends > start) & (encoded.ends <= end)
    input_ids = encoded.input_ids
    if document.append_eos:
        if encoder.eos_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, which this row needs at its end",
                where=document.source,
                next_step="set eos_token in tokenizer_config.json, or use a chat template that ends each turn",
            )
        loss_at_end = any(end == len(document.text) for _, end in document.spans)
        input_ids = np.append(input_ids, np.int32(encoder.eos_id))
        supervised = np.append(supervised, loss_at_end)
    if document.prefix and encoder.prefix_ids:
        input_ids = np.concatenate((np.array(encoder.prefix_ids, dtype=np.int32), input_ids))
        supervised = np.concatenate((np.zeros(len(encoder.prefix_ids), dtype=np.bool_), supervised))
    if len(supervised):
        supervised[0] = False
    return Example(input_ids, supervised, document.source)


def truncate(example: Example, options: DataOptions, truncation: TruncationStats) -> Example | None:
    """Truncate an example to `max_length` tokens, or return None to leave it out. Record both in `truncation`."""
    if len(example) > options.max_length:
        length = options.max_length
        if options.long_rows == "drop":
            truncation.drop(example.source, len(example))
            return None
        needed = len(example)
        example = replace(
            example, input_ids=example.input_ids[:length].copy(), supervised=example.supervised[:length].copy()
        )
        if not example.supervised.any():  # its answer starts after the cut
            truncation.drop(example.source, needed)
            return None
        truncation.truncated.append(example.source)
    if not example.supervised.any():
        truncation.dropped_unsupervised.append(example.source)
        return None
    return example


def check_vocabulary(rows: Iterable[tuple[TokenIds, str]], vocab_size: int, tokenizer: Any) -> None:
    """Raise DataError at the first row with a token id that the model does not have.

    Args:
        rows: token ids and location of each row.
        vocab_size: number of token ids of the model.
    """
    for input_ids, source in rows:
        if input_ids.size and (token := int(input_ids.max())) >= vocab_size:
            raise DataError(
                f"token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, is outside the model's vocabulary of "
                f"{vocab_size:,} tokens",
                where=source,
                why="the tokenizer belongs to another model, or tokens were added without resizing the model",
                next_step="use the tokenizer of this model, or resize the model "
                "(transformers: model.resize_token_embeddings(len(tokenizer))) and save both",
            )


def _straddled(text: str, ends: npt.NDArray[np.int32], places: Iterable[int]) -> list[int]:
    """Return the places at which no token ends. Places inside white space count, since offsets may be trimmed."""
    token_ends = set(ends.tolist())
    return [
        place for place in places if place not in token_ends or (text[place - 1].isspace() and text[place].isspace())
    ]
