"""Ctrl-C, SIGTERM and SIGHUP: the first asks the loop to stop after the step it is in, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from backhand.errors import BackhandError

_NAMES = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_WORDS = {int(getattr(signal, name)): word for name, word in _NAMES.items() if hasattr(signal, name)}


class Interrupted(BackhandError):
    """The run was asked to stop and did, after a checkpoint.

    Args:
        number: of the signal; the exit code is 128 more: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, step: int, next_step: str) -> None:
        name = stop_word(number) or "stopped"
        super().__init__(f"{name} after step {step}; everything up to it is saved", next_step=next_step)
        self.step = step
        self.exit_code = 128 + number


def stop_word(number: int) -> str | None:
    """What a process that ends by a signal was; None for numbers that are none of those it is stopped by."""
    return _WORDS.get(number)


def signal_in(reason: str) -> int | None:
    """The signal that a run was stopped by, from how `Interrupted` begins; None for another reason."""
    return next((number for number, word in _WORDS.items() if reason.startswith(f"{word} after")), None)


class Interruption:
    """Handles the signals while it is entered; does nothing outside the main thread, where Python forbids it.

    Attributes:
        requested: the number of the signal that asked for the stop, or None.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested: int | None = None
        self._announce = announce
        self._graceful = False
        self._heard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _WORDS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Inside, the first signal only sets `requested`; outside there is nothing to save, and it stops at once."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def heard_elsewhere(self, number: int) -> None:
        """Another process of the run has been asked to stop: so is this one; a first signal of its own is no second."""
        self.requested = self.requested or number

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._graceful and not self._heard:
            self._heard = True
            self.requested = self.requested or number
            with suppress(RuntimeError):  # Python forbids to print while the print it interrupted is under way
                self._announce("stopping after this step and saving; once more stops at once, at the checkpoint before")
            return
        # Not an Exception: a library's `except Exception` must not swallow it.
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
