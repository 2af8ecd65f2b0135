"""One save of a real run, once for every call of the file layer that goes wrong in it: killed there, or failing there.

The run comes to the save once. Before the first call of the save its process forks for each call in turn; the child
goes through the save until the fault; what it leaves is moved aside, and the directory put back for the next child.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backhand.loop.state import Saver
from backhand.options.config import TrainConfig
from backhand.runs.directory import STATUS
from backhand.training.run import train
from tests.support.faulty_files import InterceptedFiles, half_written
from tests.support.tiny_run import with_options


@contextmanager
def observed_saves(reported: Callable[[str, int], None]) -> Iterator[None]:
    """Inside, `reported("begin" or "end", step)` at each save of a run."""
    original = Saver.save

    def save(self: Saver, *, is_best: bool) -> None:
        step = self.state.progress.step
        reported("begin", step)
        original(self, is_best=is_best)
        reported("end", step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save)
        yield


def calls_of_save(config: TrainConfig, output: Path, step: int) -> range:
    """The numbers of the calls that the save of this step makes, in a run of this configuration."""
    files = InterceptedFiles()
    numbers: dict[tuple[str, int], int] = {}
    with observed_saves(lambda what, which: numbers.setdefault((what, which), files.count)):
        train(with_options(config, output=output), files=files)
    return range(numbers["begin", step] + 1, numbers["end", step] + 1)


def leave_faulty_saves(config: TrainConfig, calls: range, error: int | None, store: Path) -> None:
    """In a process of its own: leave `store/N`, the run directory after the fault at call N, for all calls of a save.

    Args:
        config: of the run; its output is used and left empty.
        calls: from `calls_of_save`.
        error: the errno that the call fails with; None for SIGKILL.
        store: an empty directory.
    """
    output, files = config.run.output, InterceptedFiles()
    fault = 0

    def before(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal fault
        if count == calls.start and not fault:
            fault = _forked_for_each(calls, error, output, store)
            if not fault:
                os._exit(0)
        if count == fault:
            half_written(name, arguments)
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(error, os.strerror(error))

    files.before = before
    try:
        train(config, files=files)
    except Exception as raised:  # noqa: BLE001 - its exit code is what the parent looks at
        os._exit(getattr(raised, "exit_code", 1))
    os._exit(99)


def _forked_for_each(calls: range, error: int | None, output: Path, store: Path) -> int:
    """In each child, the call to fail at; 0 in the parent, when all children are done."""
    pristine, expected = store / "pristine", -signal.SIGKILL if error is None else 5
    for number in calls:
        shutil.copytree(output, pristine)
        child = os.fork()
        if child == 0:
            return number
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != expected:
            (store / f"call {number} ended in {code}").touch()
        output.rename(store / str(number))
        pristine.rename(output)
    return 0


def distinct(directories: list[Path]) -> list[Path]:
    """One directory of each state that differs in more than what a resumed run removes first, `.tmp-…`.

    Of a status that can be read only the state counts: when it was written, and which file the error names, is text.
    """
    found: dict[bytes, Path] = {}
    for directory in directories:
        state = hashlib.sha256()
        for path in sorted(directory.rglob("*")):
            relative = path.relative_to(directory)
            if any(part.startswith(".tmp-") for part in relative.parts) or relative.name == ".lock":
                continue
            state.update(f"{relative}\0".encode())
            if path.is_file():
                state.update(hashlib.sha256(_what_counts(path)).digest())
        found[state.digest()] = directory
    return list(found.values())


def _what_counts(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name != STATUS:
        return content
    try:
        return str(json.loads(content)["state"]).encode()
    except (ValueError, KeyError):
        return content


def temporary(directory: Path) -> list[Path]:
    """What a save leaves only when it is cut off."""
    return [path for path in directory.rglob("*") if path.name.startswith(".tmp-") or path.name.endswith(".old")]
