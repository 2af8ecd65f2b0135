"""The schedule on known losses: which trials are promoted, which continue first, and how much is trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from backhand.search.options import SearchOptions
from backhand.search.schedule import Schedule, best_of
from backhand.search.space import parse_dimensions
from backhand.search.study import Study, Trial

GIVEN = {"learning_rate": 2e-4}
BEST = 1.7e-3


def schedule(**options: object) -> Schedule:
    search = SearchOptions(**options)  # type: ignore[arg-type]
    return Schedule(search, search.dimensions, GIVEN, seed=0)


def loss(trial: Trial, stage: int) -> float:
    """A valley over the rate, the deeper the later."""
    rate = float(trial.values["learning_rate"])
    return 1 + math.log10(rate / BEST) ** 2 + 1 / stage + trial.seed / 1000


def runs(search: Schedule, left: list[tuple[int, int]]) -> float:
    shares = [0.0, *(stage.share for stage in search.stages)]
    return sum(shares[after] - shares[before] for before, after in left)


def work(search: Schedule, study: Study, steps: int = 10_000) -> float:
    """Do what the schedule says, so many times at most; return what was trained, in runs."""
    trained = 0.0
    for _ in range(steps):
        with study.locked():
            trial = search.next(study, may_start=True)
            known = study.trials()
        if trial is None:
            assert not search.left(known)
            return trained
        assert trial != "wait"
        shares = [0.0, *(stage.share for stage in search.stages)]
        trained += shares[trial.goal] - shares[trial.done]
        losses = [loss(trial, stage) for stage in range(1, trial.goal + 1)]
        with study.locked():
            found = {"losses": losses, "done": trial.goal, "steps": 1}
            study.write(trial.number, found, finished=trial.goal == search.last)
        study.release(trial)
    return trained


@pytest.mark.parametrize("prune", ["halving", "median", "none"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_what_is_trained_is_what_the_plan_says(prune: str, seeds: int, tmp_path: Path) -> None:
    search = schedule(prune=prune, trials=10, seeds=seeds)
    study = Study(tmp_path, search.dimensions, GIVEN, search.last)
    least, most = (runs(search, search.left(first_best=best)) for best in (True, False))
    trained, known = 0.0, study.trials()
    for _ in range(len(search.left())):
        left = [runs(search, search.left(known, first_best=best)) for best in (True, False)]
        assert least - 1e-9 <= trained + left[0] <= trained + left[1] <= most + 1e-9
        trained += work(search, study, steps=1)
        known = study.trials()
    assert least - 1e-9 <= trained <= most + 1e-9 and search.left(known) == []
    trials = study.trials()
    assert sum(trial.repeats is None for trial in trials) == 10
    assert {trial.seed for trial in trials} == set(range(seeds))
    assert trials[0].values == GIVEN and trials[0].done == search.last


def test_the_best_at_each_stage_are_promoted_and_no_others(tmp_path: Path) -> None:
    search = schedule(trials=9)
    study = Study(tmp_path, search.dimensions, GIVEN, search.last)
    work(search, study)
    own = study.trials()[1:]
    ranked = sorted(own, key=lambda trial: loss(trial, 1))
    assert {trial.number for trial in own if trial.done >= 2} == {trial.number for trial in ranked[:3]}
    assert [trial.number for trial in own if trial.done == 3] == [ranked[0].number]
    assert best_of(study.trials(), search.last) == ranked[0]


def test_a_search_that_is_cut_off_at_any_time_ends_in_the_same_trials(tmp_path: Path) -> None:
    search = schedule(trials=7, seeds=2)
    whole = Study(tmp_path / "whole", search.dimensions, GIVEN, search.last)
    work(search, whole)
    cut = Study(tmp_path / "cut", search.dimensions, GIVEN, search.last)
    for _ in range(50):
        again = Study(tmp_path / "cut", search.dimensions, GIVEN, search.last)  # another process each time
        with again.locked():
            trial = search.next(again, may_start=True)  # started, and then killed
        if isinstance(trial, Trial):
            again.release(trial)
        work(search, cut, steps=1)
    assert cut.trials() == whole.trials()


def test_more_trials_than_before_are_promoted_among_all(tmp_path: Path) -> None:
    few, more = schedule(trials=4), schedule(trials=12)
    study = Study(tmp_path, few.dimensions, GIVEN, few.last)
    work(few, study)
    work(more, study)
    own = study.trials()
    assert len(own) == 12
    ranked = sorted(own, key=lambda trial: loss(trial, 1))
    assert {trial.number for trial in ranked[:4]} <= {trial.number for trial in own if trial.done >= 2}


def test_who_holds_a_trial_keeps_others_from_it_and_they_wait_for_the_last_ones(tmp_path: Path) -> None:
    search = schedule(trials=2)
    one, two = (Study(tmp_path, search.dimensions, GIVEN, search.last) for _ in range(2))
    with one.locked():
        first = search.next(one, may_start=True)
    with two.locked():
        second = search.next(two, may_start=True)
    assert isinstance(first, Trial) and isinstance(second, Trial)
    assert (first.number, second.number) == (0, 1)
    with two.locked():
        two.write(1, {"losses": [loss(second, 1)], "done": 1, "steps": 1})
        two.release(second)
        assert search.next(two, may_start=True) == "wait"
    one.release(first)  # as a killed process does
    with two.locked():
        assert search.next(two, may_start=True) == first


def test_a_trial_that_goes_on_may_be_held_a_moment_longer_by_whoever_brought_it_here(tmp_path: Path) -> None:
    search = schedule(trials=2)
    one, two = (Study(tmp_path, search.dimensions, GIVEN, search.last) for _ in range(2))

    def started(study: Study) -> Trial:
        with study.locked():
            trial = search.next(study, may_start=True)
        assert isinstance(trial, Trial)
        return trial

    def written(study: Study, trial: Trial) -> None:
        with study.locked():
            losses = [loss(trial, stage) for stage in range(1, trial.goal + 1)]
            found = {"losses": losses, "done": trial.goal, "steps": 1}
            study.write(trial.number, found, finished=trial.goal == search.last)

    held, other = started(one), started(two)
    best, given = sorted((held, other), key=lambda trial: loss(trial, 1))
    of_best, of_given = (one, two) if best == held else (two, one)
    written(of_best, best)
    written(of_given, given)
    of_given.release(given)
    with of_given.locked():
        assert search.next(of_given, may_start=True) == "wait"
    of_best.release(best)
    while (trial := started(of_given)).number == best.number:
        written(of_given, trial)
        of_given.release(trial)
    # The options as given go on to the end, for the comparison.
    assert trial.number == given.number == 0 and trial.goal == search.last


def test_the_options_as_given_may_be_held_a_moment_longer(tmp_path: Path) -> None:
    search = schedule(trials=2)
    one, two = (Study(tmp_path, search.dimensions, GIVEN, search.last) for _ in range(2))
    work(search, one, steps=1)
    work(search, two, steps=len(search.stages))
    with one.locked():
        assert one.claim(one.trials()[0])
    with two.locked():
        assert search.next(two, may_start=True) == "wait"
    one.release(one.trials()[0])
    with two.locked():
        trial = search.next(two, may_start=True)
    assert isinstance(trial, Trial) and (trial.number, trial.goal) == (0, search.last)


def test_without_time_no_trial_begins_but_the_best_goes_on(tmp_path: Path) -> None:
    search = schedule(trials=9)
    study = Study(tmp_path, search.dimensions, GIVEN, search.last)
    work(search, study, steps=3)
    with study.locked():
        trial = search.next(study, may_start=False)
    assert isinstance(trial, Trial)
    assert len(study.trials()) == 3 and trial.goal == 2


def test_half_a_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    search = schedule(trials=3)
    study = Study(tmp_path, search.dimensions, GIVEN, search.last)
    work(search, study, steps=2)
    before = study.trials()
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    assert study.trials() == before
    work(search, study)
    assert len(study.trials()) == 3


def test_values_of_a_trial_that_failed_are_not_tried_again_nearby(tmp_path: Path) -> None:
    search = schedule(trials=12, prune="none")
    study = Study(tmp_path, search.dimensions, GIVEN, search.last)
    for _ in range(12):
        with study.locked():
            trial = search.next(study, may_start=True)
            assert isinstance(trial, Trial)
            failed = float(trial.values["learning_rate"]) > 2e-3
            found = {"failed": "not finite"} if failed else {"losses": [loss(trial, 1)], "done": 1, "steps": 1}
            study.write(trial.number, found, finished=not failed)
            study.release(trial)
    later = study.trials()[7:]
    assert sum(trial.failed is not None for trial in later) < len(later) / 2


def test_importance_names_what_decides(tmp_path: Path) -> None:
    search = SearchOptions(over=("learning_rate=1e-4:1e-2:log", "rank=8,16"), trials=12, prune="none")
    given = {"learning_rate": 2e-4, "rank": 16}
    schedule_ = Schedule(search, search.dimensions, given, seed=0)
    study = Study(tmp_path, search.dimensions, given, schedule_.last)
    work(schedule_, study)
    importance = schedule_.importance(study.trials())
    assert importance["learning_rate"] > 0.6
    assert sum(importance.values()) == pytest.approx(1)


def test_a_grid_begins_with_the_options_as_given() -> None:
    search = schedule(trials=6, sampler="grid")
    dimensions = parse_dimensions(["learning_rate=1e-4:1e-2:log"])
    assert search.count == 7
    assert search.dimensions == dimensions
