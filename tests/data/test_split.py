from __future__ import annotations

import numpy as np
import pytest

from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.held_out import overlap, split
from backhand.data.random_order import random_order
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.errors import DataError


def example(first: int, source: str, *, supervised: int = 1) -> Example:
    mask = np.zeros(3, dtype=np.bool_)
    mask[supervised] = True
    return Example(np.array([first, 1, 2], dtype=np.int32), mask, source)


def data(count: int) -> PreparedData:
    return with_totals([example(i, f"f:{i}") for i in range(count)], DataReport(rows=count))


def test_random_order_is_a_fixed_permutation() -> None:
    assert sorted(random_order(100, 7, "a")) == list(range(100))
    assert random_order(8, 1, "epoch", 0).tolist() == [1, 4, 6, 0, 7, 5, 3, 2]
    assert random_order(100, 7, "a").tolist() != random_order(100, 8, "a").tolist()
    assert random_order(100, 7, "a").tolist() != random_order(100, 7, "b").tolist()
    assert random_order(0, 1).tolist() == []


def test_a_split_holds_every_row_on_one_side_in_order() -> None:
    train, held = split(data(50), 0.2, seed=3)
    assert len(held.examples) == 10
    assert held.report.tokens == 30 and train.report.tokens == 120
    sides = [int(e.input_ids[0]) for e in train.examples], [int(e.input_ids[0]) for e in held.examples]
    assert sides[0] == sorted(sides[0]) and sides[1] == sorted(sides[1])
    assert sorted(sides[0] + sides[1]) == list(range(50))
    assert split(data(50), 0.2, seed=3)[1].digest == held.digest
    assert split(data(50), 0.2, seed=4)[1].digest != held.digest


def test_each_side_counts_its_own_rows_and_left_out_rows_are_reported_once() -> None:
    several = [example(i, f"f:{i // 2}") for i in range(20)]
    read = DataReport(rows=10, truncated=3, skipped_bad=1, bad_rows=(DataError("bad", where="f:11"),))
    train, held = split(with_totals(several, read), 0.2, seed=3)
    assert (train.report.rows, held.report.rows) == (8, 2)
    assert (train.report.documents, held.report.documents) == (16, 4)
    assert (train.report.truncated, train.report.skipped_bad) == (3, 1)
    assert held.report.lines() == [
        "4 documents of 2 rows with 12 tokens, 4 of them supervised, the longest 3",
        "2 of these 10 rows, of which the other 8 are trained on",
    ]


def test_groups_that_stay_together_change_the_share_and_the_note_says_so() -> None:
    """Three equal texts are one of four groups."""
    several = [example(min(i, 3), f"f:{i}") for i in range(6)]
    for seed in range(8):
        rows = len((held := split(with_totals(several, DataReport(rows=6)), 0.25, seed)[1]).examples)
        share = "17%" if rows == 1 else "50%"
        assert held.report.lines()[-1].endswith(f" stay together: {share} are held out, not 25%")


@pytest.mark.parametrize(("fraction", "held"), [(0.001, 1), (0.999, 4), (0.5, 2)])
def test_both_sides_keep_a_row(fraction: float, held: int) -> None:
    assert len(split(data(5), fraction, seed=0)[1].examples) == held


def test_documents_of_a_row_and_equal_rows_stay_together() -> None:
    examples = [example(i % 10, f"f:{i}") for i in range(30)]
    examples += [example(100 + i, f"f:{i}") for i in range(0, 30, 10)]
    train, held = split(with_totals(examples, DataReport()), 0.4, seed=1)
    assert not overlap(train.examples, held.examples)
    assert not {e.source for e in train.examples} & {e.source for e in held.examples}


def test_one_distinct_row_cannot_be_split() -> None:
    twice = with_totals([example(1, "f:1"), example(1, "f:2")], DataReport())
    with pytest.raises(DataError, match="too few"):
        split(twice, 0.5, seed=0)


def test_overlap_looks_at_tokens_alone() -> None:
    held = [example(1, "g:1", supervised=2), example(2, "g:2")]
    assert [e.source for e in overlap([example(1, "f:1"), example(3, "f:3")], held)] == ["g:1"]
