"""A whole run: the files that it writes, and that it learns."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import backhand
from backhand.adapters.contents import read_adapter_directory
from backhand.engines.machine import MemoryKeeper
from backhand.errors import CheckError, DataError, ResourceError, UsageError
from backhand.loop.forgetting import Forgetting, ForgettingMeter
from backhand.loop.observers import Observer
from backhand.loop.state import RunState
from backhand.options.config_file import load_config
from backhand.training.console import closing_lines
from backhand.training.identity import settings_digest
from backhand.training.run import train
from tests.support.no_autograd import autograd_raises
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_disk_without_room_for_a_checkpoint_is_reported_before_the_first_step(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = train(tiny.config(tmp_path / "old", max_steps=2))
    needed = 16 * summary.trained_parameters + 4
    files = [path.stat().st_size for path in (tmp_path / "old/checkpoints/step-2").iterdir()]
    assert needed <= sum(files) <= needed + 60_000
    monkeypatch.setattr("backhand.loop.state.free_bytes", lambda _: needed - 1)
    reported: list[object] = []
    with pytest.raises(ResourceError, match=f"takes {needed:,} bytes, and {needed - 1:,} are free"):
        train(tiny.config(tmp_path / "run"), callbacks=[reported.append])
    assert not reported and not (tmp_path / "run/checkpoints").exists()
    before = (tmp_path / "old/adapter/adapter_model.safetensors").read_bytes()
    with pytest.raises(ResourceError):
        train(tiny.config(tmp_path / "old", max_steps=2, overwrite=True))
    assert (tmp_path / "old/adapter/adapter_model.safetensors").read_bytes() == before
    assert train(tiny.config(tmp_path / "old", max_steps=2, resume=True)).steps == 2  # finished: nothing is to be saved


def test_a_checkpoint_with_an_average_needs_more_room(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = train(tiny.config(tmp_path / "old", max_steps=1, average_share=0.5))
    needed = 20 * summary.trained_parameters + 5
    assert needed <= sum(path.stat().st_size for path in (tmp_path / "old/checkpoints/step-1").iterdir())
    monkeypatch.setattr("backhand.loop.state.free_bytes", lambda _: needed - 1)
    with pytest.raises(ResourceError, match=f"takes {needed:,} bytes"):
        train(tiny.config(tmp_path / "run", average_share=0.5))


def test_the_files_of_a_run(tiny: TinyRun, tmp_path: Path) -> None:
    with autograd_raises():
        summary = train(tiny.config(tmp_path / "run", epochs=6, engine="backhand", eval_every=None))
    run = tmp_path / "run"
    steps = [line for line in metrics(run) if "loss" in line]
    evaluations = [line for line in metrics(run) if "eval_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 19))
    assert set(steps[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s",
        "rss_bytes", "time_s",
    }  # fmt: skip
    assert [line["step"] for line in evaluations] == [0, 4, 8, 12, 16, 18]
    stored = json.loads((run / "summary.json").read_text())
    assert {
        "train_s", "steps", "tokens", "supervised_tokens", "tokens_per_s", "peak_rss_bytes", "first_loss", "last_loss",
        "base_eval_loss", "best_eval_loss", "engine", "dtype",
    } <= set(stored)  # fmt: skip
    assert summary.best_eval_loss is not None and summary.base_eval_loss is not None
    assert stored["best_eval_loss"] == min(line["eval_loss"] for line in evaluations[1:]) < summary.base_eval_loss
    assert stored["tokens"] == sum(line["tokens"] for line in steps)
    assert sorted(path.name for path in (run / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "backhand.json",
    ]  # fmt: skip
    latest = (run / "checkpoints" / "latest").read_text().strip()
    assert latest == "step-18" and (run / "checkpoints" / latest).is_dir()
    proofs = [json.loads(line) for line in (run / "proofs.jsonl").read_text().splitlines()]
    assert all(proof["passed"] for proof in proofs) and len(proofs) == 5
    assert set(proofs[0]) == {"proof", "passed", "value", "bound", "command", "kind", "detail", "time"}
    assert not list(run.glob("**/.tmp*"))


def test_the_stored_configuration_leaves_nothing_to_choose(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "run", eval_every=None))
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert stored["model"]["engine"] == "backhand" and stored["model"]["recompute"] == "none"
    assert stored["model"]["device"] == "cpu" and stored["optimization"]["micro_batch_rows"] == 4
    assert stored["optimization"]["warmup_steps"] == 1 and stored["run"]["eval_every"] == 2
    assert load_config(tmp_path / "run" / "config.toml").validate()


def test_the_adapter_is_the_one_with_the_best_held_out_loss(tiny: TinyRun, tmp_path: Path) -> None:
    # A rate at which the second step makes the loss worse again.
    summary = train(tiny.config(tmp_path / "run", max_steps=2, learning_rate=0.3, eval_every=1, schedule="constant"))
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line}
    assert losses[2] > losses[1] == summary.best_eval_loss and summary.best_step == 1
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    for name in ("adapter_model.safetensors", "backhand.json"):
        assert (tmp_path / "run" / "adapter" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_early_stopping(tiny: TinyRun, tmp_path: Path) -> None:
    summary = train(
        tiny.config(tmp_path / "run", epochs=30, learning_rate=0.3, eval_every=1, schedule="constant", early_stopping=2)
    )
    assert summary.best_step is not None
    assert summary.steps == summary.best_step + 2
    assert summary.stopped_because == "no better held-out loss in 2 evaluations"


def test_the_adapter_tells_which_options_made_it(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "run", max_steps=1, learning_rate=2e-4))
    record = read_adapter_directory(tmp_path / "run" / "adapter").record
    assert record is not None
    assert record.config["optimization.learning_rate"] == 2e-4 and record.config["adapter.rank"] == 3
    assert "run.output" not in record.config  # where things lie decides nothing
    assert settings_digest(record.config) == record.run_digest


def test_max_steps_and_no_held_out_rows(tiny: TinyRun, tmp_path: Path) -> None:
    summary = train(tiny.config(tmp_path / "run", max_steps=7, eval_data=()))
    assert summary.steps == 7
    assert summary.base_eval_loss is None and summary.best_eval_loss is None
    assert not any("eval_loss" in line for line in metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_the_package_itself_is_the_command(tiny: TinyRun, tmp_path: Path) -> None:
    assert backhand.train(tiny.config(tmp_path / "run", max_steps=1)).steps == 1


def test_continuing_from_an_adapter(tiny: TinyRun, tmp_path: Path) -> None:
    first = train(tiny.config(tmp_path / "first", epochs=6, rank=2, rank_pattern={"q_proj": 5}))
    second = train(
        tiny.config(tmp_path / "second", from_adapter=str(tmp_path / "first" / "adapter"), rank=2, learning_rate=1e-9)
    )
    assert second.trained_parameters == first.trained_parameters
    assert second.base_eval_loss == pytest.approx(first.base_eval_loss)
    assert second.best_eval_loss == pytest.approx(first.best_eval_loss, rel=1e-4)
    assert load_config(tmp_path / "second" / "config.toml").adapter.rank_pattern["q_proj"] == 5
    before = [next(line for line in metrics(tmp_path / run) if "eval_loss" in line) for run in ("first", "second")]
    assert before[0]["forgetting_kl_nats"] == 0 < before[1]["forgetting_kl_nats"]


def test_the_answers_of_a_run_from_an_adapter_are_compared_with_its(tiny: TinyRun, tmp_path: Path) -> None:
    """The loss before the run was that of the adapter, the exact match and the forgetting those since the base."""
    learnt = {"eval_data": (str(tiny.rows),), "epochs": 60, "learning_rate": 1e-2, "answers": 1, "eval_every": 180}
    first = train(tiny.config(tmp_path / "first", **learnt))
    assert first.base_exact_match == 0 < (first.adapted_exact_match or 0) and not first.compared_with_start
    again = {"from_adapter": str(tmp_path / "first" / "adapter"), "max_steps": 1, "learning_rate": 1e-9}
    second = train(tiny.config(tmp_path / "second", **learnt | again))
    assert second.base_exact_match == first.adapted_exact_match and second.compared_with_start
    assert abs(second.forgotten_nats or 1) < 1e-3 < abs(first.forgotten_nats or 0)
    (line,) = [one for one in closing_lines(second) if one.startswith("Exactly right answers")]
    assert "points from the adapter it started from (95 % interval" in line


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_an_adapter_of_another_base_is_refused_unless_forced(
    engine: str, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.config(tmp_path / "first", max_steps=1))
    other = save_tiny(tiny_model("llama-tied", num_hidden_layers=2, seed=9), tmp_path / "other")
    options = {
        "model": str(other),
        "from_adapter": str(tmp_path / "first" / "adapter"),
        "max_steps": 1,
        "engine": engine,
    }
    with pytest.raises(backhand.BackhandError) as caught:
        train(tiny.config(tmp_path / "second", **options))
    assert caught.value.exit_code == 4 and "base model" in str(caught.value)
    train(tiny.config(tmp_path / "second", force_base=True, quiet=False, **options))
    assert "WARNING: used by force: base model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ("q_porj",)}, UsageError, "q_proj"),
        ({"data": ()}, UsageError, "no data"),
        ({"data": ("absent.jsonl",)}, DataError, "absent.jsonl"),
        ({"device": "abacus"}, UsageError, "abacus"),
        ({"prove_resume": 99}, UsageError, "99"),
    ],
)
def test_a_mistake_leaves_no_files(
    options: dict[str, Any], error: type[Exception], message: str, tiny: TinyRun, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(tiny.config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_overwriting_keeps_the_old_run_until_the_new_one_begins(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "run", max_steps=2))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        train(tiny.config(tmp_path / "run", max_steps=1))
    with pytest.raises(DataError):
        train(tiny.config(tmp_path / "run", max_steps=1, overwrite=True, data=("absent.jsonl",)))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    train(tiny.config(tmp_path / "run", max_steps=1, overwrite=True))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_observers_receive_every_event(tiny: TinyRun, tmp_path: Path) -> None:
    reported: list[str] = []

    class Listening(Observer):
        def started(self, start: Any) -> None:
            reported.append(f"started {start.total_steps}")

        def stepped(self, record: Any) -> None:
            reported.append(f"stepped {record['step']}")

        def evaluated(self, record: Any) -> None:
            reported.append(f"evaluated {record['step']}")

        def ended(self, summary: Any) -> None:
            reported.append(f"ended {summary.steps}")

        def closed(self) -> None:
            reported.append("closed")

    train(tiny.config(tmp_path / "run", max_steps=2, eval_every=2), callbacks=[Listening()])
    assert reported == ["started 2", "evaluated 0", "stepped 1", "stepped 2", "evaluated 2", "ended 2", "closed"]


def test_forgetting_beyond_the_limit_stops_with_the_adapter_before(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rises = iter([0.02, 0.05, 0.06])  # an adapter that changes nothing yet is not measured
    monkeypatch.setattr(ForgettingMeter, "measure", lambda *_: Forgetting(next(rises), 0.1))
    with pytest.raises(CheckError, match=r"risen by 0\.060 nats per token, above the limit of 0\.05") as stopped:
        train(tiny.config(tmp_path / "run", eval_every=1, max_forgetting=0.05))
    assert "counts from the base model, also in a run from an adapter" in str(stopped.value)
    evaluations = [line for line in metrics(tmp_path / "run") if "forgetting_nats" in line]
    assert [line["forgetting_nats"] for line in evaluations] == [0.0, 0.02, 0.05, 0.06]
    before = tmp_path / "run" / "checkpoints" / "step-2" / "adapter_model.safetensors"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before.read_bytes()


def test_a_start_adapter_above_the_limit_of_forgetting_is_named(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny.config(tmp_path / "first", max_steps=1))
    monkeypatch.setattr(ForgettingMeter, "measure", lambda *_: Forgetting(0.6, 0.1))
    start = str(tmp_path / "first" / "adapter")
    with pytest.raises(CheckError, match=r"risen by 0\.600") as stopped:
        train(tiny.config(tmp_path / "second", from_adapter=start, max_forgetting=0.5))
    assert "start from another adapter: this one is above the limit already" in str(stopped.value)


def test_threads_and_precision_are_put_back(tiny: TinyRun, tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    train(tiny.config(tmp_path / "run", max_steps=1))
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_freed_memory_is_given_back_before_the_run_and_around_each_checkpoint(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    contents = RunState.contents

    def noted(state: RunState, *arguments: Any) -> dict[str, bytes]:
        happened.append("buffers")
        return contents(state, *arguments)

    monkeypatch.setattr(RunState, "contents", noted)
    monkeypatch.setattr(MemoryKeeper, "make_room", lambda _: happened.append("room"))
    train(tiny.config(tmp_path / "run", max_steps=3, save_every=1))
    assert happened == ["room"] + 3 * ["room", "buffers", "room"]
    happened.clear()
    train(tiny.config(tmp_path / "other", max_steps=1, tune_allocator=False))
    assert happened == ["buffers"], "an allocator that is left alone keeps nothing"


def test_the_best_checkpoint_is_never_pruned(tiny: TinyRun, tmp_path: Path) -> None:
    options = {"learning_rate": 0.3, "schedule": "constant", "eval_every": 1, "save_every": 1}
    summary = train(tiny.config(tmp_path / "run", epochs=9, early_stopping=3, keep=1, **options))
    best, last = summary.best_step, summary.steps
    assert best == last - 3
    left = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert left == {f"step-{best}", f"step-{last}"}
    saved = tmp_path / "run" / "checkpoints" / f"step-{best}" / "adapter_model.safetensors"
    assert saved.read_bytes() == (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
