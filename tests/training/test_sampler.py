"""Which rows a step trains on."""

from __future__ import annotations

from backhand.data.packing import Sampler
from backhand.loop.step_plan import derived_seed


def test_every_epoch_visits_every_row_once() -> None:
    sampler = Sampler(records=11, batch_rows=4, seed=3)
    assert sampler.steps_per_epoch == 3
    epochs = [[row for step in range(3 * e, 3 * e + 3) for row in sampler.rows_of(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(sampler.rows_of(step)) for step in range(3)] == [4, 4, 3]


def test_rows_that_are_compared_are_divided_evenly() -> None:
    """A last step of one row would have nothing to compare it with."""
    plain, even = (Sampler(records=113, batch_rows=16, seed=3, even=even) for even in (False, True))
    assert [len(plain.rows_of(step)) for step in range(8)] == [16] * 7 + [1]
    assert [len(even.rows_of(step)) for step in range(16)] == [*[14] * 7, 15] * 2
    for epoch in range(2):
        rows = [row for step in range(8 * epoch, 8 * epoch + 8) for row in even.rows_of(step)]
        assert rows == [row for step in range(8 * epoch, 8 * epoch + 8) for row in plain.rows_of(step)]
    assert even.epochs_done(10) == 1 + 28 / 113 and even.position(10)["row"] == 28
    sizes = [
        len(Sampler(records, batch_rows, 0, even=True).rows_of(step))
        for batch_rows in range(3, 9)
        for records in range(2, 40)
        for step in range(-(-records // batch_rows))
    ]
    assert min(sizes) == 2 and max(sizes) == 8


def test_the_order_follows_from_the_seed_alone() -> None:
    first, again, other = (Sampler(50, 8, seed) for seed in (1, 1, 2))
    assert [first.rows_of(step) for step in range(14)] == [again.rows_of(step) for step in reversed(range(14))][::-1]
    assert first.rows_of(0) != other.rows_of(0)


def test_the_place_in_the_data_follows_from_the_step() -> None:
    sampler = Sampler(records=10, batch_rows=4, seed=7)
    assert [sampler.epochs_done(steps) for steps in range(5)] == [0.0, 0.4, 0.8, 1.0, 1.4]
    assert sampler.position(4) == {"epoch": 1, "row": 4, "rows": 10, "batch_rows": 4, "seed": 7}


def test_each_epoch_uses_the_next_form_of_the_rows() -> None:
    plain, forms = (Sampler(records=10, batch_rows=4, seed=7, forms=count) for count in (1, 3))
    for epoch in range(7):
        for step in range(3 * epoch, 3 * epoch + 3):
            assert forms.rows_of(step) == [row + 10 * (epoch % 3) for row in plain.rows_of(step)]
    assert (plain.steps_before_repeats, forms.steps_before_repeats) == (3, 9) and forms.position(4) == plain.position(4)


def test_derived_seeds_differ_by_purpose_and_number() -> None:
    seeds = {derived_seed(0, purpose, step, micro) for purpose in "ab" for step in range(20) for micro in range(5)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
