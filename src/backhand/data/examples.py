"""Documents as token ids with the supervised ones marked, cut to length, counted; of a pair two documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from backhand.data.chat import Document
from backhand.data.options import DataOptions
from backhand.data.rows import Asked
from backhand.data.text_encoder import TextEncoder, TokenIds
from backhand.errors import DataError
from backhand.words import count_of


@dataclass(frozen=True, slots=True)
class Example:
    """One document, ready to be packed.

    Attributes:
        input_ids: (tokens,) int32.
        supervised: (tokens,) bool; `supervised[i]` means that token i is a target. The first token never is: nothing
            comes before it that could predict it.
        source: where its row stands.
        rejected: of a pair, whose chosen answer this is, the document with the other answer; None elsewhere.
        desirable: of an answer that is labelled, the label; None elsewhere.
        asked: of a prompt whose answers are rewarded, its row; the one supervised token behind it then stands for them.
    """

    input_ids: TokenIds
    supervised: npt.NDArray[np.bool_]
    source: str
    rejected: Example | None = None
    desirable: bool | None = None
    asked: Asked | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def documents(self) -> tuple[Example, ...]:
        """What of it enters the model, each by itself: of a pair the chosen and the rejected side."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def supervised_tokens(self) -> int:
        """Over all its documents."""
        return sum(int(document.supervised.sum()) for document in self.documents)

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first supervised one."""
        return int(self.supervised.argmax())

    @property
    def last_answer(self) -> tuple[int, int]:
        """Where its last supervised stretch begins and ends; (0, 0) of plain text, supervised from the start."""
        places = np.flatnonzero(self.supervised)
        gaps = np.flatnonzero(~self.supervised[: places[-1]]) if len(places) else places
        begin = int(gaps[-1]) + 1 if len(gaps) else 0
        return (begin, int(places[-1]) + 1) if begin > 1 else (0, 0)

    @property
    def key(self) -> bytes:
        """The same for two examples exactly if tokens, supervision and label are equal."""
        parts = [part for document in self.documents for part in (document.input_ids, document.supervised)]
        label = [] if self.desirable is None else [b"desirable" if self.desirable else b"undesirable"]
        if self.asked is not None:
            label.append(json.dumps([self.asked.prompt, self.asked.columns], sort_keys=True, default=str).encode())
        return hashlib.sha256(b"|".join([*(part.tobytes() for part in parts), *label])).digest()


@dataclass(frozen=True)
class SourceForm:
    """One file or hub data set, the form that its rows have, and how many of them were good."""

    source: str
    form: str
    rows: int


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. Each count is of rows unless its name says otherwise.

    Attributes:
        sources: the form found in each file.
        rows: good rows read.
        documents: sequences made from them that are in use; more than rows where a conversation became several.
        tokens, supervised_tokens: over all documents in use.
        longest: tokens of the longest document in use.
        truncated, dropped_long: documents cut to `max_length`, or left out because of it.
        dropped_unsupervised: documents left out because nothing in them carries loss.
        first_cut: where the first document of each of these three kinds stands.
        empty_answers: rows that teach an answer of nothing but white space.
        skipped_bad: malformed rows left out under `skip_bad`.
        system: the system message that all rows have; None where they have none, or not all the same.
        notes: whatever else the user should know, a sentence each.
    """

    sources: tuple[SourceForm, ...] = ()
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_unsupervised: int = 0
    first_cut: tuple[str, str, str] = ("", "", "")
    empty_answers: int = 0
    skipped_bad: int = 0
    bad_rows: tuple[DataError, ...] = ()
    system: str | None = None
    notes: tuple[str, ...] = ()

    def lines(self, *, prompts: bool = False) -> list[str]:
        """The report in words, a line a fact; of prompts, whose answers are sampled, nothing is supervised yet."""
        lines = [f"{form.source}: {form.form}, {count_of(form.rows, 'row')}" for form in self.sources]
        supervised = "" if prompts else f"{self.supervised_tokens:,} of them supervised, "
        lines.append(
            f"{count_of(self.documents, 'prompt' if prompts else 'document')} with {count_of(self.tokens, 'token')}, "
            f"{supervised}the longest {self.longest:,}"
        )
        return [*lines, *self.left_out(), *self.notes]

    def left_out(self) -> list[str]:
        """What was cut or is not in use, a line a reason."""
        counted = (
            (self.truncated, "truncated to max_length"),
            (self.dropped_long, "longer than max_length, left out"),
            (self.dropped_unsupervised, "without a supervised token, left out"),
        )
        lines = [
            f"{count_of(count, 'document')} {what}"
            + (f": {place}" if count == 1 else f", the first: {place}") * bool(place)
            for (count, what), place in zip(counted, self.first_cut, strict=True)
            if count
        ]
        if self.skipped_bad:
            lines.append(
                f"{count_of(self.skipped_bad, 'malformed row')} left out, the first: {self.bad_rows[0].one_line}"
            )
        return lines


@dataclass
class CutRows:
    """Where the rows stand whose documents `cut` truncated or left out, once for each document."""

    truncated: list[str] = field(default_factory=list)
    dropped_long: list[str] = field(default_factory=list)
    dropped_unsupervised: list[str] = field(default_factory=list)

    @property
    def firsts(self) -> tuple[str, str, str]:
        """The first place of each; nothing where there is none."""
        one, other, third = (next(iter(all_), "") for all_ in vars(self).values())
        return one, other, third

    def add(self, other: CutRows) -> None:
        """Take over what stands in `other`."""
        self.truncated += other.truncated
        self.dropped_long += other.dropped_long
        self.dropped_unsupervised += other.dropped_unsupervised


def encode_document(document: Document, encoder: TextEncoder, encoding: Any = None) -> Example:
    """Token ids of a document, with those supervised that end inside a span.

    A token that would straddle the beginning or the end of a span is made to end there, as it does at generation.

    Args:
        encoding: what `TextEncoder.encode_plain` gives for it.

    Raises:
        DataError: an end-of-sequence token is needed and the tokenizer has none.
    """
    places = sorted({place for span in document.spans for place in span if 0 < place < len(document.text)})
    encoded = encoder.encode(document.text, source=document.source, mark=document.mark, encoding=encoding)
    if (breaks := _straddled(document.text, encoded.ends, places)) != []:
        encoded = encoder.encode(document.text, source=document.source, mark=document.mark, breaks=breaks)
    supervised = np.zeros(len(encoded.input_ids), dtype=np.bool_)
    for start, end in document.spans:
        supervised |= (encoded.ends > start) & (encoded.ends <= end)
    input_ids = encoded.input_ids
    if document.append_eos:
        if encoder.eos_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token to end this row with",
                where=document.source,
                next_step="name one in the model's tokenizer_config.json, or use a chat template that ends each turn",
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


def cut(example: Example, options: DataOptions, cut_rows: CutRows) -> Example | None:
    """The example at no more than `max_length` tokens, or None if it is left out; either way noted."""
    if len(example) > options.max_length:
        if options.long_rows == "drop":
            cut_rows.dropped_long.append(example.source)
            return None
        length = options.max_length
        example = replace(
            example, input_ids=example.input_ids[:length].copy(), supervised=example.supervised[:length].copy()
        )
        if not example.supervised.any():  # its answer begins behind the cut
            cut_rows.dropped_long.append(example.source)
            return None
        cut_rows.truncated.append(example.source)
    if not example.supervised.any():
        cut_rows.dropped_unsupervised.append(example.source)
        return None
    return example


def check_vocabulary(rows: Iterable[tuple[TokenIds, str]], vocab_size: int, tokenizer: Any) -> None:
    """Whether the model has every token of some rows.

    Args:
        rows: token ids of each, and where it stands.
        vocab_size: of the model: its tokens' ids are below this.

    Raises:
        DataError: at the first row with a token that the model does not have.
    """
    for input_ids, source in rows:
        if input_ids.size and (token := int(input_ids.max())) >= vocab_size:
            raise DataError(
                f"token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, is not among the {vocab_size:,} "
                "that the model knows",
                where=source,
                why="the tokenizer is not the one of this model, or has tokens that were added without resizing it",
                next_step="take the tokenizer that belongs to the model, or resize the model to it "
                "(transformers: model.resize_token_embeddings(len(tokenizer))) and save both",
            )


def _straddled(text: str, ends: npt.NDArray[np.int32], places: Iterable[int]) -> list[int]:
    """Those of `places` where no token ends, or where a token of white space might straddle with its place trimmed."""
    found = set(ends.tolist())
    return [place for place in places if place not in found or (text[place - 1].isspace() and text[place].isspace())]


@dataclass(frozen=True)
class ViewedToken:
    """One token."""

    input_id: int  # its number
    text: str  # what it decodes to, or the tokenizer's own spelling where it is part of a character
    supervised: bool  # whether it is a target


def view_tokens(example: Example, tokenizer: Any) -> list[ViewedToken]:
    """The tokens of a document in order."""
    viewed = []
    for input_id, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        text = tokenizer.decode([input_id], skip_special_tokens=False)
        if "\ufffd" in text:
            text = tokenizer.convert_ids_to_tokens(input_id)
        viewed.append(ViewedToken(input_id, text, supervised))
    return viewed


def token_lines(example: Example, tokenizer: Any) -> list[str]:
    """A line a token: a `*` where it carries loss, its number, its text with control characters visible."""
    tokens = view_tokens(example, tokenizer)
    return [
        example.source,
        *(f"{'*' if token.supervised else ' '} {token.input_id:>7} {token.text!r}" for token in tokens),
    ]
