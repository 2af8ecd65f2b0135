"""Ctrl-C and SIGTERM at every place of a run, once and twice; and two processes on one run directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from backhand.errors import UsageError
from backhand.loop.observers import Observer
from backhand.options.config import TrainConfig
from backhand.options.config_file import dump_config
from backhand.runs.checkpoint import CheckpointStore, load_checkpoint
from backhand.runs.directory import RunDirectory
from backhand.runs.interruption import Interrupted
from backhand.runs.status import read_status
from backhand.training.run import train
from backhand.training.trainer import Trainer
from tests.support.fault_table import documented
from tests.support.faulty_runs import temporary
from tests.support.held_runs import PLACES, held_train
from tests.support.processes import start
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options

CASES = [
    (place, times, number)
    for place in PLACES
    for times in (1, 2)
    for number in (signal.SIGINT, signal.SIGTERM)
    if (place, times) != ("load", 2)  # there is nothing to save yet: the first one stops it
]
NAMES = [f"{place}-{('once', 'twice')[times - 1]}-{number.name}" for place, times, number in CASES]
# The checkpoint that is left: a step that is under way is finished and saved, a save is finished, after one signal.
LEFT_AFTER = {"load": (None, None), "step": (3, 2), "save": (2, 1), "publish": (2, 2), "evaluation": (2, 1)}


@dataclass
class Held:
    """A run that waits at a place."""

    process: BaseProcess
    connection: Connection

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def reported(self) -> str:
        """What the run says next."""
        assert self.connection.poll(600), "the run says nothing"
        return str(self.connection.recv())

    def let_go(self) -> None:
        self.connection.send("go")

    def exit_code(self) -> int | None:
        self.process.join()
        return self.process.exitcode


@contextmanager
def held(config: TrainConfig, place: str) -> Iterator[Held]:
    """A real process that runs the command, and waits at the place."""
    toml = config.run.output.with_suffix(".toml")
    toml.write_text(dump_config(config))
    ours, theirs = multiprocessing.Pipe()
    process = start(held_train, [str(toml)], place, theirs)
    theirs.close()  # so that a run that ends without coming to the place is noticed
    try:
        waiting = Held(process, ours)
        assert waiting.reported() == "here"
        yield waiting
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    output = tmp_path_factory.mktemp("straight") / "run"
    config = tiny.config(output, max_steps=4, save_every=1, eval_every=2, dropout=0.2, micro_batch_rows=2)
    train(with_options(config, quiet=True))
    return config


def continued(output: Path) -> dict[str, bytes]:
    train(with_options(TrainConfig(), output=output, resume=True, quiet=True))
    return final_bits(output)


# At each place one signal once and the other twice; the other way round in `make test-slow`.
QUICK = [(PLACES.index(place) + times) % 2 == (number == signal.SIGINT) for place, times, number in CASES]


@pytest.mark.parametrize(
    ("place", "times", "number"),
    [
        pytest.param(*case, id=name, marks=() if quick else pytest.mark.slow)
        for case, name, quick in zip(CASES, NAMES, QUICK, strict=True)
    ],
)
def test_signals(place: str, times: int, number: signal.Signals, straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with held(with_options(straight, output=output), place) as run:
        run.send(number)
        if place != "load":
            assert run.reported().startswith("stopping after this step and saving")
            if times == 2:
                run.send(number)
                after = f"after the checkpoint of step {LEFT_AFTER[place][1]}: continue"
                assert run.reported() == f"stopped at once, {after} with backhand train --resume --output {output}"
            else:
                run.let_go()
        assert run.exit_code() == 128 + number
    step = LEFT_AFTER[place][times - 1]
    if step is None:
        assert not output.exists()
        return
    assert load_checkpoint(output / "checkpoints" / f"step-{step}", step).step == step
    newest = max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
    assert newest == step and (output / "adapter" / "adapter_model.safetensors").exists()
    assert not temporary(output)
    assert continued(output) == final_bits(straight.run.output)


@pytest.mark.parametrize("replacing", [False, True])
def test_stopped_at_once_before_the_first_checkpoint(replacing: bool, straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    if replacing:
        train(with_options(straight, output=output))
    config = with_options(straight, output=output, save_every=4, eval_every=4, overwrite=replacing)
    with held(config, "step") as run:
        run.send(signal.SIGTERM)
        assert run.reported().startswith("stopping after this step")
        run.send(signal.SIGTERM)
        back = "; the previous run has been restored"
        again = f": start with backhand train --resume --output {output}"
        assert run.reported() == f"stopped at once, before the first checkpoint{back if replacing else again}"
        assert run.exit_code() == 143
    if replacing:
        assert final_bits(output) == final_bits(straight.run.output)
    else:
        assert not (output / "adapter").exists()
        assert continued(output)["state"]


def test_a_run_that_has_not_started_does_not_report_the_existing_one(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path / "run", max_steps=1)
    train(config)
    monkeypatch.setattr(Trainer, "_prepare", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(with_options(config, overwrite=True, quiet=False))
    assert "stopped at once" not in capsys.readouterr().err


def test_what_goes_wrong_in_telling_what_is_left_hides_no_signal(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> list[int]:
        raise PermissionError

    monkeypatch.setattr(Trainer, "_run_loop", _interrupt)
    monkeypatch.setattr(CheckpointStore, "steps", unreadable)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.config(tmp_path / "run"))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_page_counts_the_signals() -> None:
    assert documented("Ctrl-C or SIGTERM, once or twice: while loading, in a step, a save, an evaluation") == len(CASES)


def test_a_second_process_is_refused_and_a_stale_lock_taken_over(straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with held(with_options(straight, output=output), "step") as run:
        refused = [{"resume": True}, {"overwrite": True}]
        for options in refused:
            with pytest.raises(UsageError, match=f"process {run.process.pid} holds its lock"):
                train(with_options(straight, output=output, **options))
        run.send(signal.SIGKILL)
        assert run.exit_code() == -signal.SIGKILL
    assert continued(output) == final_bits(straight.run.output)
    assert documented("a second process on the run directory") == len(refused) + 1


def test_a_second_process_is_refused_while_the_first_is_loading(straight: TrainConfig, tmp_path: Path) -> None:
    config = with_options(straight, output=tmp_path / "run")
    with held(config, "load") as run:
        with pytest.raises(UsageError, match="another process is writing"):
            train(config)
        run.let_go()
        assert run.exit_code() == 0
    with pytest.raises(UsageError, match="already contains a run"):
        train(config)
    assert final_bits(tmp_path / "run") == final_bits(straight.run.output)


def test_interrupting_a_proof_of_resuming_proves_nothing(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backhand.runs.interruption import Interrupted
    from backhand.training import trainer

    said: list[str] = []
    original = trainer.prove_resume

    def interrupted(*arguments: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr("backhand.training.console.TerminalObserver.noted", lambda _self, text: said.append(text))
    monkeypatch.setattr(trainer, "prove_resume", interrupted)
    with pytest.raises(Interrupted, match=r"the run is finished but not yet proved: .* --prove-resume 2$") as caught:
        train(tiny.config(tmp_path / "run", prove_resume=2))
    assert caught.value.exit_code == 143 and not any("same bits" in text for text in said)
    monkeypatch.undo()
    again = with_options(TrainConfig(), output=tmp_path / "run", resume=True, prove_resume=2, quiet=True)
    assert train(again).steps == 6
    assert "end in the same bits" in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()[-1]


def test_a_signal_after_the_last_step_ends_the_program_after_the_run(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished, and what the program does after it does not begin."""
    from backhand.training import trainer

    original = trainer.summarise

    def terminated(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(trainer, "summarise", terminated)
    config = tiny.config(tmp_path / "run", max_steps=2)
    with pytest.raises(SystemExit) as ended:
        train(config)
    status = read_status(config.run.output)
    assert ended.value.code == 143 and status is not None and status.state == "finished"
    assert (config.run.output / "adapter").is_dir()


@pytest.mark.parametrize("place", ["free_answers", "measured_answers"])
def test_answers_that_a_signal_prevented_are_measured_by_resuming(
    place: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backhand.objectives.kinds import answer_training

    original = getattr(answer_training, place)

    def terminated(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **named)

    config = tiny.config(tmp_path / "run", max_steps=2, answers=2)
    monkeypatch.setattr(answer_training, place, terminated)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    monkeypatch.undo()
    assert stopped.value.exit_code == 143 and "are not measured yet: continue with" in str(stopped.value)
    steps = (config.run.output / "metrics.jsonl").read_bytes()
    resumed = with_options(TrainConfig(), output=config.run.output, resume=True, quiet=True)
    summary = train(resumed)
    assert summary.adapted_exact_match is not None and not summary.unmeasured
    assert (config.run.output / "answers.jsonl").is_file()
    assert (config.run.output / "metrics.jsonl").read_bytes() == steps
    assert train(resumed) == summary


class _Terminates(Observer):
    """Sends SIGTERM after a step, before that step's evaluation."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, record: Any) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [0, 2])
def test_an_evaluation_that_is_made_again_is_recorded_once(
    step: int, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM before an evaluation, resumed, stopped between that and the next checkpoint, and resumed."""
    config = tiny.config(tmp_path / "run", eval_every=2, save_every=6)
    make, callbacks = RunDirectory.make_checkpoints, [_Terminates(step)]

    def make_and_stop(directory: RunDirectory) -> None:
        make(directory)
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "make_checkpoints", make_and_stop)
        with pytest.raises(Interrupted):
            train(config, callbacks=callbacks)
    assert [path.name for path in config.run.output.glob("checkpoints/step-*")] == [f"step-{step}"]
    resumed = with_options(TrainConfig(), output=config.run.output, resume=True, quiet=True)

    def killed(*_: object) -> None:
        raise StopAfter.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", killed)
        with pytest.raises(StopAfter.Stopped):
            train(resumed, callbacks=[StopAfter(1)])
    train(resumed)
    lines = [json.loads(line) for line in (config.run.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" not in line] == [0, 2, 4, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
