"""The clock of the machine is set back or forward, before, during and between commands."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, tzinfo
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.data import prepared_cache
from backhand.options.config import TrainConfig
from backhand.runs.status import read_status
from backhand.search.command import search_command
from backhand.search.options import SearchConfig, SearchOptions
from backhand.training.run import train
from tests.support.processes import start
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_run import KillAfter, TinyRun, final_bits, with_options

YEAR_S = 365 * 86_400.0
Clock = Callable[[float], float]
"""What the machine's clock shows for the true time."""


def jumping() -> Clock:
    """A clock that is set back by an hour at every look, and forward by a year at every tenth."""
    looks = 0

    def shown(now: float) -> float:
        nonlocal looks
        looks += 1
        return now - 3600.0 * looks + YEAR_S * (looks // 10)

    return shown


CLOCKS: dict[str, Callable[[], Clock]] = {
    "an hour back": lambda: lambda now: now - 3600.0,
    "a year back": lambda: lambda now: now - YEAR_S,
    "a year forward": lambda: lambda now: now + YEAR_S,
    "1970": lambda: lambda now: now % 1000.0,
    "after 2038": lambda: lambda now: now + 2.0**31,
    "jumping": jumping,
}


def set_clock(patch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Show another time in this process, wherever this package asks for it."""
    true = time.time
    patch.setattr(time, "time", lambda: clock(true()))

    class Shown(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return cls.fromtimestamp(clock(true()), tz)

    for module in ("backhand.runs.status", "backhand.runs.directory", "backhand.training.facts"):
        patch.setattr(f"{module}.datetime", Shown)


@contextmanager
def clock_set(clock: Clock) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        set_clock(patch, clock)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = tiny.config(tmp_path_factory.mktemp("straight") / "run", save_every=1, micro_batch_rows=1)
    train(config)
    return config


def killed_by_clock(config: TrainConfig, kind: str, step: int) -> None:
    """In a process of its own: train by this clock, and be killed after a step."""
    with clock_set(CLOCKS[kind]()):
        train(config, callbacks=[KillAfter(step)])


@pytest.mark.parametrize("kind", CLOCKS)
def test_a_run_is_killed_and_goes_on_by_another_clock(
    kind: str, straight: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same bits, from the newest checkpoint by its step, whatever the times of the files are."""
    config = with_options(straight, output=tmp_path / "run")
    process = start(killed_by_clock, config, kind, 4)
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    status = read_status(tmp_path / "run")
    assert status is not None and status.state == "killed"
    for number, path in enumerate(sorted((tmp_path / "run" / "checkpoints").iterdir())):
        os.utime(path, (4e9 - 1e8 * number,) * 2)
    with clock_set(CLOCKS[kind]()):
        train(with_options(config, resume=True))
        assert main(["report", str(tmp_path / "run")]) == 0
    assert final_bits(tmp_path / "run") == final_bits(straight.run.output)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["train_s"] < 1000 and 0 < summary["tokens_per_s"] < 1e9
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [line["time_s"] for line in lines if "time_s" in line]
    assert times == sorted(times) and times[0] >= 0
    capsys.readouterr()


# ---- whether a run goes on ---------------------------------------------------------------------------------------


def held_run(config: TrainConfig, kind: str) -> None:
    """In a process of its own: train by this clock, and wait in the first step."""
    from tests.support.held_runs import before_pass

    def wait(*_: object) -> None:
        (config.run.output.parent / "there").touch()
        time.sleep(600)

    before_pass(wait)
    with clock_set(CLOCKS[kind]()):
        train(config)


@pytest.mark.parametrize("kind", CLOCKS)
def test_a_run_that_goes_on_is_shown_as_running(kind: str, straight: TrainConfig, tmp_path: Path) -> None:
    """The system gives the start of a process by the clock of now: it moves where the clock is set."""
    process = start(held_run, with_options(straight, output=tmp_path / "run"), kind)
    try:
        while not (tmp_path / "there").exists():
            assert process.is_alive()
            time.sleep(0.02)
        for written in (0.0, 1e9, 4e9):  # the time that status.json was written by the clock of then
            os.utime(tmp_path / "run" / "status.json", (written, written))
            status = read_status(tmp_path / "run")
            assert status is not None and status.state == "running"
    finally:
        process.kill()
        process.join()
    status = read_status(tmp_path / "run")
    assert status is not None and status.state == "killed"


@pytest.mark.parametrize("written", [0.0, 1e9, 4e9])
def test_another_process_with_the_number_of_a_killed_one(written: float, straight: TrainConfig, tmp_path: Path) -> None:
    status = read_status(straight.run.output)
    assert status is not None
    other = replace(status, state="running", process=os.getpid(), process_start="another boot/1")
    path = tmp_path / "status.json"
    path.write_text(json.dumps(asdict(other)))
    os.utime(path, (written, written))
    found = read_status(tmp_path)
    assert found is not None and found.state == "killed"


@pytest.mark.parametrize("there", ["of this launcher", "of another launcher"])
def test_a_restart_replaces_no_run_of_its_own(there: str, straight: TrainConfig, tmp_path: Path) -> None:
    """With --overwrite, started again by torchrun, by a clock that was set forward meanwhile."""
    config = with_options(straight, output=tmp_path / "run", overwrite=True)
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    first = start_ranks([config] * 2, tmp_path / "ranks", at_place={1: ("step", "kill")})
    assert first.exit_codes() == [5, -signal.SIGKILL]
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for path in (tmp_path / "run").iterdir():
        os.utime(path, (1e9, 1e9))
    if there == "of another launcher":
        path = tmp_path / "run" / "status.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "launcher_start": "another boot/1"}))
    again = start_ranks([config] * 2, tmp_path / "more", environment=restarted)
    assert again.exit_codes() == [0, 0], again.said()
    assert bits_of_several(tmp_path / "run") == bits_of_several(straight.run.output)
    after = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (after[: len(steps)] == steps) == (there == "of this launcher")


# ---- several processes, searches, caches -------------------------------------------------------------------------


def test_processes_whose_clocks_differ(straight: TrainConfig, tmp_path: Path) -> None:
    """Each process has another clock, which jumps: no one counts as lost, and the bits are those of one process."""
    ranks = start_ranks([with_options(straight, output=tmp_path / "run")] * 3, tmp_path / "ranks", prepare=PREPARED)
    assert ranks.exit_codes() == [0, 0, 0], ranks.said()
    assert bits_of_several(tmp_path / "run") == bits_of_several(straight.run.output)


def set_for_good(kind: str) -> None:
    set_clock(pytest.MonkeyPatch(), CLOCKS[kind]())


PREPARED = {rank: partial(set_for_good, kind) for rank, kind in enumerate(("a year back", "jumping", "a year forward"))}


@pytest.mark.parametrize(
    "kind", ["jumping", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("an hour back", "a year forward"))]
)
def test_a_search(kind: str, tiny: TinyRun, tmp_path: Path) -> None:
    """Its hours, its trials and its result do not depend on the clock."""

    def searched(name: str) -> list[Any]:
        config = tiny.config(tmp_path / name, eval_every=3)
        options = SearchOptions(over=("rank=1,2",), trials=2, sampler="grid", hours=100.0, prune="none")
        own = {part: getattr(config, part) for part in ("model", "data", "adapter", "optimization", "run", "objective")}
        search_command(SearchConfig(**own, search=options))
        trials = json.loads((tmp_path / name / "search.json").read_text())["all"]
        return [(trial["number"], trial["losses"]) for trial in trials]

    usual = searched("usual")
    with clock_set(CLOCKS[kind]()):
        assert searched("other") == usual


def examples(run: Path) -> int:
    return int(json.loads((run / "facts.json").read_text())["data"]["train"]["examples"])


@pytest.mark.parametrize("kind", CLOCKS)
def test_kept_rows(kind: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found by their contents; files of another time are neither trusted nor removed for it."""
    monkeypatch.setenv(prepared_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(prepared_cache, "LEAST_BYTES", 1)
    (tmp_path / "rows.jsonl").write_bytes((tiny.model.parent / "rows.jsonl").read_bytes())
    config = tiny.config(tmp_path / "first", data=(str(tmp_path / "rows.jsonl"),), max_steps=1, epochs=1)
    with clock_set(CLOCKS[kind]()):
        train(config)
        kept = sorted((tmp_path / "cache").glob("*.rows"))
        for path in kept:
            os.utime(path, (4e9, 4e9))
        train(with_options(config, output=tmp_path / "second"))
        assert kept and sorted((tmp_path / "cache").glob("*.rows")) == kept
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('{"prompt": "what is", "completion": "a list"}\n')
        os.utime(tmp_path / "rows.jsonl", (1e9, 1e9))
        train(with_options(config, output=tmp_path / "third"))
    assert final_bits(tmp_path / "first") == final_bits(tmp_path / "second")
    assert [examples(tmp_path / name) for name in ("first", "second", "third")] == [11, 11, 12]


@pytest.mark.parametrize("kind", CLOCKS)
def test_answers_of_a_model(kind: str, tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(tiny.model), "--prompt", "what is", "--max-new-tokens", "3", "--threads", "1"]
    assert main(words) == 0
    usual = capsys.readouterr().out
    with clock_set(CLOCKS[kind]()):
        assert main(words) == 0
    assert capsys.readouterr().out == usual
