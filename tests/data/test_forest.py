"""Documents with common prefixes in one micro-batch: a forest of segments that stores each shared prefix once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backhand.data import prefix_forest
from backhand.data.examples import Example
from backhand.data.pack import pack, trained_length
from backhand.data.packing import RowPacker
from backhand.data.prefix_forest import MIN_SAVED_TOKENS
from backhand.nn.batch import IGNORE_INDEX, PackedBatch, pad_to_bucket
from backhand.verify.packed_tokens import unshare_prefixes


def example(ids: list[int], supervised: list[int]) -> Example:
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[supervised] = True
    return Example(np.array(ids, dtype=np.int32), mask, "f:1")


@pytest.fixture
def every_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_forest, "MIN_SAVED_TOKENS", 1)


SYSTEM = [7, 7, 8, 9, 5, 5, 4, 3, 2]


@pytest.mark.usefixtures("every_token_counts")
def test_a_system_prompt_two_prompts_and_their_answers_are_a_tree() -> None:
    """The answers of the first prompt begin alike: a token before they part ways predicts another one in each."""
    rows = [
        example([*SYSTEM, 20, 21, 31, 32, 33], [11, 12, 13]),
        example([*SYSTEM, 20, 21, 31, 32, 34, 35], [11, 12, 13, 14]),
        example([*SYSTEM, 40, 51, 52], [10, 11]),
        example([1, 2, 3], [2]),
        example([*SYSTEM, 40, 61], [10]),
    ]
    batch = pack(rows, share=True)
    assert batch.lengths == (2, 9, 1, 2, 3, 1, 2)
    assert batch.parents == (-1, -1, 1, 1, 1, 4, 4)
    assert batch.document_ends == (5, 6, 3, 0, 2)
    assert batch.input_ids.tolist() == [1, 2, *SYSTEM, 40, 40, 51, 20, 21, 31, 32, 32, 34]
    assert batch.labels[batch.labels != IGNORE_INDEX].tolist() == [3, 61, 51, 52, 31, 32, 33, 34, 35]
    assert batch.positions.tolist() == [0, 1, *range(9), 9, 9, 10, 9, 10, 11, 12, 12, 13]
    assert batch.weights is not None
    assert batch.weights.tolist() == [1, 1, 1, 1, 2, 2, 1, 1, 1]
    assert batch.document_tokens == (3, 4, 2, 1, 1)
    assert [run[:3] for run in batch.segment_runs] == [
        (0, 1, 2),
        (2, 1, 9),
        (11, 1, 1),
        (12, 1, 2),
        (14, 1, 3),
        (17, 1, 1),
        (18, 1, 2),
    ]
    assert batch.segment_runs[-1].before == ((2, 11), (14, 17))


@pytest.mark.usefixtures("every_token_counts")
def test_labels_part_documents_as_tokens_do() -> None:
    """Of a conversation that became two documents only the last reply of each carries loss."""
    talk = [5, 6, 7, 8, 9, 10, 11]
    batch = pack([example(talk[:5], [3, 4]), example(talk, [6])], share=True)
    assert (batch.lengths, batch.parents, batch.document_ends) == ((2, 2, 4), (-1, 0, 0), (1, 2))


@pytest.mark.usefixtures("every_token_counts")
def test_a_document_may_end_where_another_goes_on_and_two_may_be_one() -> None:
    talk = [5, 6, 7, 8, 9]
    batch = pack([example(talk, [2, 4]), example(talk[:3], [2]), example(talk, [2, 4]), example(talk, [])], share=True)
    assert (batch.lengths, batch.parents, batch.document_ends) == ((2, 2), (-1, 0), (1, 0, 1, -1))
    assert batch.weights is not None
    assert batch.weights.tolist() == [3, 2]
    assert batch.supervised_tokens == 5


@pytest.mark.parametrize(("tokens", "rows", "shared"), [(40, 1, 0), (32, 2, 32), (31, 2, 0), (16, 3, 16)])
def test_a_beginning_is_shared_where_it_saves_enough(tokens: int, rows: int, shared: int) -> None:
    assert MIN_SAVED_TOKENS == 32
    alike = [example([*range(tokens), 90 + row, 7], [tokens + 1]) for row in range(rows)]
    batch = pack(alike, share=True)
    assert batch.lengths == ((shared, *[1] * rows) if shared else (tokens + 1,) * rows)
    assert len(pack(alike).lengths) == rows and not pack(alike).parents


def test_a_segment_after_another_has_to_save_enough_itself() -> None:
    """Twenty tokens more in two of three documents are not worth a segment; thirty-two are."""
    for more, shared in ((20, False), (32, True)):
        rows = [example([*range(16), *[3] * more, 90 + row, 7], [more + 17]) for row in range(2)]
        batch = pack([*rows, example([*range(16), 80, 7], [17])], share=True)
        assert batch.lengths == ((16, 1, more, 1, 1) if shared else (16, 1, more + 1, more + 1))


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ((2,), (), "5 tokens cannot be segments of 2"),
        ((2, 3), (-1,), "2 segments cannot have 1 parents"),
        ((2, 1, 2), (-1, -1, 0), "segment 2 does not follow segment 0"),
        ((2, 3), (1, -1), "segment 0 does not follow segment 1"),
    ],
)
def test_segments_that_are_none_are_refused(lengths: Any, parents: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedBatch(torch.arange(5), torch.arange(5), lengths, parents)


def documents_of(batch: PackedBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, labels and positions of each document."""
    starts = batch.offsets
    places = [[p for one in batch.path(end) for p in range(starts[one], starts[one + 1])] for end in batch.ends]
    return [
        (batch.input_ids[one].tolist(), batch.labels[one].tolist(), batch.positions[one].tolist()) for one in places
    ]


rows_of_a_few_tokens = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=14).flatmap(
        lambda ids: st.builds(example, st.just(ids), st.lists(st.integers(1, len(ids) - 1), max_size=4))
    ),
    min_size=1,
    max_size=8,
)


@given(rows_of_a_few_tokens, st.sampled_from([1, 3, 8]))
def test_packing_a_forest_leaves_every_document_as_it_is(rows: list[Example], least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_forest, "MIN_SAVED_TOKENS", least)
        once, each = pad_to_bucket(pack(rows, share=True)), pack(rows)
        packer = RowPacker(rows, share_prefixes=True)
        assert packer.packed_tokens(range(len(rows))) == sum(packer.forest(range(len(rows))).lengths)
    found = documents_of(once)
    for (ids, labels, positions), row in zip(found, rows, strict=True):
        length = trained_length(row)
        assert ids == row.input_ids[:length].tolist()
        assert positions == list(range(length))
        targets = np.where(row.supervised[1 : length + 1], row.input_ids[1 : length + 1], IGNORE_INDEX)
        assert labels == targets.tolist()
    assert found == documents_of(each)
    assert all(length >= 1 for length in once.lengths)
    assert once.supervised_tokens == each.supervised_tokens == sum(row.supervised_tokens for row in rows)
    whole = unshare_prefixes(once)
    assert documents_of(whole)[: len(rows)] == found


@given(rows_of_a_few_tokens)
def test_with_every_token_counting_no_two_segments_begin_alike(rows: list[Example]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_forest, "MIN_SAVED_TOKENS", 1)
        batch = pack(rows, share=True)
    parents = batch.parents or (-1,) * len(batch.lengths)
    starts = batch.offsets
    begins = [
        (parent, int(batch.input_ids[start]), int(batch.labels[start]))
        for parent, start in zip(parents, starts, strict=False)
    ]
    assert len(set(begins)) == len(begins)


@given(rows_of_a_few_tokens)
def test_values_of_documents_and_of_positions_are_transposed_maps(rows: list[Example]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_forest, "MIN_SAVED_TOKENS", 1)
        batch = pack(rows, share=True)
    positions, tokens = len(batch.supervised_positions), batch.supervised_tokens
    x, y = torch.arange(1.0, positions + 1).double(), torch.arange(3.0, tokens + 3).double()
    assert torch.equal((batch.per_document(x) * y).sum(), (x * batch.sum_at_positions(y)).sum())
    labels = torch.cat([batch.labels[:0], *(torch.tensor(one[1], dtype=torch.int64) for one in documents_of(batch))])
    assert torch.equal(batch.per_document(batch.labels[batch.supervised_positions]), labels[labels != IGNORE_INDEX])
