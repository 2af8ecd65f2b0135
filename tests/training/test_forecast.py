"""The predicted duration of a run, and of its rest: steps, pauses and the end, corrected by the run's own times."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from backhand.loop import forecast as forecasts
from backhand.loop.forecast import BUSY, Busy, Forecast
from backhand.loop.observers import Observer, RunStart
from backhand.options.config import RunOptions, TrainConfig
from backhand.training import calibration
from backhand.training.run import train
from tests.support.tiny_run import StopAfter, TinyRun, write_pairs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(forecasts.time, "monotonic", lambda: now[0])
    return now


def test_the_total_is_the_sum_of_all_parts(clock: list[float]) -> None:
    forecast = Forecast([2.0] * 10, {0: 3.0, 5: 4.0, 10: 4.0}, 7.0)
    forecast.begin(0, 0.0)
    assert forecast.total_s == 20 + 11 + 7
    forecast.begin(6, 12.0)
    assert forecast.total_s == 8 + 4 + 7, "a resumed run has fewer parts left"


def test_steps_that_are_slower_than_predicted_make_the_rest_longer(clock: list[float]) -> None:
    forecast = Forecast([1.0] * 100, {0: 1.0, 100: 1.0}, 10.0)
    forecast.begin(0, 0.0)
    for step in range(1, 51):
        clock[0] += 2.0
        left = forecast.left_s(step, 2.0 * step + 30.0)  # the first step compiled for 30 seconds
    assert left == pytest.approx(2 * (50 + 1 + 10), rel=0.05)


def test_a_prediction_next_to_other_work_does_not_count_after_two_steps(clock: list[float]) -> None:
    forecast = Forecast([4.0] * 10, {}, 8.0, busy=Busy(0.5, 1.0))
    forecast.begin(0, 0.0)
    assert [forecast.left_s(step, float(step)) for step in (1, 2)][-1] == 8 + 2


def test_long_steps_that_are_still_to_come_count(clock: list[float]) -> None:
    forecast = Forecast([1.0] * 10 + [5.0] * 10, {}, 0.0)
    forecast.begin(0, 0.0)
    assert [forecast.left_s(step, float(step)) for step in (1, 2)][-1] == pytest.approx(58, rel=0.01)


def test_pauses_are_measured_apart_from_steps(clock: list[float]) -> None:
    forecast = Forecast([1.0] * 10, {0: 1.0, 2: 1.0, 4: 1.0, 6: 1.0, 8: 1.0, 10: 1.0}, 0.0)
    forecast.begin(0, 0.0)
    left = []
    for step in range(1, 11):
        clock[0] += 1.0 + (4.0 if step % 2 else 0.0)  # an evaluation before every second step
        left.append(forecast.left_s(step, float(step)))
    assert left[2] == pytest.approx(7 + 4 * 4, rel=0.05)
    assert left[-1] == pytest.approx(4, rel=0.05), "the evaluation after the last step"


_TIME = r"[\d.]+ s(?: to ([\d.]+ s))?"


class Started(Observer):
    """Remembers how runs begin."""

    def __init__(self) -> None:
        self.starts: list[RunStart] = []

    def started(self, start: RunStart) -> None:
        self.starts.append(start)


@pytest.mark.parametrize("kind", ["answers", "pairs", "rewards", "decisions"])
def test_a_run_says_its_time_with_its_plan(
    kind: str, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"quiet": False, "answers": 2, "max_steps": 8, "eval_every": 4}
    if kind == "pairs":
        rows = (str(write_pairs(tmp_path / "pairs.jsonl", 9)), str(write_pairs(tmp_path / "held_out.jsonl", 4, seed=1)))
        options |= {"data": rows[:1], "eval_data": rows[1:], "objective": "dpo"}
    if kind == "rewards":
        options |= {"objective": "grpo", "reward": ("length:3",), "group": 4, "max_new_tokens": 6, "max_length": 64}
    if kind == "decisions":
        rows_of = [(f"{name}.jsonl", count) for name, count in (("rows", 11), ("held_out", 4))]
        for name, count in rows_of:
            row = {"text": "the user asks", "mood": "good"}
            other = {"text": "json answers", "mood": "bad"}
            (tmp_path / name).write_text((json.dumps(row) + "\n" + json.dumps(other) + "\n") * count)
        data, eval_data = ((str(tmp_path / name),) for name, _ in rows_of)
        options |= {"objective": "decide", "data": data, "eval_data": eval_data}
        options |= {"state": "text", "question": {"mood": "Mood?"}}
    started = Started()
    train(tiny.config(tmp_path / "run", **options), callbacks=[started])
    forecast = started.starts[0].forecast
    assert forecast is not None and forecast.total_s > sum(forecast.steps_s) > 0 and set(forecast.pauses_s) >= {0, 4, 8}
    said = capsys.readouterr().err
    (plan,) = (line for line in said.splitlines() if line.startswith("plan: "))
    clause = " if every answer has its full length" if kind == "rewards" else ""
    assert re.search(rf"peak memory about [\d.,]+ [MG]iB; about {_TIME}{clause}({BUSY})?$", plan)
    steps = [
        line for line in said.splitlines() if line.startswith("step ") and "loss" in line and "held-out" not in line
    ]
    assert all(line.endswith(" left") for line in steps)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        # Two batches of seven prompts by each model, one of which ends like the rows with the adapter, after 8 tokens;
        # and the exact match of both, up to 8 tokens longer than the rows.
        ("answers", 64 + 8 + 2 * 64 + 2 * (8 + 8)),
        # Longer answers differ from the rows' own after a few tokens, which ends them.
        ("texts", 64 + 40 + 2 * 64 + 2 * 4),
        # Besides, the answers of both models and of the teacher.
        ("bake", 64 + 8 + 2 * 64 + 2 * (8 + 8) + 2 * 64 + 8),
    ],
)
def test_the_end_counts_all_answers(
    kind: str, passes: int, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one second for each pass. The end was predicted shorter than it was: 19 s where 25 followed.

    That of long answers was predicted to be two to four times as long.
    """
    monkeypatch.setattr(calibration, "fastest_calls", lambda calls, *_, **__: [1.0] * len(calls))
    options: dict[str, Any] = {"quiet": False, "answers": 2, "max_steps": 2, "eval_every": 2}
    if kind == "bake":
        options |= {"objective": "bake", "context": "the assistant answers in json", "answers_from": "rows"}
    if kind == "texts":
        rows = tmp_path / "rows.jsonl"
        row = {"prompt": "the user asks", "completion": "json " * 13}
        rows.write_text("".join(json.dumps(row | {"prompt": f"user {number}"}) + "\n" for number in range(8)))
        options |= {"data": (str(rows),), "eval_data": (), "eval_fraction": 0.5, "micro_batch_rows": 4}
    started = Started()
    summary = train(tiny.config(tmp_path / "run", **options), callbacks=[started])
    assert summary.adapted_exact_match is not None
    forecast = started.starts[0].forecast
    assert forecast is not None and passes - 6 <= forecast.end_s < passes + 15


def test_steps_with_cached_hidden_states_are_predicted_without_the_frozen_layers(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one second for a pass, of which the frozen layer takes three quarters."""
    monkeypatch.setattr(calibration, "fastest_calls", lambda calls, *_, **__: [1.0, 0.75][: len(calls)])
    started = Started()
    config = tiny.config(tmp_path / "run", quiet=False, layers="last:1", cache_frozen="memory")
    train(config, callbacks=[started])
    forecast = started.starts[0].forecast
    assert forecast is not None and len(forecast.steps_s) == 6
    first, second = sum(forecast.steps_s[:3]), sum(forecast.steps_s[3:])
    assert first == pytest.approx(4 * second, rel=0.1)


@pytest.mark.parametrize("computing", [0.1, 1.0])
def test_time_measured_next_to_other_work_is_a_range(
    computing: float, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = time.perf_counter
    monkeypatch.setattr(time, "thread_time", lambda: computing * clock())
    train(tiny.config(tmp_path / "run", quiet=False, max_steps=1, answers=0))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("plan: "))
    busy, found = computing < 0.5, re.search(rf"about {_TIME}({BUSY})?$", line)
    assert found is not None and all((part is not None) == busy for part in found.groups())


def test_a_resumed_run_says_the_time_of_the_steps_that_remain(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny.config(tmp_path / "run", max_steps=4, save_every=2, eval_every=4, answers=0)
    with pytest.raises(StopAfter.Stopped):
        train(made, callbacks=[StopAfter(3)])
    train(TrainConfig(run=RunOptions(output=tmp_path / "run", resume=True)))
    (plan,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("plan: "))
    assert re.search(rf"about {_TIME} for the remaining 2 steps({BUSY})?$", plan)


def test_measuring_changes_no_bit(tiny: TinyRun, tmp_path: Path) -> None:
    for name, quiet in (("measured", False), ("quiet", True)):
        train(tiny.config(tmp_path / name, quiet=quiet, max_steps=2))
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("measured", "quiet"))
    assert one.read_bytes() == other.read_bytes()
