"""A terminal that interrupts or goes away, a reader that leaves, a clock that is set back, a locale with a comma."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from backhand.options.config import TrainConfig
from backhand.options.config_file import dump_config
from backhand.runs.checkpoint import load_checkpoint
from backhand.training.run import train
from tests.hostile.conftest import World
from tests.support.held_runs import PLACES, held_train
from tests.support.limited import limited
from tests.support.processes import start
from tests.support.tiny_run import TinyRun, final_bits, with_options


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


def on_terminal(name: str, words: list[str], place: str, connection: Connection, nohup: bool) -> None:
    """In a process of its own, with this terminal as its own: what `held_train` does.

    Whether it hears of the terminal's end does not depend on how the tests were started: `nohup make test`.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    held_train(words, place, connection)


class Terminal:
    """A pseudo-terminal with a run on it that waits at a place."""

    def __init__(self, tiny: TinyRun, output: Path, place: str, *, nohup: bool = False) -> None:
        config = tiny.config(output, max_steps=4, save_every=1, eval_every=2, micro_batch_rows=2, quiet=False)
        toml = output.with_suffix(".toml")
        toml.write_text(dump_config(config))
        self.master, slave = os.openpty()
        self.connection, theirs = multiprocessing.Pipe()
        self.process = start(on_terminal, os.ttyname(slave), [str(toml)], place, theirs, nohup)
        os.close(slave)
        theirs.close()  # so that a run that ends without coming to the place is noticed
        self.shown = b""
        threading.Thread(target=self._read, daemon=True).start()
        assert self.connection.poll(600) and self.connection.recv() == "here"

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 4096):
                self.shown += data
        except OSError:
            pass  # the other side is gone, or this one

    def press_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def end(self) -> int | None:
        self.process.join(240)
        code = self.process.exitcode
        self.process.kill()
        return code


@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_on_a_terminal(place: str, tiny: TinyRun, tmp_path: Path) -> None:
    terminal = Terminal(tiny, tmp_path / "run", place)
    terminal.press_ctrl_c()
    if place != "load":
        assert terminal.connection.poll(240) and "stopping after this step" in terminal.connection.recv()
        terminal.connection.send("go")
    assert terminal.end() == 130
    os.close(terminal.master)
    if place == "load":
        assert not (tmp_path / "run").exists()
        return
    train(with_options(TrainConfig(), resume=True, quiet=True, output=tmp_path / "run"))
    straight = tiny.config(tmp_path / "straight", max_steps=4, save_every=1, eval_every=2, micro_batch_rows=2)
    train(straight)
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


@pytest.mark.parametrize("place", ["step", "save"])
def test_a_terminal_that_is_closed(place: str, tiny: TinyRun, tmp_path: Path) -> None:
    terminal = Terminal(tiny, tmp_path / "run", place)
    os.close(terminal.master)  # SIGHUP, and every write fails from now on
    time.sleep(0.2)
    terminal.connection.send("go")
    assert terminal.end() == 128 + signal.SIGHUP
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps and load_checkpoint(steps[-1], int(steps[-1].name.removeprefix("step-")))


def test_a_run_under_nohup_outlives_its_terminal(tiny: TinyRun, tmp_path: Path) -> None:
    terminal = Terminal(tiny, tmp_path / "run", "step", nohup=True)
    os.close(terminal.master)
    time.sleep(0.2)
    terminal.connection.send("go")
    assert terminal.end() == 0
    straight = tiny.config(tmp_path / "straight", max_steps=4, save_every=1, eval_every=2, micro_batch_rows=2)
    train(straight)
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def without_a_reader(words: list[str], place: str) -> None:
    """In a process of its own: standard output and error lead to a pipe that nobody reads."""
    os.chdir(place)
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    from backhand.cli.main import main

    os._exit(main(words))


def test_a_reader_that_leaves_ends_no_training(world: World, tmp_path: Path) -> None:
    words = [str(word) for word in world.train("run") if word != "--quiet"]
    process = start(without_a_reader, words, str(tmp_path))
    process.join(240)
    assert process.exitcode in (0, 141)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_clock_that_is_set_back(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = tiny.config(tmp_path / "straight", max_steps=3, save_every=1)
    train(straight)
    now = 1.0e9

    def back() -> float:
        nonlocal now
        now -= 3600.0
        return now

    monkeypatch.setattr(time, "time", back)
    train(with_options(straight, output=tmp_path / "run", max_steps=3))
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        os.utime(path, (4e9, 4e9))
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")
    train(with_options(straight, output=tmp_path / "run", resume=True))


def test_a_locale_with_a_comma(world: World, tmp_path: Path) -> None:
    assert limited(world.train("run"), tmp_path).code == 0
    place = {**os.environ, "LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = (
        "import locale, sys\n"
        "for name in ('de_DE.UTF-8', 'de_DE', 'fr_FR.UTF-8', 'C'):\n"
        "    try: locale.setlocale(locale.LC_ALL, name); break\n"
        "    except locale.Error: pass\n"
        "from backhand.cli.main import main\n"
        "sys.exit(main(['report', 'run', '--output', 'page.html']) or main(['inspect', 'run/adapter', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout[done.stdout.index("{") :])
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "learning_rate = " in config and "0,0" not in config
