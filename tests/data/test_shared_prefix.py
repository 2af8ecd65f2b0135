from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backhand.data.examples import Example
from backhand.data.packing import MIN_SAVED_TOKENS, RowPacker, common_tokens, pack, shared_tokens
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
    assert common_tokens(rows) == 9
    assert common_tokens(rows[:2]) == 10
    assert common_tokens(rows[:1]) == 10  # not the token that predicts the supervised one
    assert common_tokens([example([99, *SYSTEM, 20, 21], [11]), *rows]) == 0
    assert common_tokens([]) == 0


def test_no_token_that_predicts_a_supervised_one_is_shared() -> None:
    assert common_tokens([example([*SYSTEM, 20], [9]), example([*SYSTEM, 20], [5])]) == 4
    assert common_tokens([example([*SYSTEM, 20], [9]), example([*SYSTEM, 20], [1])]) == 0
    assert common_tokens([example([*SYSTEM, 20], [9]), example([*SYSTEM, 20], [])]) == 0


@pytest.mark.parametrize(("tokens", "rows", "shared"), [(40, 1, 0), (32, 2, 32), (31, 2, 0), (16, 3, 16)])
def test_a_prefix_is_shared_where_it_saves_enough(tokens: int, rows: int, shared: int) -> None:
    assert MIN_SAVED_TOKENS == 32
    alike = [example([*range(tokens), 90 + row, 7], [tokens + 1]) for row in range(rows)]
    assert shared_tokens(alike) == shared


@given(
    st.lists(
        st.builds(
            lambda alike, ids, last: example([*[5] * alike, *ids, 7, 7], [alike + len(ids) + 1] if last else []),
            st.sampled_from([0, 5, 8, 15, 33]),
            st.lists(st.integers(5, 6), max_size=3),
            st.booleans(),
        ),
        max_size=7,
    ),
    st.integers(1, 7),
)
def test_whether_rows_may_share_is_known_before_they_are_put_together(rows: list[Example], count: int) -> None:
    groups = (list(group) for size in range(count + 1) for group in combinations(rows, size))
    assert RowPacker(rows, share_prefixes=True).may_share(count) == any(map(shared_tokens, groups))
    assert not RowPacker(rows, share_prefixes=False).may_share(count)


def test_what_is_not_shared_is_not_packed_as_if_it_were() -> None:
    with pytest.raises(ValueError, match="f:1: the first 2 tokens are not shared"):
        pack([example([1, 2, 3, 4], [3]), example([1, 9, 3, 4], [3])], shared=2)
    with pytest.raises(ValueError, match="carry loss"):
        pack([example([1, 2, 3, 4], [2, 3])], shared=2)
    with pytest.raises(ValueError, match="5 tokens are not a prefix of 2 and documents of 2"):
        PackedBatch(torch.arange(5), torch.arange(5), (2,), 2)


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
    shared = common_tokens(rows)
    once, each = pack(rows, shared=shared), pack(rows)
    assert once.shared_prefix == (shared if rows else 0)
    assert whole_documents(once) == whole_documents(each)
    assert all(length >= 1 for length in once.document_lengths)
    assert (once.labels[:shared] == IGNORE_INDEX).all()
    ends = np.cumsum(once.document_lengths) + shared
    for end, length in zip(ends, once.document_lengths, strict=True):
        assert once.positions[end - length : end].tolist() == list(range(shared, shared + length))
