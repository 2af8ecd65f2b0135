"""Examples in two arrays, from which each `Example` is created when it is indexed.

    tokens    per document its token ids, ~id for supervised tokens, and then the bytes of its source
    records   one `RECORD` per document: position, length, digests

Small arrays are in memory. Larger ones are memory-mapped temporary files, since a million short rows as Python objects
need a gigabyte. Code that reads every row, such as splitting or comparing, reads columns of `records` instead.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from backhand.data.data_report import DataReport
from backhand.data.decisions import Question
from backhand.data.examples import Example
from backhand.data.rows import RowFacts
from backhand.data.text_encoder import TokenIds
from backhand.errors import ResourceError
from backhand.files import reason

T = TypeVar("T")

_IN_MEMORY_BYTES = 2**23
_PIECE_TOKENS = 2**18
_BATCH_EXAMPLES = 64
"""Examples that are encoded at once, so that the arrays in between stay small."""
LABELS = (None, False, True)
ALONE, FIRST, NEXT = range(3)

RECORD = np.dtype(
    [
        ("begin", np.int64),  # index of its first id in `tokens`
        ("tokens", np.int32),
        ("source_bytes", np.int32),
        ("place", np.int8),  # alone, first of several documents of a row, or one of the documents after it
        ("label", np.int8),  # index in `LABELS`
        ("supervised", np.int32),  # tokens
        ("input_tokens", np.int32),  # tokens before the last supervised one: those that enter the model
        ("highest", np.int32),  # largest token id
        ("second_text", np.int32),  # `Example.second_text`
        ("source_digest", np.uint64),
        ("token_digest", np.uint64),  # of the token ids of all documents of the example
        ("key", np.void, 32),  # `Example.key`
    ]
)


class ExampleWriter:
    """Append examples to arrays, with bounded memory."""

    def __init__(self) -> None:
        self._tokens, self._records = (SpooledTemporaryFile(_IN_MEMORY_BYTES) for _ in range(2))  # noqa: SIM115
        for file in (self._tokens, self._records):
            weakref.finalize(self, file.close)
        self._places = 0  # number of elements of `tokens` written so far
        self._rows: dict[int, RowFacts] = {}

    def add_all(self, examples: Iterable[Example]) -> None:
        """Append examples; of `StoredExamples`, all in their arrays. Raises ResourceError: the disk is full."""
        if isinstance(examples, StoredExamples):
            self._append(examples.tokens.tobytes(), examples.records.copy(), examples.rows)
            return
        remaining = iter(examples)
        while batch := list(islice(remaining, _BATCH_EXAMPLES)):
            self._append(*_arrays_of(batch))

    def _append(self, tokens: bytes, records: npt.NDArray[Any], rows: Mapping[int, RowFacts]) -> None:
        before = self._records.tell() // RECORD.itemsize
        records["begin"] += self._places
        with _disk_space():
            self._tokens.write(tokens)
            self._records.write(records.tobytes())
        self._places += len(tokens) // 4
        self._rows |= {before + number: row for number, row in rows.items()}

    def stored(self) -> StoredExamples:
        """Return all added examples and close the writer. Raises ResourceError: the disk is full."""
        return StoredExamples.all_of(_array(self._tokens, np.int32), _array(self._records, RECORD), self._rows)


def _arrays_of(examples: Sequence[Example]) -> tuple[bytes, npt.NDArray[Any], dict[int, RowFacts]]:
    """Return tokens and sources as bytes, the records, and the facts by the number of their record."""
    documents = [document for example in examples for document in example.documents]
    counts = [len(example.documents) for example in examples]
    firsts = np.cumsum(counts) - counts
    sources = [document.source.encode(errors="surrogatepass") for document in documents]
    signed = (np.where(one.supervised, ~one.input_ids, one.input_ids).astype(np.int32) for one in documents)
    encoded = [ids.tobytes() + source + bytes(-len(source) % 4) for ids, source in zip(signed, sources, strict=True)]
    sizes, tokens = [len(part) // 4 for part in encoded], b"".join(encoded)
    token_digests = [_digest(b"|".join(one.input_ids.tobytes() for one in example.documents)) for example in examples]
    records = np.zeros(len(documents), dtype=RECORD)
    records["begin"] = np.cumsum(sizes) - sizes
    records["tokens"], records["source_bytes"] = list(map(len, documents)), list(map(len, sources))
    records["place"] = NEXT
    records["place"][firsts] = np.where(np.array(counts) > 1, FIRST, ALONE)
    records["label"] = [LABELS.index(document.desirable) for document in documents]
    records["second_text"] = [document.second_text for document in documents]
    records["source_digest"] = list(map(_digest, sources))
    records["token_digest"] = np.repeat(np.array(token_digests, dtype=np.uint64), counts)
    records["key"] = np.repeat(np.array([example.key for example in examples], dtype=RECORD["key"]), counts)
    for name, column in _token_columns(np.frombuffer(tokens, np.int32), records, 0).items():
        records[name] = column
    rows = {int(first): one.facts for first, one in zip(firsts, examples, strict=True) if one.facts is not None}
    return tokens, records, rows


def _token_columns(tokens: TokenIds, records: npt.NDArray[Any], begin: int) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of records that follow from their tokens, of which the first has index `begin`."""
    starts = records["begin"] - begin
    bounds = np.stack((starts, starts + records["tokens"]), axis=1).ravel()
    tokens = np.append(tokens, np.int32(0))  # reduceat needs an element at the last end
    targets = tokens < 0
    places = np.where(targets, np.arange(len(tokens), dtype=np.int32), np.int32(0))
    columns = {
        "supervised": np.add.reduceat(targets, bounds, dtype=np.int32)[::2],
        "input_tokens": np.maximum(np.maximum.reduceat(places, bounds)[::2] - starts, 0),
        "highest": np.maximum.reduceat(tokens ^ (tokens >> 31), bounds)[::2],
    }
    # reduceat returns the next element for a document without tokens
    return {name: np.where(records["tokens"] > 0, column, 0) for name, column in columns.items()}


def _array(file: SpooledTemporaryFile[bytes], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    if file.tell() > _IN_MEMORY_BYTES:
        with _disk_space():
            file.flush()
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
    file.seek(0)
    return np.frombuffer(file.read(), dtype=dtype)


def read_examples(
    file: io.BufferedReader, tokens: int, records: int, digest: Callable[[bytes | memoryview], object]
) -> StoredExamples:
    """Copy the arrays of a file, tokens followed by records, and check the records against the tokens.

    The copies are in memory or in temporary files, as with `ExampleWriter`.

    Args:
        tokens, records: numbers of elements of the two arrays.
        digest: called with the bytes of both arrays, in their order.

    Raises:
        ValueError: the records do not match the tokens. Digests and keys are not compared.
        ResourceError: the disk is full.
    """
    begin = file.tell()
    file.seek(begin + 4 * tokens)
    record_array = np.frombuffer(file.read(records * RECORD.itemsize), RECORD)
    ends = _document_ends(record_array, tokens)
    file.seek(begin)
    with SpooledTemporaryFile(_IN_MEMORY_BYTES) as copy, SpooledTemporaryFile(_IN_MEMORY_BYTES) as record_copy:
        first = done = 0
        while first < records:
            last = max(first + 1, int(np.searchsorted(ends, done + _PIECE_TOKENS, side="right")))
            piece = file.read(4 * int(ends[last - 1] - done))
            digest(piece)
            _check_documents(np.frombuffer(piece, np.int32), record_array[first:last], done)
            with _disk_space():
                copy.write(piece)
            first, done = last, int(ends[last - 1])
        digest(record_array.view(np.uint8).data)
        with _disk_space():
            record_copy.write(record_array.view(np.uint8).data)
        return StoredExamples.all_of(_array(copy, np.int32), _array(record_copy, RECORD), {})


def _document_ends(records: npt.NDArray[Any], tokens: int) -> npt.NDArray[np.int64]:
    """Return (documents,) the end of each document with its source. Raises ValueError: the records are inconsistent."""
    sizes = records["tokens"] + -(-records["source_bytes"].astype(np.int64) // 4)
    ends = np.cumsum(sizes)
    first, following = records["place"] == FIRST, records["place"] == NEXT
    if not (
        len(records)
        and records["tokens"].min() > 1
        and records["source_bytes"].min() >= 0
        and np.array_equal(records["begin"], ends - sizes)
        and ends[-1] == tokens
        and 0 <= records["place"].min() <= records["place"].max() <= NEXT
        and 0 <= records["label"].min() <= records["label"].max() < len(LABELS)
        and not (first[-1] or following[0])
        and np.array_equal(first[:-1], following[1:])  # only pairs of answers are stored in files
        and not records["second_text"].any()
    ):
        raise ValueError("its records are inconsistent")
    return ends


def _check_documents(tokens: TokenIds, records: npt.NDArray[Any], begin: int) -> None:
    """Compare records with their tokens, of which the first has index `begin`. Raises ValueError if they differ."""
    columns = _token_columns(tokens, records, begin)
    if (
        (tokens[records["begin"] - begin] < 0).any()
        or columns["supervised"].min() < 1
        or not all(np.array_equal(column, records[name]) for name, column in columns.items())
    ):
        raise ValueError("its records do not match its tokens")


@contextmanager
def _disk_space() -> Iterator[None]:
    """Raise ResourceError if a temporary file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            "no disk space for the encoded rows",
            where=tempfile.tempdir or "a temporary file",
            why=reason(error),
            next_step="set the environment variable TMPDIR to a directory with free space",
        ) from None


def _decoded(source: bytes) -> str:
    try:
        return source.decode(errors="surrogatepass")
    except UnicodeDecodeError:  # the file was not written by Backhand
        return source.decode(errors="replace")


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


@dataclass(frozen=True, eq=False)
class StoredExamples(Sequence[Example]):
    """A selection of examples that are stored in the same arrays, in any order. Pickling copies the whole arrays."""

    tokens: TokenIds  # see the module's docstring; read-only
    records: npt.NDArray[Any]
    rows: dict[int, RowFacts]  # by the number of their record
    chosen: npt.NDArray[np.int64]  # record numbers of the selection
    single: bool = False  # True if each document is an example, also both sides of a pair

    @classmethod
    def all_of(cls, tokens: TokenIds, records: npt.NDArray[Any], rows: dict[int, RowFacts]) -> StoredExamples:
        """Select all examples."""
        return cls(tokens, records, rows, np.flatnonzero(records["place"] != NEXT))

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> StoredExamples: ...
    def __getitem__(self, number: int | slice) -> Example | StoredExamples:
        if isinstance(number, slice):
            return self.take(number)
        place = int(self.chosen[number])
        example = self._document(place)
        count = 1 if self.single else int(self._counts[place])
        others = tuple(self._document(place + number) for number in range(1, count))
        if example.facts is not None:
            return replace(example, others=others)
        return replace(example, rejected=others[0]) if others else example

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        """(records,) number of documents from each record to the next row."""
        starts = np.append(np.flatnonzero(self.records["place"] != NEXT), len(self.records))
        counts = np.ones(len(self.records), dtype=np.int64)
        counts[starts[:-1]] = np.diff(starts)
        return counts

    def _document(self, place: int) -> Example:
        record = self.records[place]
        begin, tokens, source_bytes, _, label, *_ = record.item()
        signed, after = self.tokens[begin : begin + tokens], self.tokens[begin + tokens :]
        supervised = signed < 0
        source = _decoded(after[: -(-source_bytes // 4)].tobytes()[:source_bytes])
        ids = np.where(supervised, ~signed, signed)
        return Example(
            *(ids, supervised, source),
            desirable=LABELS[label],
            facts=self.rows.get(place),
            second_text=int(record["second_text"]),
        )

    def facts(self, kind: type[T], numbers: Iterable[int] | None = None) -> list[T]:
        """Return the facts of these examples, by default of all, without those of another kind."""
        chosen = self.chosen if numbers is None else self.chosen[list(numbers)]
        found = map(self.rows.get, chosen.tolist()) if self.rows else ()
        return [one for one in found if isinstance(one, kind)]

    def with_facts(self, facts: Iterable[RowFacts]) -> StoredExamples:
        """Return a copy with other facts of these examples, in their order."""
        return replace(self, rows={**self.rows, **dict(zip(self.chosen.tolist(), facts, strict=True))})

    def take(self, which: slice | npt.NDArray[Any]) -> StoredExamples:
        """Select examples by a slice, numbers or a boolean mask."""
        return replace(self, chosen=self.chosen[which])

    @property
    def document_counts(self) -> npt.NDArray[np.int64]:
        """(examples,) number of documents of each example."""
        return np.ones(len(self), dtype=np.int64) if self.single else self._counts[self.chosen]

    @property
    def documents(self) -> StoredExamples:
        """Each document as its own example, in order; the chosen side of a pair comes before the rejected one."""
        counts = self.document_counts
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        return replace(self, chosen=np.repeat(self.chosen, counts) + within, single=True)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return (examples,) a field of their `RECORD`s, for several documents that of the first one."""
        return np.array(self.records[name][self.chosen], copy=False)

    def beyond(self, vocab_size: int) -> Iterator[tuple[TokenIds, str]]:
        """Yield the ids and the source of documents with a token id of at least `vocab_size`."""
        documents = self.documents
        for number in np.flatnonzero(documents.column("highest") >= vocab_size).tolist():
            yield documents[number].input_ids, documents[number].source


def stored(examples: Iterable[Example]) -> StoredExamples:
    """Store examples in arrays. `StoredExamples` are returned unchanged."""
    if isinstance(examples, StoredExamples):
        return examples
    writer = ExampleWriter()
    writer.add_all(examples)
    return writer.stored()


@dataclass(frozen=True)
class PreparedData:
    """Examples and the report on the rows they were made from."""

    examples: StoredExamples
    report: DataReport
    held_out_share: float = 0.0  # share of the rows that a random split removed from these examples
    questions: Mapping[str, Question] = field(default_factory=dict)  # questions of rows of decisions by their name
    # all examples as the first epoch has them, then as the second one has them …; None if all epochs have `examples`
    by_epoch: StoredExamples | None = None

    @property
    def of_all_epochs(self) -> StoredExamples:
        """The examples in every form that an epoch has."""
        return self.examples if self.by_epoch is None else self.by_epoch

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens, supervision and labels in the order of the examples, in hexadecimal."""
        return hashlib.sha256(self.of_all_epochs.column("key").data).hexdigest()

    def up_to_epoch(self, last: int) -> PreparedData:
        """Return a copy without the forms of examples that only epochs after `last` have."""
        if self.by_epoch is None:
            return self
        return replace(self, by_epoch=self.by_epoch[: last * len(self.examples)])

    def with_note(self, note: str) -> PreparedData:
        """Return a copy with one more note in its report."""
        return replace(self, report=replace(self.report, notes=(*self.report.notes, note)))


def tokens_of_documents(examples: StoredExamples) -> npt.NDArray[np.int32]:
    """Return the number of tokens of each document, without the placeholder at the end of texts without targets."""
    tokens = examples.documents.column("tokens")
    first = examples[0] if len(examples) else None
    return tokens if first is None or first.facts is None else tokens - first.facts.placeholders(len(first.documents))


def count_sources(examples: StoredExamples) -> int:
    """Return the number of rows from which the examples were made."""
    return len(np.unique(examples.column("source_digest")))


def with_totals(examples: Iterable[Example], report: DataReport) -> PreparedData:
    """Combine examples with a report whose totals are recomputed from them; its other counts are unchanged."""
    examples = stored(examples)
    documents, tokens = examples.documents, tokens_of_documents(examples)
    facts = examples[0].facts if len(examples) else None
    has_targets = facts is None or facts.has_targets
    return PreparedData(
        examples,
        replace(
            report,
            documents=len(documents),
            tokens=int(tokens.sum(dtype=np.int64)),
            supervised_tokens=int(documents.column("supervised").sum(dtype=np.int64)) if has_targets else 0,
            longest=int(tokens.max(initial=0)),
        ),
    )
