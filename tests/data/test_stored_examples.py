"""Examples in arrays: what is asked for is what was added, wherever it lies, and columns say what examples say."""

from __future__ import annotations

import errno
import itertools
import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backhand.data import stored_examples
from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.held_out import _groups, overlap
from backhand.data.pack import trained_length
from backhand.data.packing import RowPacker
from backhand.data.rows import Completion, PromptRow
from backhand.data.stored_examples import stored, with_totals
from backhand.errors import ResourceError


def one(draw: random.Random, source: str) -> Example:
    length = draw.randint(1, 9)
    supervised = np.array([False, *(draw.random() < 0.6 for _ in range(length - 1))])
    return Example(np.array([draw.randint(0, 3) for _ in range(length)], dtype=np.int32), supervised, source)


def mixed(count: int) -> list[Example]:
    draw = random.Random(4)
    made = [one(draw, os.fsdecode(b"\xff:%d" % (i // 2))) for i in range(count)]
    prompt = PromptRow(Completion("?", None, "", None, "q"), "?", {"answer": 4}, "q")
    ways: list[Any] = [{}, {"rejected": one(draw, "the other")}, {"desirable": False}, {"desirable": True}]
    ways += [{"facts": prompt}]
    return [replace(example, **way) for example, way in zip(made, itertools.cycle(ways), strict=False)]


def facts(example: Example | None) -> tuple[Any, ...] | None:
    if example is None:
        return None
    own = example.input_ids.tolist(), example.supervised.tolist(), example.input_ids.dtype, example.supervised.dtype
    return (*own, example.source, example.desirable, example.facts, facts(example.rejected))


@pytest.mark.parametrize("in_memory_bytes", [2**23, 100])
def test_what_is_asked_for_is_what_was_added(in_memory_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_examples, "_IN_MEMORY_BYTES", in_memory_bytes)
    examples = mixed(40)
    found = stored(examples)
    assert list(map(facts, found)) == list(map(facts, examples)) and facts(found[-1]) == facts(examples[-1])
    assert list(map(facts, found[3:30:7])) == list(map(facts, examples[3:30:7]))
    single = [replace(part, rejected=None) for example in examples for part in example.documents]
    assert list(map(facts, found.documents)) == list(map(facts, single))
    backwards = [replace(part, rejected=None) for example in examples[::-1] for part in example.documents]
    assert list(map(facts, found[::-1].documents)) == list(map(facts, backwards))
    assert found.documents.column("tokens").tolist() == [len(part) for part in single]
    assert found.column("key").tolist() == [example.key for example in examples]
    lengths = [sum(map(trained_length, example.documents)) for example in examples]
    assert RowPacker(found, share_prefixes=False).lengths.tolist() == lengths


def test_documents_without_tokens_have_records_of_zeros() -> None:
    ids = [np.array(some, dtype=np.int32) for some in ([], [5, 7], [], [2, 9, 1], [])]
    found = stored(Example(some, np.arange(len(some)) == 1, "f:1") for some in ids)
    columns = {name: found.column(name).tolist() for name in ("tokens", "supervised", "input_tokens", "highest")}
    assert columns == {
        "tokens": [0, 2, 0, 3, 0],
        "supervised": [0, 1, 0, 1, 0],
        "input_tokens": [0, 1, 0, 1, 0],
        "highest": [0, 7, 0, 9, 0],
    }


def test_sums_digest_and_tokens_beyond_a_vocabulary() -> None:
    examples = mixed(20)
    whole = with_totals(examples, DataReport())
    assert whole.report.supervised_tokens == sum(example.supervised_tokens for example in examples)
    assert (
        whole.digest
        == with_totals(iter(examples), DataReport()).digest
        != with_totals(examples[::-1], DataReport()).digest
    )
    beyond = list(whole.examples.beyond(3))
    expected = [(part.input_ids.tolist(), part.source) for e in examples for part in e.documents if 3 in part.input_ids]
    assert [(ids.tolist(), source) for ids, source in beyond] == expected and expected


def test_groups_and_overlap_are_those_of_comparing_every_two() -> None:
    examples = mixed(60)
    tokens = [[part.input_ids.tolist() for part in example.documents] for example in examples]
    both = [(example.source, ids) for example, ids in zip(examples, tokens, strict=True)]
    same = [[a[0] == b[0] or a[1] == b[1] for b in both] for a in both]
    joined = np.array(same)
    for _ in examples:
        joined = joined @ joined
    assert _groups(stored(examples), 0.1).tolist() == joined.argmax(1).tolist()
    reference = [facts(example) for example, ids in zip(examples[30:], tokens[30:], strict=True) if ids in tokens[:30]]
    assert list(map(facts, overlap(examples[:30], examples[30:]))) == reference and reference


def test_what_all_rows_begin_with_is_what_every_two_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.data.packing._COMPARED_TOKENS", 100)
    draw = random.Random(1)
    for parting in (5, 20, 33):
        rows = []
        for number in range(10):
            ids = np.arange(40, dtype=np.int32)
            supervised = np.arange(40) % 3 == 2
            if number == 7:
                (ids if draw.random() < 0.5 else supervised)[parting] ^= 1
            rows.append(Example(ids[: 36 + number % 4], supervised[: 36 + number % 4], str(number)))
        shortest = min(trained_length(row) for row in rows)
        expected = min(_alike(rows[0], row, shortest) for row in rows)
        assert RowPacker(rows, share_prefixes=True).common_prefix == expected


def _alike(one: Example, other: Example, most: int) -> int:
    """How many positions, at most so many, have the same tokens and labels."""
    for place in range(most):
        seen = [
            (row.input_ids[place], row.input_ids[place + 1] if row.supervised[place + 1] else None)
            for row in (one, other)
        ]
        if seen[0] != seen[1]:
            return place
    return most


def test_a_source_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_examples, "_IN_MEMORY_BYTES", 100)
    names = ["a\0b", "\ud800 of Windows", os.fsdecode(b"\xc3\xff"), "\udcc3\udca9", "ä"]
    draw = random.Random(0)
    assert [example.source for example in stored(one(draw, name) for name in names)] == names


def test_an_example_without_tokens_shares_nothing() -> None:
    draw, nothing = random.Random(0), np.zeros(0, dtype=np.int32)
    rows = [*(one(draw, str(i)) for i in range(40)), Example(nothing, nothing.astype(bool), "none")]
    assert RowPacker(rows, share_prefixes=True).common_prefix == 0


def test_the_last_bytes_may_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stored_examples, "_IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(stored_examples.mmap, "mmap", full)
    with pytest.raises(ResourceError, match="no disk space") as raised:
        stored(mixed(20))
    assert "TMPDIR" in str(raised.value.next_step)


def test_no_room_for_rows_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stored_examples, "_IN_MEMORY_BYTES", 100)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ResourceError, match="no disk space"):
        stored(mixed(20))
