"""Every logger, with its real package and without a network: the figures it keeps are those of metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from backhand.errors import UsageError
from backhand.loop import loggers as choice
from backhand.loop.loggers import LoggerObserver, figures
from backhand.loop.observers import Observer, RunStart
from backhand.options.config import Logger
from backhand.training.run import train
from tests.support.tiny_run import TinyRun

Kept = dict[tuple[str, int], float]


def written(run: Path) -> Kept:
    """(name, step) → figure, from metrics.jsonl."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(name, record["step"]): value for record in records for name, value in figures(record).items()}


@pytest.fixture(autouse=True)
def _nobody_calls_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def test_tensorboard(tiny: TinyRun, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny.config(tmp_path / "run", report_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tensorboard")).Reload()
    kept = {(tag, one.step): one.value for tag in events.Tags()["scalars"] for one in events.Scalars(tag)}
    assert kept == pytest.approx(written(tmp_path / "run"), rel=1e-6)
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_mlflow(tiny: TinyRun, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    train(tiny.config(tmp_path / "run", report_to=("mlflow",)))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run' / 'logs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("backhand")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    kept = {
        (name, one.step): one.value
        for name in run.data.metrics
        for one in client.get_metric_history(run.info.run_id, name)
    }
    assert kept == pytest.approx(written(tmp_path / "run"), rel=1e-12)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["optimization.learning_rate"] == "0.003"


@pytest.mark.filterwarnings("ignore")
def test_trackio(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny.config(tmp_path / "run", report_to=("trackio",)))
    from trackio.sqlite_storage import SQLiteStorage

    records = SQLiteStorage.get_logs("backhand", "run")
    kept = {
        (name, record["step"]): value
        for record in records
        for name, value in record.items()
        if name not in ("step", "timestamp") and not name.startswith("summary/")
    }
    assert kept == pytest.approx(written(tmp_path / "run"), rel=1e-12)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "run", report_to=("wandb",)))
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # `finish` comes back before wandb's own process has written the last of the file

    (file,) = (tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    kept: Kept = {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        kept |= {(name, row["_step"]): value for name, value in row.items() if not name.startswith("_")}
    assert kept == pytest.approx(written(tmp_path / "run"), rel=1e-12)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    place, parts, block = 7, b"", 32768
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_the_command_line_knows_every_logger() -> None:
    assert set(choice._LOGGERS) == set(get_args(Logger))


def test_a_logger_that_is_not_installed_is_named_before_anything_is_written(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "wandb" else importlib.util.find_spec(name))
    with pytest.raises(UsageError, match="wandb is not installed") as caught:
        train(tiny.config(tmp_path / "run", report_to=("wandb",)))
    assert "backhand[wandb]" in str(caught.value.next_step) and not (tmp_path / "run").exists()


def test_no_logger_is_imported_unless_asked_for(tiny: TinyRun, tmp_path: Path) -> None:
    heavy = "wandb", "mlflow", "trackio", "tensorboard", "jinja2"
    code = f"import sys, backhand.report.train; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class _Failing:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, start: RunStart) -> None:
        self.calls.append("begin")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.calls.append(f"log {step}")
        if step == 2:
            raise ConnectionError("no route")

    def end(self, summary: Mapping[str, Any]) -> None:
        self.calls.append("end")


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(tiny: TinyRun, tmp_path: Path) -> None:
    failing, notes = _Failing(), []
    observer = LoggerObserver("mine", failing, notes.append)
    summary = train(tiny.config(tmp_path / "run", eval_data=()), callbacks=[observer])
    assert summary.steps == 6 and failing.calls == ["begin", "log 1", "log 2"]
    assert notes == ["mine failed and is left out from here on: ConnectionError: no route"]


def test_a_logger_learns_how_the_run_ended(tiny: TinyRun, tmp_path: Path) -> None:
    ends: list[Mapping[str, Any]] = []

    class Kept(_Failing):
        def log(self, values: Mapping[str, float], step: int) -> None:
            pass

        def end(self, summary: Mapping[str, Any]) -> None:
            ends.append(summary)

    train(tiny.config(tmp_path / "run", max_steps=1), callbacks=[LoggerObserver("mine", Kept(), print)])
    stop = [LoggerObserver("mine", Kept(), print), lambda record: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        train(tiny.config(tmp_path / "other", max_steps=1), callbacks=stop)
    assert [bool(summary) for summary in ends] == [True, False] and ends[0]["steps"] == 1


def test_figures_that_are_not_finite_numbers_are_left_out() -> None:
    record = {"step": 1, "loss": None, "a": float("nan"), "b": float("inf"), "c": 2, "d": "x", "e": 0.5}
    assert figures(record) == {"c": 2, "e": 0.5}


def test_callbacks_are_functions_or_observers(tiny: TinyRun, tmp_path: Path) -> None:
    import backhand

    records: list[Mapping[str, Any]] = []
    starts: list[RunStart] = []

    class Mine(Observer):
        def started(self, start: RunStart) -> None:
            starts.append(start)

    backhand.train(tiny.config(tmp_path / "run", max_steps=2), callbacks=[records.append, Mine()])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = lines[-2]["loss"]
    assert records == [*lines[1:-1], {"loss": loss, **lines[-1]}] and lines[0]["step"] == 0
    assert starts[0].directory == tmp_path / "run" and starts[0].config["optimization.max_steps"] == 2
