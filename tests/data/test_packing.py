from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from backhand.data.even_micro_batches import even_micro_batches
from backhand.data.examples import Example
from backhand.data.pack import pack, trained_length
from backhand.data.packing import micro_batches
from backhand.nn.batch import IGNORE_INDEX


def example(ids: list[int], supervised: list[int]) -> Example:
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[supervised] = True
    return Example(np.array(ids, dtype=np.int32), mask, "f:1")


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    batch = pack([example([10, 11, 12, 13], [2, 3]), example([20, 21, 22, 23, 24], [1, 3])])
    assert batch.lengths == (3, 3)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 22]
    assert batch.labels.tolist() == [IGNORE_INDEX, 12, 13, 21, IGNORE_INDEX, 23]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2]


def test_what_cannot_change_the_loss_is_left_out() -> None:
    assert trained_length(example([1, 2, 3, 4], [1])) == 1
    assert trained_length(example([1, 2], [])) == 0
    assert pack([example([1, 2], [])]).lengths == ()
    assert pack([]).input_ids.shape == (0,)


supervised_examples = st.integers(1, 12).flatmap(
    lambda n: st.builds(
        example,
        st.lists(st.integers(0, 99), min_size=n, max_size=n),
        st.lists(st.integers(1, n - 1)) if n > 1 else st.just([]),
    )
)


@given(st.lists(supervised_examples, max_size=8))
def test_every_supervised_token_is_a_label_after_its_own_past(examples: list[Example]) -> None:
    batch = pack(examples)
    assert batch.supervised_tokens == sum(int(e.supervised.sum()) for e in examples)
    assert list(batch.lengths) == sorted(batch.lengths)
    pasts = []
    start = 0
    for length in batch.lengths:
        ids, labels = batch.input_ids[start : start + length], batch.labels[start : start + length]
        pasts += [(*ids[: i + 1].tolist(), int(labels[i])) for i in range(length) if labels[i] != IGNORE_INDEX]
        start += length
    expected = [tuple(e.input_ids[: i + 1].tolist()) for e in examples for i in np.flatnonzero(e.supervised)]
    assert sorted(pasts) == sorted(expected)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.none() | st.integers(1, 5))
def test_micro_batches_hold_every_row_once_within_the_limit(lengths: list[int], max_rows: int | None) -> None:
    rows = list(range(0, len(lengths), 2))
    groups = micro_batches(rows, lengths, max_rows=max_rows)
    assert sorted(row for group in groups for row in group) == rows
    for group in groups:
        assert max_rows is None or len(group) <= max_rows
    order = [lengths[row] for group in groups for row in group]
    assert order == sorted(order, reverse=True)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 5))
def test_even_micro_batches_have_their_share_of_the_tokens(lengths: list[int], max_rows: int) -> None:
    rows = list(range(0, len(lengths), 2))
    groups = even_micro_batches(rows, lengths, max_rows=max_rows)
    assert sorted(row for group in groups for row in group) == rows
    tokens = [sum(lengths[row] for row in group) for group in groups]
    assert tokens == sorted(tokens, reverse=True), "a step that does not fit in memory must fail at once"
    for group, count in zip(groups, tokens, strict=True):
        assert len(group) <= max_rows
        without_last = count - lengths[group[-1]]
        assert without_last == 0 or without_last * len(rows) < max_rows * sum(tokens)


def test_long_rows_are_not_all_in_the_same_micro_batch() -> None:
    assert even_micro_batches(range(8), [9, 1, 1, 9, 9, 1, 1, 1], max_rows=4) == [
        [0, 3],
        [4, 1, 2, 5],
        [6, 7],
    ]
    assert even_micro_batches(range(4), [7, 8, 9, 10], max_rows=2) == [[3, 2], [1, 0]], "of nearly equal length"


def test_without_limits_there_is_one_micro_batch() -> None:
    assert micro_batches([2, 0, 1], [5, 5, 9]) == [[2, 0, 1]]
