"""Examples one behind another in two arrays, of which each is made when it is asked for.

A million short rows are 300 MB of token ids, and as objects of Python many times that. So an example is written as soon
as it is made, and what is known of it (how long it is, a digest of its tokens) beside it:

    tokens    of each document its ids, those that are supervised as ~id, then the bytes of its source
    records   of each document a `RECORD`

Both lie in memory where they are short, else in a file, the pages of which the system takes and lets go as it likes.
What has to look at all rows, to split or to compare them, looks at columns of the records.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from backhand.data.examples import DataReport, Example
from backhand.data.row_kinds import Asked
from backhand.data.text_encoder import TokenIds
from backhand.errors import ResourceError
from backhand.files import FileLayer, write_all

_IN_MEMORY_BYTES = 2**23
_LABELS = (None, False, True)
_ALONE, _CHOSEN, _REJECTED = range(3)

RECORD = np.dtype(
    [
        ("begin", np.int64),  # of its ids among the tokens
        ("tokens", np.int32),
        ("supervised", np.int32),  # how many of them
        ("trained", np.int32),  # those before the last supervised one
        ("highest", np.int32),  # of its ids
        ("source_bytes", np.int32),
        ("side", np.int8),  # of a pair, whose rejected side is the record behind
        ("label", np.int8),  # place in `_LABELS`
        ("source_digest", np.uint64),
        ("token_digest", np.uint64),  # of the whole example, a pair's of both its documents
        ("key", np.void, 32),  # the example's `key`
    ]
)


class ExampleWriter:
    """Takes examples as they come; the memory that it holds does not grow with them."""

    def __init__(self) -> None:
        self._tokens, self._records = _Spool(), _Spool()
        self._place = self._number = 0
        self._asked: dict[int, Asked] = {}

    def add(self, example: Example) -> None:
        """Write it down. Raises ResourceError: there is no room for more."""
        if example.asked is not None:
            self._asked[self._number] = example.asked
        token_digest, key = _digest(example.token_key), example.key
        sides = (_ALONE,) if example.rejected is None else (_CHOSEN, _REJECTED)
        for document, side in zip(example.documents, sides, strict=True):
            source = document.source.encode(errors="surrogateescape")
            ids, targets = document.input_ids, np.flatnonzero(document.supervised)
            record = (
                *(self._place, len(ids), len(targets), int(targets[-1]) if len(targets) else 0),
                *(int(ids.max(initial=0)), len(source), side, _LABELS.index(document.desirable)),
                *(_digest(hashlib.sha256(source).digest()), token_digest, key),
            )
            self._tokens.add(np.where(document.supervised, ~ids, ids).astype(np.int32).tobytes())
            self._tokens.add(source + bytes(-len(source) % 4))
            self._records.add(np.array(record, dtype=RECORD).tobytes())
            self._place += len(ids) + _source_places(len(source))
            self._number += 1

    def stored(self) -> StoredExamples:
        """All that were added; no more can be."""
        return StoredExamples(self._tokens.array(np.int32), self._records.array(RECORD), self._asked)


class _Spool:
    """Bytes behind one another, in memory while they are few, then in a file that is gone when nobody needs it."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._descriptor: int | None = None

    def add(self, data: bytes) -> None:
        """Raises ResourceError: there is no room for more."""
        self._held += data
        if len(self._held) > _IN_MEMORY_BYTES:
            self._write()

    def array(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """All of them; no more can be added."""
        if self._descriptor is None:
            return np.frombuffer(self._held, dtype=dtype)
        self._write()
        return np.frombuffer(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ), dtype=dtype)

    def _write(self) -> None:
        folder = Path(tempfile.gettempdir())
        try:
            if self._descriptor is None:
                self._descriptor = _FILES.open_unnamed(folder)
                weakref.finalize(self, _FILES.close, self._descriptor)
            write_all(_FILES, self._descriptor, memoryview(self._held))
        except OSError as error:
            raise ResourceError(
                "there is no room for the rows as tokens",
                where=str(folder),
                why=error.strerror or str(error),
                next_step="free space there, or name another folder: TMPDIR=FOLDER",
            ) from None
        self._held = bytearray()


_FILES = FileLayer()


def _digest(whole: bytes) -> int:
    return int.from_bytes(whole[:8], "little")


def _source_places(size: int) -> int:
    """So many tokens' room do the bytes of a source take."""
    return -(-size // 4)


class StoredExamples(Sequence[Example]):
    """Some of the examples that were stored together, in some order.

    Args:
        tokens, records: as the module says; neither is written to.
        asked: of prompts, their rows by the number of the record.
        chosen: numbers of records; all examples if not given.
        single: whether each document stands by itself, the sides of a pair too.
    """

    def __init__(
        self,
        tokens: TokenIds,
        records: npt.NDArray[Any],
        asked: dict[int, Asked] | None = None,
        chosen: npt.NDArray[np.int64] | None = None,
        *,
        single: bool = False,
    ) -> None:
        self.tokens, self.records, self.asked = tokens, records, asked or {}
        self._chosen = np.flatnonzero(records["side"] != _REJECTED) if chosen is None else chosen
        self._single = single

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> StoredExamples: ...
    def __getitem__(self, number: int | slice) -> Example | StoredExamples:
        if isinstance(number, slice):
            return self.take(number)
        place = int(self._chosen[number])
        example = self._document(place)
        pair = not self._single and self.records["side"][place] == _CHOSEN
        return replace(example, rejected=self._document(place + 1)) if pair else example

    def _document(self, place: int) -> Example:
        begin, tokens, _, _, _, source_bytes, _, label, *_ = self.records[place].item()
        end = begin + tokens
        written = self.tokens[begin:end]
        supervised = written < 0
        source = self.tokens[end : end + _source_places(source_bytes)].tobytes()[:source_bytes]
        return Example(
            np.where(supervised, ~written, written),
            supervised,
            source.decode(errors="surrogateescape"),
            desirable=_LABELS[label],
            asked=self.asked.get(place),
        )

    def take(self, which: slice | npt.NDArray[Any]) -> StoredExamples:
        """Those of these numbers, or those that are marked."""
        return StoredExamples(self.tokens, self.records, self.asked, self._chosen[which], single=self._single)

    @property
    def pairs(self) -> npt.NDArray[np.bool_]:
        """(examples,) which of them are two documents."""
        pairs: npt.NDArray[np.bool_] = (self.column("side") == _CHOSEN) & (not self._single)
        return pairs

    @property
    def documents(self) -> StoredExamples:
        """What of them enters the model, each by itself, in order: of a pair the chosen and the rejected side."""
        sides = 1 + self.pairs
        chosen = np.repeat(self._chosen, sides)
        chosen[np.cumsum(sides)[self.pairs] - 1] += 1
        return StoredExamples(self.tokens, self.records, self.asked, chosen, single=True)

    def column(self, name: str) -> npt.NDArray[Any]:
        """(examples,) a field of their `RECORD`s; of a pair that of the chosen side."""
        column: npt.NDArray[Any] = self.records[name][self._chosen]
        return column

    def beyond(self, vocab_size: int) -> Iterator[tuple[TokenIds, str]]:
        """Ids and source of the documents with a token that is not below `vocab_size`."""
        documents = self.documents
        for number in np.flatnonzero(documents.column("highest") >= vocab_size).tolist():
            yield documents[number].input_ids, documents[number].source


def stored(examples: Iterable[Example]) -> StoredExamples:
    """Examples in arrays, as they are if they are in such."""
    if isinstance(examples, StoredExamples):
        return examples
    writer = ExampleWriter()
    for example in examples:
        writer.add(example)
    return writer.stored()


@dataclass(frozen=True)
class PreparedData:
    """Examples and what became of the rows they were made from."""

    examples: StoredExamples
    report: DataReport
    held_out_share: float = 0.0  # of the rows that were there, drawn from the seed and no longer among these

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(documents,) tokens of each."""
        return self.examples.documents.column("tokens").astype(np.int64)

    @property
    def digest(self) -> str:
        """SHA-256 over every token, its supervision, labels and the order of the examples, in hexadecimal."""
        whole, examples = hashlib.sha256(), self.examples
        for begin in range(0, len(examples), _AT_ONCE):
            whole.update(examples[begin : begin + _AT_ONCE].column("key").tobytes())
        return whole.hexdigest()


_AT_ONCE = 2**15


def summed(examples: Iterable[Example], report: DataReport) -> PreparedData:
    """Examples with a report whose sums are theirs; its other counts stay."""
    examples = stored(examples)
    documents = examples.documents
    tokens = documents.column("tokens")
    return PreparedData(
        examples,
        replace(
            report,
            documents=len(documents),
            tokens=int(tokens.sum(dtype=np.int64)),
            supervised_tokens=int(documents.column("supervised").sum(dtype=np.int64)),
            longest=int(tokens.max(initial=0)),
        ),
    )
