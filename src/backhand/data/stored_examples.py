"""Examples one behind another in two arrays, of which each is made when it is asked for.

    tokens    of each document its ids, those that are supervised as ~id, then the bytes of its source
    records   of each document a `RECORD`: where it begins, how long it is, digests

Short arrays lie in memory, others in a file, pages of which the system takes and lets go as it likes: as objects of
Python a million short rows take a gigabyte. What looks at all rows, to split or compare them, looks at columns.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from tempfile import SpooledTemporaryFile
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from backhand.data.examples import DataReport, Example
from backhand.data.rows import Asked
from backhand.data.text_encoder import TokenIds
from backhand.errors import DataError, ResourceError
from backhand.files import reason
from backhand.words import count_of

_IN_MEMORY_BYTES = 2**23
_PIECE_TOKENS = 2**18
LABELS = (None, False, True)
_ALONE, _CHOSEN, _REJECTED = range(3)

RECORD = np.dtype(
    [
        ("begin", np.int64),  # of its ids among the tokens
        ("tokens", np.int32),
        ("source_bytes", np.int32),
        ("side", np.int8),  # of a pair, whose rejected side is the record behind
        ("label", np.int8),  # place in `LABELS`
        ("supervised", np.int32),  # tokens
        ("trained", np.int32),  # tokens before the last supervised one
        ("highest", np.int32),  # of its ids
        ("source_digest", np.uint64),
        ("token_digest", np.uint64),  # of the whole example, a pair's of both its documents
        ("key", np.void, 32),  # the example's
    ]
)


class ExampleWriter:
    """Takes examples as they come; the memory that it holds does not grow with them."""

    def __init__(self) -> None:
        self._tokens, self._records = (SpooledTemporaryFile(_IN_MEMORY_BYTES) for _ in range(2))  # noqa: SIM115
        for file in (self._tokens, self._records):
            weakref.finalize(self, file.close)
        self._places = 0  # among the tokens that are taken
        self._asked: dict[int, Asked] = {}

    def add(self, example: Example) -> None:
        """Write it down. Raises ResourceError: there is no room for more."""
        if example.asked is not None:
            self._asked[self._records.tell() // RECORD.itemsize] = example.asked
        whole = _digest(b"|".join(document.input_ids.tobytes() for document in example.documents)), example.key
        for document in example.documents:
            ids, targets = document.input_ids, np.flatnonzero(document.supervised)
            source = document.source.encode(errors="surrogatepass")
            written = (
                np.where(document.supervised, ~ids, ids).astype(np.int32).tobytes() + source + bytes(-len(source) % 4)
            )
            side = _ALONE if example.rejected is None else _REJECTED if document is example.rejected else _CHOSEN
            record = (
                *(self._places, len(ids), len(source), side, LABELS.index(document.desirable)),
                *(len(targets), int(targets.max(initial=0)), int(ids.max(initial=0)), _digest(source), *whole),
            )
            with _room():
                self._tokens.write(written)
                self._records.write(np.array(record, dtype=RECORD).tobytes())
            self._places += len(written) // 4

    def stored(self) -> StoredExamples:
        """All that were added; no more can be. Raises ResourceError: there is no room for the last of them."""
        return StoredExamples.all_of(_array(self._tokens, np.int32), _array(self._records, RECORD), self._asked)


def _array(file: SpooledTemporaryFile[bytes], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    if file.tell() > _IN_MEMORY_BYTES:
        with _room():
            file.flush()
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
    file.seek(0)
    return np.frombuffer(file.read(), dtype=dtype)


def read_examples(
    file: io.BufferedReader, tokens: int, records: int, digest: Callable[[bytes | memoryview], object]
) -> StoredExamples:
    """Copy arrays of these lengths from a file, where they follow one another, and compare records with tokens.

    The copies are in memory, or in temporary files, as those of `ExampleWriter`.

    Args:
        digest: called with the bytes of both, in their order.

    Raises:
        ValueError: the records are not those of the tokens. Digests and keys are not compared.
        ResourceError: there is no room for the copies.
    """
    begin = file.tell()
    file.seek(begin + 4 * tokens)
    found = np.frombuffer(file.read(records * RECORD.itemsize), RECORD)
    ends = _document_ends(found, tokens)
    file.seek(begin)
    with SpooledTemporaryFile(_IN_MEMORY_BYTES) as copy, SpooledTemporaryFile(_IN_MEMORY_BYTES) as record_copy:
        first = done = 0
        while first < records:
            last = max(first + 1, int(np.searchsorted(ends, done + _PIECE_TOKENS, side="right")))
            piece = file.read(4 * int(ends[last - 1] - done))
            digest(piece)
            _check_documents(np.frombuffer(piece, np.int32), found[first:last], done)
            with _room():
                copy.write(piece)
            first, done = last, int(ends[last - 1])
        digest(found.view(np.uint8).data)
        with _room():
            record_copy.write(found.view(np.uint8).data)
        return StoredExamples.all_of(_array(copy, np.int32), _array(record_copy, RECORD), {})


def _document_ends(records: npt.NDArray[Any], tokens: int) -> npt.NDArray[np.int64]:
    """(documents,) where each document with its source ends. Raises ValueError: the records do not fit together."""
    sizes = records["tokens"] + -(-records["source_bytes"].astype(np.int64) // 4)
    ends = np.cumsum(sizes)
    chosen, rejected = records["side"] == _CHOSEN, records["side"] == _REJECTED
    if not (
        len(records)
        and records["tokens"].min() > 1
        and records["source_bytes"].min() >= 0
        and np.array_equal(records["begin"], ends - sizes)
        and ends[-1] == tokens
        and 0 <= records["side"].min() <= records["side"].max() <= _REJECTED
        and 0 <= records["label"].min() <= records["label"].max() < len(LABELS)
        and not (chosen[-1] or rejected[0])
        and np.array_equal(chosen[:-1], rejected[1:])
    ):
        raise ValueError("its records do not fit together")
    return ends


def _check_documents(tokens: TokenIds, records: npt.NDArray[Any], begin: int) -> None:
    """Compare records with their tokens, which begin at `begin` of all tokens. Raises ValueError."""
    starts = records["begin"] - begin
    bounds = np.stack((starts, starts + records["tokens"]), axis=1).ravel()
    tokens = np.append(tokens, np.int32(0))  # the last end may be that of the array
    targets = tokens < 0
    places = np.where(targets, np.arange(len(tokens), dtype=np.int32), np.int32(-1))
    supervised = np.add.reduceat(targets, bounds, dtype=np.int32)[::2]
    if (
        targets[starts].any()
        or supervised.min() < 1
        or not np.array_equal(supervised, records["supervised"])
        or not np.array_equal(np.maximum.reduceat(places, bounds)[::2] - starts, records["trained"])
        or not np.array_equal(np.maximum.reduceat(tokens ^ (tokens >> 31), bounds)[::2], records["highest"])
    ):
        raise ValueError("its records are not those of its tokens")


@contextmanager
def _room() -> Iterator[None]:
    """Raise ResourceError where the temporary files cannot be written."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            "no room for rows as tokens",
            where=tempfile.tempdir or "a temporary file",
            why=reason(error),
            next_step="name a folder with room in the environment variable TMPDIR",
        ) from None


def _decoded(source: bytes) -> str:
    try:
        return source.decode(errors="surrogatepass")
    except UnicodeDecodeError:  # from a file that somebody else wrote
        return source.decode(errors="replace")


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


@dataclass(frozen=True, eq=False)
class StoredExamples(Sequence[Example]):
    """Some of the examples that were stored together, in some order. Pickled, all of them go along."""

    tokens: TokenIds  # these and the records as the module says; neither is written to
    records: npt.NDArray[Any]
    asked: dict[int, Asked]  # of prompts, their rows by the number of the record
    chosen: npt.NDArray[np.int64]  # numbers of records
    single: bool = False  # whether each document stands by itself, the sides of a pair too

    @classmethod
    def all_of(cls, tokens: TokenIds, records: npt.NDArray[Any], asked: dict[int, Asked]) -> StoredExamples:
        """All examples."""
        return cls(tokens, records, asked, np.flatnonzero(records["side"] != _REJECTED))

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
        pair = not self.single and self.records["side"][place] == _CHOSEN
        return replace(example, rejected=self._document(place + 1)) if pair else example

    def _document(self, place: int) -> Example:
        begin, tokens, source_bytes, _, label, *_ = self.records[place].item()
        written, behind = self.tokens[begin : begin + tokens], self.tokens[begin + tokens :]
        supervised = written < 0
        source = _decoded(behind[: -(-source_bytes // 4)].tobytes()[:source_bytes])
        ids, asked = np.where(supervised, ~written, written), self.asked.get(place)
        return Example(ids, supervised, source, desirable=LABELS[label], asked=asked)

    def take(self, which: slice | npt.NDArray[Any]) -> StoredExamples:
        """Those of these numbers, or those that are marked."""
        return replace(self, chosen=self.chosen[which])

    @property
    def pairs(self) -> npt.NDArray[np.bool_]:
        """(examples,) which of them are two documents."""
        return np.array((self.column("side") == _CHOSEN) & (not self.single))

    @property
    def documents(self) -> StoredExamples:
        """What of them enters the model, each by itself, in order: of a pair the chosen and the rejected side."""
        pairs, chosen = self.pairs, self.chosen
        if pairs.any():
            chosen = np.repeat(chosen, 1 + pairs)
            chosen[np.cumsum(1 + pairs)[pairs] - 1] += 1
        return replace(self, chosen=chosen, single=True)

    def column(self, name: str) -> npt.NDArray[Any]:
        """(examples,) a field of their `RECORD`s; of a pair that of the chosen side."""
        return np.array(self.records[name][self.chosen], copy=False)

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
    def digest(self) -> str:
        """SHA-256 over every token, its supervision, labels and the order of the examples, in hexadecimal."""
        return hashlib.sha256(self.examples.column("key").data).hexdigest()

    def noted(self, note: str) -> PreparedData:
        """The same with a further note in its report."""
        return replace(self, report=replace(self.report, notes=(*self.report.notes, note)))


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


# What is measured and not trained on: rows held out, drawn from the seed; neutral texts; and rows in both.


_STREAM = "held-out split"


def split(data: PreparedData, fraction: float, seed: int) -> tuple[PreparedData, PreparedData]:
    """Training and held-out examples, each in the order of the file.

    All documents of a row, and all rows that share a document, go to the same side.

    Args:
        fraction: share of the distinct rows to hold out, in (0, 1); at least one row stays on either side.

    Raises:
        DataError: there are fewer than two distinct rows.
    """
    examples, groups = data.examples, _groups(data.examples)
    distinct = np.unique(groups)
    if len(distinct) < 2:
        raise DataError(
            f"{len(distinct)} distinct row is too few to hold some of them out",
            where="eval_fraction",
            next_step="give more rows, or --eval-data",
        )
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1)
    held = np.isin(groups, distinct[random_order(len(distinct), seed, _STREAM)[:count]])
    sides = [examples.take(side) for side in (~held, held)]
    trained_on, held_out = (len(np.unique(side.column("source_digest"))) for side in sides)
    # What was left out or cut is told once, of the file it stands in.
    drawn = DataReport(rows=held_out, notes=(f"{held_out:,} of these {count_of(trained_on + held_out, 'row')}",))
    train = replace(summed(sides[0], replace(data.report, rows=trained_on)), held_out_share=fraction)
    return train, summed(sides[1], drawn)


USUAL_SHARE = 0.1
FEWEST_ROWS = 50
MOST_HELD_OUT = 500


def usual_share(data: PreparedData) -> float:
    """The share to hold out where nobody says how much: a tenth, 500 rows at most, and none of fewer than 50 rows.

    Five rows tell which evaluation of one run is the best. They do not tell well how good it is: see docs/rates.md.
    """
    distinct = len(np.unique(_groups(data.examples)))
    return 0.0 if distinct < FEWEST_ROWS else min(USUAL_SHARE, MOST_HELD_OUT / distinct)


def overlap(train: Iterable[Example], held_out: Iterable[Example]) -> StoredExamples:
    """The held-out examples whose tokens also stand in the training data, whatever carries loss in them."""
    examples = stored(held_out)
    return examples.take(np.isin(examples.column("token_digest"), stored(train).column("token_digest")))


def neutral_texts() -> list[str]:
    """Short texts that come with the package and have nothing to do with any task, one a line of neutral_texts.txt."""
    text = resources.files("backhand.data").joinpath("neutral_texts.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _groups(examples: StoredExamples) -> npt.NDArray[np.int64]:
    """(examples,) the first example of each one's group; equal rows and equal tokens join groups (union-find)."""
    parents: dict[int, int] = {}  # of those that are not the first of their group

    def root(i: int) -> int:
        while (parent := parents.get(i, i)) != i:
            parents[i] = i = parents.get(parent, parent)
        return i

    for name in ("source_digest", "token_digest"):
        for one, other in zip(*equal_neighbours(examples.column(name)), strict=True):
            first, second = sorted((root(one), root(other)))
            if first != second:
                parents[second] = first
    groups = np.arange(len(examples))
    for i in parents:
        groups[i] = root(i)
    return groups


def equal_neighbours(values: npt.NDArray[Any]) -> tuple[list[int], list[int]]:
    """Places of equal values, ascending, each but the last of its kind with the next."""
    order = np.argsort(values, kind="stable")
    values = values[order]
    again = np.flatnonzero(values[1:] == values[:-1])
    return order[again].tolist(), order[again + 1].tolist()


def random_order(count: int, seed: int, *stream: object) -> npt.NDArray[np.int64]:
    """A permutation of `range(count)`, (count,) int64, drawn from the seed and the name of the stream.

    It sorts raw 64-bit draws of the Philox generator. NumPy promises to keep raw draws as they are, which it does not
    promise of `permutation`.
    """
    name = repr((seed, *stream)).encode()
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8").astype(np.uint64)
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)
