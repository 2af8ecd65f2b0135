"""The state of a run that was ended from outside, and the notes of commands that use its adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from backhand import export, generate
from backhand import train as train_rows
from backhand.cli.main import main
from backhand.files import FileLayer
from backhand.options.config import TrainConfig
from backhand.report.headline import headline
from backhand.report.run_record import read_run
from backhand.runs.directory import opened
from backhand.runs.interruption import Interrupted
from backhand.runs.status import RunStatus, read_status, resume_command, status_kept
from backhand.training.run import train
from tests.support.tiny_run import StopAfter, TinyRun, with_options


def status_after(error: BaseException, place: Path) -> RunStatus:
    with (
        opened(place, resume=False, overwrite=False) as directory,
        pytest.raises(type(error)),
        status_kept(directory, 3, lambda: 1),
    ):
        raise error
    status = read_status(place)
    assert status is not None
    return status


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_second_signal_is_reported_in_a_sentence(error: BaseException, tmp_path: Path) -> None:
    status = status_after(error, tmp_path / "run")
    assert status.state == "interrupted"
    assert status.reason == "stopped at once by a signal; steps after the last checkpoint are lost"


def test_a_program_that_leaves_is_no_signal(tmp_path: Path) -> None:
    status = status_after(SystemExit("enough"), tmp_path / "run")
    assert (status.state, status.reason) == ("failed", "enough")


class _Interrupt(StopAfter):
    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_adapter_of_a_stopped_run_is_used_with_a_note(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generate, evaluate and export used it as if the run had taken all its steps."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted):
        train(tiny.config(Path("runs/x"), eval_every=3, save_every=6), callbacks=[_Interrupt(4)])
    said = "runs/x stopped after step 4 of 6, and this adapter is that of step 3"
    note = f"note: {said}; continue with backhand train --resume --output runs/x\n"
    prompt = ["--prompt", "the user", "--max-new-tokens", "1"]
    asked = ["generate", "--adapter", "runs/x/adapter", *prompt]
    capsys.readouterr()
    for words in (asked, ["evaluate", "--adapter", "runs/x", "--data", str(tiny.held_out)]):
        assert main(words) == 0
        assert capsys.readouterr().err.count(note) == 1
    assert main(["export", "--adapter", "runs/x/adapter", "--to", "peft", "--output", "peft"]) == 0
    assert note in capsys.readouterr().out
    assert "| steps | 3 of 6 |" in Path("runs/x/adapter/README.md").read_text()
    assert "| training | the run stopped after step 4 of 6, and this" in Path("peft/README.md").read_text()
    generate("the user", adapter="runs/x", max_new_tokens=1)
    call = 'continue with backhand.train(resume=True, output="runs/x")'
    assert f"note: {said}; {call}\n" in capsys.readouterr().err
    assert main([*asked[:2], "runs/x/checkpoints/step-4", *prompt]) == 0
    assert "this adapter is that of step 4;" in capsys.readouterr().err
    _status(state="running", process=os.getpid(), process_start=None)
    assert main(asked) == 0
    assert "note: runs/x has not ended yet, and this adapter is that of step 3 of 6\n" in capsys.readouterr().err
    _status(process=2**22 + 1)
    assert main(asked) == 0
    assert "runs/x was killed, and this adapter is that of step 3 of 6; continue" in capsys.readouterr().err
    shutil.copytree("runs/x/adapter", "copied")
    assert main([*asked[:2], "copied", *prompt]) == main([*asked[:2], "peft", *prompt]) == 0
    assert "runs/x" not in capsys.readouterr().err
    train(with_options(TrainConfig(), output=Path("runs/x"), resume=True, quiet=True))
    capsys.readouterr()
    export("runs/x", to="peft", output="whole")
    assert main(asked) == 0
    assert "runs/x" not in capsys.readouterr().err and "stopped" not in Path("whole/README.md").read_text()


def test_a_program_continues_a_run_on_its_own_rows(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in tiny.rows.read_text().splitlines()]
    with pytest.raises(Interrupted):
        train_rows(tiny.config(tmp_path / "run", eval_data=()), data=rows, callbacks=[_Interrupt(2)])
    generate("the user", adapter=tmp_path / "run", max_new_tokens=1)
    again = f"backhand.train(data=rows, output={str(tmp_path / 'run')!r}, resume=True)"
    assert f"this adapter is that of step 2; continue with {again}\n" in capsys.readouterr().err
    proof = resume_command("x", in_memory=True, prove_resume=2)
    assert proof == "backhand.train(data=rows, output='x', resume=True, prove_resume=2)"


def _status(**changed: object) -> None:
    status = Path("runs/x/status.json")
    status.write_text(json.dumps(json.loads(status.read_text()) | changed))


class _Watching(FileLayer):
    """A file layer that reads the run each time a line of it is written, as a page does."""

    seen: list[str]

    def open_to_append(self, path: Path) -> int:
        self.seen.append(headline(read_run(path.parent)))
        return super().open_to_append(path)


def test_a_run_that_is_being_prepared_is_not_called_killed(tiny: TinyRun, tmp_path: Path) -> None:
    """The headline said so until the first step, and that nothing was held out."""
    files = _Watching()
    files.seen = []
    train(tiny.config(tmp_path / "run"), files=files)
    assert "is being trained, 0 of 6 steps so far" in files.seen[0] and "nothing was held out" not in files.seen[0]
