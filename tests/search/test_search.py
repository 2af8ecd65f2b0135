"""Searches of a tiny model: each trial is the run that it would be alone, and no process's end loses one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.engines import decoder_engine
from backhand.errors import UsageError
from backhand.files import FileLayer
from backhand.loop.forecast import BUSY, Busy
from backhand.loop.hidden_state_cache import MemoryStateStore
from backhand.loop.observers import Callback, Observer, RunStart
from backhand.loop.state import STATE_FILE
from backhand.nn.decoder import weights
from backhand.options.config import TrainConfig
from backhand.options.config_file import dump_config, load_config, read_table
from backhand.printing import duration
from backhand.runs.checkpoint import CheckpointStore
from backhand.runs.interruption import Interrupted
from backhand.runs.summary import RunSummary
from backhand.search import command
from backhand.search.command import ABOVE, BELOW, search_command
from backhand.search.options import SearchConfig
from backhand.search.result import SearchResult, result_of
from backhand.search.schedule import EVALUATIONS, Schedule
from backhand.search.study import Study, Trial
from backhand.training.calibration import Speed
from backhand.training.plan import RunPlan, plan_run
from backhand.training.run import train
from tests.support.processes import start
from tests.support.searches import search_config
from tests.support.tiny_run import TinyRun


def result_bits(run: Path) -> dict[str, bytes]:
    """Adapter, and the values and moments of the newest checkpoint."""
    newest = CheckpointStore(run / "checkpoints", FileLayer(), print).newest_valid()
    assert newest is not None
    files = {path.name: path.read_bytes() for path in (run / "adapter").iterdir() if path.suffix == ".safetensors"}
    return files | {STATE_FILE: newest.contents[STATE_FILE]}


def test_a_promoted_trial_is_bit_for_bit_the_run_made_alone(found: SearchResult, tmp_path: Path) -> None:
    trial = Path(found.output) / "trials" / f"{found.best:03d}"
    config = load_config(trial / "config.toml")
    train(replace(config, run=replace(config.run, output=tmp_path / "alone")))
    assert result_bits(trial) == result_bits(tmp_path / "alone")


def test_a_trial_that_stopped_early_goes_on_by_the_ordinary_resume_to_the_bits_of_the_run_alone(
    found: SearchResult, tmp_path: Path
) -> None:
    trials = json.loads((Path(found.output) / "search.json").read_text())["all"]
    stopped = next(trial for trial in trials if trial["done"] == 1)
    run = Path(found.output) / "trials" / f"{stopped['number']:03d}"
    assert not (run / "summary.json").exists()
    config = load_config(run / "config.toml")
    run = Path(shutil.copytree(run, tmp_path / "trial"))
    train(TrainConfig(run=replace(config.run, output=run, resume=True)))
    train(replace(config, run=replace(config.run, output=tmp_path / "alone", resume=False)))
    assert result_bits(run) == result_bits(tmp_path / "alone")


def test_what_a_search_leaves(found: SearchResult) -> None:
    output = Path(found.output)
    best = output / "trials" / f"{found.best:03d}"
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == (
        best / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((output / "search.json").read_text())["best"] == found.best
    assert found.loss < found.given_loss
    assert f"{found.loss:.4f} on " in found.sentence and "--learning-rate" in found.sentence
    assert " ended early, after at most " in found.sentence and found.sentence.endswith(" of 6 steps.")
    page = (output / "report.html").read_text()
    for shown in (
        found.sentence.split(":")[0],
        "setting-rank",
        "setting-learning_rate",
        "side by side",
        "000 as given",
    ):
        assert shown in page
    assert str(best / "config.toml") in found.command
    assert found.runs == pytest.approx(sum(_shares(output)), abs=1e-3)


@pytest.mark.parametrize(
    ("losses", "objective", "said"),
    [
        (
            [(1.2, 1.1)],
            "sft",
            "Use --rank 4: held-out loss 1.1000, lower than 1.2000 as given, with one seed each, and c",
        ),
        (
            [(1.2, 1.1), (1.25, 1.16), (1.22, 1.11)],
            "sft",
            "1.2233 as given by 0.1 (95 % interval 0.07516 to 0.1248 o",
        ),
        (
            [(1.2, 1.1), (1.2, 1.19)],
            "sft",
            "to 0.6268 over 2 seeds): too few seeds to tell the difference from chance.",
        ),
        (
            [(1.2, 1.1), (1.2, 1.5)],
            "sft",
            "Keep the options as given: --rank 4 had the lowest held-out loss with the first",
        ),
        (
            [(1.2, 1.1), (1.2, 1.5)],
            "sft",
            "seed, but not on average; the mean of 2 seeds is 1.3000, and 1.2000 as given.",
        ),
        ([(1.20001, 1.2)], "sft", "held-out loss 1.20000, lower than 1.20001 as given"),
        ([(-0.2, -0.5)], "grpo", "Use --rank 4: held-out reward 0.5000, higher than 0.2000 as given, with one seed"),
        ([(-0.2, -0.1)], "grpo", "no trial has a higher held-out reward than the options as given (0.2000)."),
    ],
)
def test_the_sentence_says_how_sure_the_difference_is(
    losses: list[tuple[float, float]], objective: str, said: str, tiny: TinyRun, tmp_path: Path
) -> None:
    config = search_config(tiny, tmp_path / "search", {"over": ("rank=2,4",), "prune": "none"})
    config = replace(config, objective=replace(config.objective, objective=objective))
    schedule = Schedule(config.search, config.search.dimensions, {"rank": 2}, seed=0)
    trials = [
        Trial(2 * seed + number, {"rank": 4 if number else 2}, seed, number if seed else None, 1, 1, (loss,), steps=6)
        for seed, pair in enumerate(losses)
        for number, loss in enumerate(pair)
    ]
    result = result_of(config, schedule, trials, 6)
    assert said in result.sentence
    keeps = "Keep" in result.sentence
    assert (result.values, result.best) == (({"rank": 2}, 0) if keeps else ({"rank": 4}, 1))
    brief = result_of(config, schedule, [trials[0], replace(trials[1], done=0, losses=())], 6).sentence
    assert brief.startswith("No other trial was compared with the options as given (") and "--prune none" in brief


def _shares(output: Path) -> list[float]:
    """The share of its steps that each trial trained, from what the runs themselves wrote."""
    shares = []
    for run in sorted((output / "trials").glob("[0-9][0-9][0-9]")):
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        shares.append(max(steps) / 6)
    return shares


def test_decisions_are_compared_by_their_held_out_loss(tiny: TinyRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ["user", "json", "list"]
    rows.write_text("".join(json.dumps({"text": f"{word} asks", "label": word}) + "\n" for word in words * 3))
    over = {"trials": 2, "over": ("learning_rate=1e-3:1e-1:log",)}
    files = {"data": (str(rows),), "eval_data": (str(rows),)}
    found = search_command(search_config(tiny, tmp_path / "search", over, objective="decide", **files))
    run = Path(found.output) / "trials" / f"{found.best:03d}"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *evaluations = [one["eval_loss"] for one in records if "eval_label_mass" in one]
    assert found.loss == min(evaluations) < before


PLAN_S, START_S, STEP_S, END_S = 8.0, 10.0, 2.0, 5.0


class Clock(Observer):
    """A clock of the events of runs alone, in place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def started(self, _: RunStart) -> None:
        self.now += START_S

    def stepped(self, _: dict[str, Any]) -> None:
        self.now += STEP_S

    def ended(self, _: RunSummary) -> None:
        self.now += END_S


def train_in_time(clock: Clock, *args: Any, callbacks: Sequence[Callback], **more: Any) -> RunSummary:
    """Train with a clock that moves before the other observers look at it."""
    return train(*args, callbacks=[clock, *callbacks], **more)


def test_the_plan_counts_starts_and_the_end_of_each_run(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[RunPlan] = []
    busy = Busy(0.5, 2.0)
    speed = Speed(
        tokens_per_s=1.0,
        train_s=60.0,
        evaluate_s=36.0,
        teacher_s=0.0,
        finish_s=51.0,
        end_s=24.0,
        measured_s=0.0,
        busy=busy,
    )
    monkeypatch.setattr(command, "calibrate", lambda plan, *_, **_options: (plans.append(plan), speed)[1])
    made = search_config(tiny, tmp_path / "search", {"trials": 2}, quiet=False, eval_every=None)
    monkeypatch.setattr(command, "time", clock := Clock())
    monkeypatch.setattr(command, "train", partial(train_in_time, clock))
    monkeypatch.setattr(command, "plan_run", lambda *args, **more: (clock.wait(PLAN_S), plan_run(*args, **more))[1])
    search_command(made)
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("search: "))
    *earlier, last = (line for line in lines if line.startswith("trial "))
    assert all(line.endswith(" left") for line in earlier) and not last.endswith(" left")
    schedule = Schedule(made.search, made.search.dimensions, {}, seed=0)
    run_s, start_s = 60 + 36 + 27, PLAN_S + (36 + 2 * 27) / (EVALUATIONS + 1)  # 27 s for the checkpoints
    ends = [0, 1, 3, 6]  # steps at which the stages of six steps end
    most, least = (schedule.left(first_best=best) for best in (False, True))
    runs = sum(ends[after] - ends[before] for before, after in most) / 6
    finished = sum(after == 3 for _, after in most)
    most_s = runs * run_s + len(most) * start_s + finished * 24
    # The options as given are the best, and need no comparison.
    least_s = most_s - 5 / 6 * run_s - start_s - 24
    assert len(most) - len(least) == 1
    assert line.endswith(f"steps of {runs:.1f} runs, about {duration(0.5 * least_s)} to {duration(2 * most_s)}{BUSY}")
    assert plans[0].inputs.config.run.eval_every == 1, "six steps are evaluated up to eight times"
    first = Trial(0, {}, seed=0, done=1, losses=(1.0,), steps=1)
    times = []
    for best in (True, False):
        left = schedule.left((first,), first_best=best)
        steps = sum(ends[after] - ends[before] for before, after in left)
        finished = sum(after == 3 for _, after in left)
        times.append(duration(steps * STEP_S + len(left) * START_S + finished * 24))
    assert earlier[0].endswith(f"about {' to '.join(times)} left"), "starts are as long before few steps as before many"
    assert earlier[-1].endswith(f"about {duration(5 * STEP_S + START_S + END_S)} left"), "the first trial, to its end"


def test_all_trials_share_one_reading_of_the_weights_and_the_rows(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    load = weights.load_weights
    monkeypatch.setattr(
        decoder_engine, "load_weights", lambda *args, **more: (read.append(more), load(*args, **more))[1]
    )
    search_command(search_config(tiny, tmp_path / "search", base="dense"))
    assert len(read) == 1


def test_hidden_states_below_the_lowest_adapted_layer_are_computed_once_for_all_trials(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    put = MemoryStateStore.put
    monkeypatch.setattr(
        MemoryStateStore, "put", lambda self, number, states: (kept.append(number), put(self, number, states))[1]
    )
    options = {"layers": "last:1", "cache_frozen": "memory"}
    train(tiny.config(tmp_path / "alone", **{"eval_every": 3, **options}))
    alone = sorted(kept)
    kept.clear()
    search_command(search_config(tiny, tmp_path / "search", {"trials": 6}, **options))
    assert sorted(kept) == alone


def test_what_is_not_to_be_searched_is_refused_before_anything_is_written(tiny: TinyRun, tmp_path: Path) -> None:
    config = search_config(tiny, tmp_path / "search", {"over": ("learning_rate=-1:1",)})
    with pytest.raises(UsageError, match="learning_rate"):
        search_command(config)
    with pytest.raises(UsageError, match="no rows are held out"):
        search_command(search_config(tiny, tmp_path / "search", eval_data=()))
    assert not (tmp_path / "search").exists()


def test_a_search_goes_on_with_more_trials_and_refuses_other_options(tiny: TinyRun, tmp_path: Path) -> None:
    config = search_config(tiny, tmp_path / "search", {"trials": 2})
    first = search_command(config)
    with pytest.raises(UsageError, match="--resume"):
        search_command(config)
    again = replace(config, run=replace(config.run, resume=True))
    with pytest.raises(UsageError, match="batch_rows: 4 in the search, 2 given"):
        search_command(replace(again, optimization=replace(again.optimization, batch_rows=2)))
    more = search_command(replace(again, search=replace(again.search, trials=4)))
    assert (first.trials, more.trials) == (2, 4)
    text = tiny.rows.read_text()
    tiny.rows.write_text(text.replace("json", "names"))
    try:
        with pytest.raises(UsageError, match="have changed since the search started"):
            search_command(again)
    finally:
        tiny.rows.write_text(text)


def test_without_over_the_rate_is_searched_about_the_one_that_auto_chooses(tiny: TinyRun, tmp_path: Path) -> None:
    config = search_config(tiny, tmp_path / "search", {"over": (), "trials": 2}, learning_rate="auto")
    first = search_command(config)
    stored = read_table(tmp_path / "search" / "search.toml")
    rate = stored["optimization"]["learning_rate"]
    train(replace(config.run_config, run=replace(config.run, output=tmp_path / "run")))
    assert rate == load_config(tmp_path / "run" / "config.toml").optimization.learning_rate
    assert stored["search"]["over"] == [f"learning_rate={rate / BELOW:.4g}:{rate * ABOVE:.4g}:log"]
    trials = json.loads((Path(first.output) / "search.json").read_text())["all"]
    assert [trial["values"]["learning_rate"] == rate for trial in trials] == [True, False]
    more = search_command(
        replace(config, run=replace(config.run, resume=True), search=replace(config.search, trials=3))
    )
    assert more.trials == 3


@pytest.mark.parametrize("values", ["0:2", "0,1,2"])
def test_an_option_without_a_value_as_given_is_varied(values: str, tiny: TinyRun, tmp_path: Path) -> None:
    over = (f"warmup_steps={values}", "rank=2,4")
    config = search_config(tiny, tmp_path / "search", {"over": over, "trials": 4, "seeds": 2, "prune": "none"})
    found = search_command(config)
    trials = json.loads((tmp_path / "search" / "search.json").read_text())["all"]
    assert [trial["values"] for trial in trials if 0 in (trial["number"], trial["repeats"])] == [{"rank": 3}] * 2
    assert all(trial["values"].keys() == {"warmup_steps", "rank"} for trial in trials[1:4])
    again = search_command(replace(config, run=replace(config.run, resume=True)))
    assert (again.best, again.loss) == (found.best, found.loss)


def test_a_trial_whose_run_fails_is_reported_and_the_others_go_on(tiny: TinyRun, tmp_path: Path) -> None:
    search = {"over": ("learning_rate=0.01,1e30",), "trials": 4, "prune": "none"}
    found = search_command(search_config(tiny, tmp_path / "search", search, max_bad_steps=1))
    trials = json.loads((Path(found.output) / "search.json").read_text())["all"]
    failed = [trial for trial in trials if trial["failed"]]
    assert len(failed) == found.failed and 0 < found.failed < 4
    assert all(trial["values"]["learning_rate"] == 1e30 and "finite" in trial["failed"] for trial in failed)
    assert found.values in ({"learning_rate": 0.01}, {"learning_rate": 0.003})


def _searching(words: list[str], said: str) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(main(["search", *words]))


def _started(config: SearchConfig, said: str = os.devnull) -> BaseProcess:
    """`backhand search` in a process of its own."""
    file = config.run.output.parent / f"{config.run.output.name}.toml"
    shown = replace(config, run=replace(config.run, quiet=False, resume=False))
    file.write_text(dump_config(shown))
    return start(_searching, [str(file), *(["--resume"] if config.run.resume else [])], said)


def _wait_for_trials(output: Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(list((output / "trials").glob("*/metrics.jsonl"))) < count:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_killed_at_any_time_it_goes_on_without_a_lost_trial(tiny: TinyRun, tmp_path: Path, found: SearchResult) -> None:
    config = search_config(tiny, tmp_path / "search")
    for trials in (1, 3):
        process = _started(replace(config, run=replace(config.run, resume=trials > 1)))
        try:
            _wait_for_trials(config.run.output, trials)
        finally:
            process.kill()
            process.join()
    ended = search_command(replace(config, run=replace(config.run, resume=True)))
    assert (ended.values, ended.loss, ended.given_loss) == (found.values, found.loss, found.given_loss)
    for number in range(found.trials):
        name = f"trials/{number:03d}"
        assert result_bits(Path(ended.output) / name) == result_bits(Path(found.output) / name)


def test_two_processes_share_the_trials_of_one_search(tiny: TinyRun, tmp_path: Path, found: SearchResult) -> None:
    config = search_config(tiny, tmp_path / "search", {"trials": 6, "sampler": "random"})
    files = [tmp_path / "first", tmp_path / "second"]
    started = [_started(config, str(files[0]))]
    try:
        _wait_for_trials(config.run.output, 1)
        started.append(_started(replace(config, run=replace(config.run, resume=True)), str(files[1])))
        for process in started:
            process.join(240)
        said = [file.read_text() for file in files]
        assert [process.exitcode for process in started] == [0, 0], "".join(said)
    finally:
        for process in started:
            process.kill()
    reported = [{line.split(" ")[1] for line in text.splitlines() if line.startswith("trial ")} for text in said]
    assert len(reported[0] | reported[1]) == 6
    config_ = replace(config, run=replace(config.run, resume=True))
    study = Study(config.run.output, config_.search.dimensions, {"learning_rate": 3e-3, "rank": 3}, last=3)
    assert [trial.number for trial in study.trials()] == list(range(6))


def test_ctrl_c_saves_the_trial_that_is_in_work_and_says_how_to_go_on(tiny: TinyRun, tmp_path: Path) -> None:
    config = search_config(tiny, tmp_path / "search", epochs=40)
    from backhand.loop.observers import Observer

    class Stop(Observer):
        def stepped(self, record: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    import backhand.search.command as command

    plain = command.train
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "train", lambda *args, **more: plain(*args, **{**more, "callbacks": [Stop()]}))
        with pytest.raises(Interrupted) as raised:
            search_command(config)
    assert raised.value.exit_code == 130
    assert f"backhand search --resume --output {config.run.output}" in str(raised.value)
    assert (config.run.output / "trials" / "000" / "checkpoints").is_dir()
