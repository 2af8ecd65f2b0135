"""Runs in processes of their own that come to one place, say so, and wait there until they are let go."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from backhand.cli.main import main
from backhand.distributed.heartbeat import Heartbeat
from backhand.distributed.process_group import ProcessGroup
from backhand.engines.decoder_engine import DecoderEngine
from backhand.files import FileLayer
from backhand.loop.step import training_step
from backhand.nn.decoder.decoder import Decoder
from backhand.runs.directory import SUMMARY
from backhand.training.console import TerminalObserver

PLACES = ("load", "step", "save", "publish", "evaluation")
"""Reading the model; step 3; the checkpoint of step 2, all written and not in place; `adapter/` of step 2, the former
one moved away; the evaluation after step 2, between two batches."""

PLACES_OF_SEVERAL = ("exchange", "end", "summary", "close", "done")
"""More places of a run on several processes: the exchange of step 3, gradients sent and no sums received; `adapter/` of
the last step, the former one moved away; the summary, all written and not in place; a process that is about to say that
it has done its part; one that has said so."""


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
    hold(place, wait)
    sys.exit(main(["train", *words]))


def hold(place: str, wait: Callable[[], None]) -> None:
    """Call `wait` at the place."""
    third_sum = _on_call(3, wait)
    match place:
        case "load":
            before(DecoderEngine, "load", lambda *_: wait())
        case "step":
            before_pass(_on_call(5, wait))  # a step has two micro-batches
        case "save":
            before(FileLayer, "sync_directory", lambda _, path: path.name.startswith(".tmp-step-2-") and wait())
        case "publish":
            before(FileLayer, "rename", lambda _, source, target: _is_second_adapter(source, target) and wait())
        case "evaluation":
            before(Decoder, "token_losses", _on_call(3, wait))  # an evaluation has two batches, and the base had one
        case "exchange":
            before(ProcessGroup, "all_gather", lambda _, __, sent: sent.is_floating_point() and third_sum())
        case "end":
            before(FileLayer, "rename", lambda _, source, target: _is_last_adapter(source, target) and wait())
        case "summary":
            before(FileLayer, "rename", lambda _, source, target: target.name == SUMMARY and wait())
        case "close":
            before(ProcessGroup, "close", lambda _: wait())
        case "done":
            before(Heartbeat, "_all_left", lambda pulse, *_: pulse._peers[pulse._rank].farewell is not None and wait())
        case _:
            raise ValueError(place)


def _is_second_adapter(source: Path, target: Path) -> bool:
    return target.name == "adapter" and any(target.parent.glob(".tmp-old-adapter-*"))


def _is_last_adapter(source: Path, target: Path) -> bool:
    return _is_second_adapter(source, target) and (target.parent / "checkpoints" / "step-4").exists()


def _on_call(number: int, wait: Callable[[], None]) -> Callable[..., None]:
    count = 0

    def called(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            wait()

    return called


def in_a_step() -> bool:
    """Whether what is being called is a pass of a training step, not one that measures memory before the run."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not training_step.__code__:
        frame = frame.f_back
    return frame is not None


def before_pass(call: Callable[..., Any]) -> None:
    """Call it before every forward and backward of a training step."""
    before(Decoder, "loss_and_gradients", lambda *arguments: in_a_step() and call(*arguments))


def before(owner: Any, name: str, call: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def replacement(*arguments: Any, **options: Any) -> Any:
        call(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, replacement)
