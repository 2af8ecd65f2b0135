"""Runs in processes of their own that come to one place, say so, and wait there until they are let go."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from backhand.cli.main import main
from backhand.nn.decoder import Decoder
from backhand.train import job
from backhand.train.console import TerminalObserver
from backhand.train.files import FileLayer

PLACES = ("load", "step", "save", "publish", "evaluation")
"""Reading the model; step 3; the checkpoint of step 2, all written and not in place; `adapter/` of step 2, the former
one moved away; the evaluation after step 2, between two batches."""


def held_train(words: list[str], place: str, connection: Connection) -> None:
    """In a process of its own: run `backhand train WORDS`, wait at the place once, and exit as the command does.

    Sends "here" from the place and goes on when anything comes back; sends each note of the run, too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs hand down an ignored one
    waited = False

    def wait() -> None:
        nonlocal waited
        if not waited:
            waited = True
            connection.send("here")
            connection.recv()

    TerminalObserver.noted = lambda _self, text: connection.send(text)  # type: ignore[method-assign]
    _hold(place, wait)
    sys.exit(main(["train", *words]))


def _hold(place: str, wait: Callable[[], None]) -> None:
    match place:
        case "load":
            _before(job, "load_bound_model", lambda *_: wait())
        case "step":
            _before(Decoder, "loss_and_gradients", _on_call(5, wait))  # a step has two micro-batches
        case "save":
            _before(FileLayer, "sync_directory", lambda _, path: path.name.startswith(".tmp-step-2-") and wait())
        case "publish":
            _before(FileLayer, "rename", lambda _, source, target: _is_second_adapter(source, target) and wait())
        case "evaluation":
            _before(Decoder, "loss", _on_call(3, wait))  # an evaluation has two batches, and the base had one


def _is_second_adapter(source: Path, target: Path) -> bool:
    return target.name == "adapter" and any(target.parent.glob(".tmp-old-adapter-*"))


def _on_call(number: int, wait: Callable[[], None]) -> Callable[..., None]:
    count = 0

    def called(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            wait()

    return called


def _before(owner: Any, name: str, call: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def replacement(*arguments: Any, **options: Any) -> Any:
        call(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, replacement)
