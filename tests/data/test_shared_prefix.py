from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhand.data.examples import Example
from backhand.data.packing import pack
from backhand.data.shared_prefix import MIN_SAVED_TOKENS, opening_lengths, shared_tokens
from backhand.nn.batch import IGNORE_INDEX, PackedBatch


def example(ids: list[int], supervised: list[int]) -> Example:
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[supervised] = True
    return Example(np.array(ids, dtype=np.int32), mask, "f:1")


SYSTEM = [7, 7, 8, 9, 5, 5, 4, 3, 2]


def test_rows_begin_alike_up_to_where_they_differ() -> None:
    rows = [
        example([*SYSTEM, 20, 21, 22], [11]),
        example([*SYSTEM, 20, 30, 31], [11]),
        example([*SYSTEM, 40, 41], [10]),
    ]
    assert opening_lengths(rows) == [10, 10, 9]  # a typical row's own: what comes before the token that predicts


def test_no_token_that_predicts_a_supervised_one_is_shared() -> None:
    rows = [example([*SYSTEM, 20], [9]), example([*SYSTEM, 20], [5]), example([*SYSTEM, 20], [])]
    assert opening_lengths(rows) == [8, 4, 0]


def test_a_rare_beginning_is_not_the_measure() -> None:
    odd = example([99, *SYSTEM, 20, 21], [11])
    usual = [example([*SYSTEM, 20 + i, 21], [10]) for i in range(3)]
    assert opening_lengths([odd, *usual]) == [0, 9, 9, 9]
    assert opening_lengths([]) == []


@pytest.mark.parametrize(("openings", "shared"), [([], 0), ([40], 0), ([32, 40], 32), ([31, 40], 0), ([16] * 3, 16)])
def test_a_prefix_is_shared_where_it_saves_enough(openings: list[int], shared: int) -> None:
    assert MIN_SAVED_TOKENS == 32
    assert shared_tokens(openings) == shared


def whole_documents(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each document with its prefix."""
    n, lengths = batch.shared_prefix, list(batch.document_lengths)
    ids, labels = (tokens[n:].split(lengths) for tokens in (batch.input_ids, batch.labels))
    before, unlabelled = batch.input_ids[:n].tolist(), batch.labels[:n].tolist()
    return [(before + i.tolist(), unlabelled + j.tolist()) for i, j in zip(ids, labels, strict=True)]


rows_of_a_few_tokens = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=14).flatmap(
        lambda ids: st.builds(example, st.just(ids), st.lists(st.integers(1, len(ids) - 1), max_size=4))
    ),
    min_size=1,
    max_size=6,
)


@given(rows_of_a_few_tokens)
def test_packing_with_a_shared_prefix_leaves_every_document_as_it_is(rows: list[Example]) -> None:
    rows = [row for row in rows if row.supervised.any()]
    shared = min(opening_lengths(rows), default=0)
    once, each = pack(rows, shared=shared), pack(rows)
    assert once.shared_prefix == (shared if rows else 0)
    assert whole_documents(once) == whole_documents(each)
    assert all(length >= 1 for length in once.document_lengths)
    assert (once.labels[:shared] == IGNORE_INDEX).all()
    ends = np.cumsum(once.document_lengths) + shared
    for end, length in zip(ends, once.document_lengths, strict=True):
        assert once.positions[end - length : end].tolist() == list(range(shared, shared + length))
