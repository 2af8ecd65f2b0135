"""Ctrl-C, SIGTERM and SIGHUP. The first signal stops the loop after the current step, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from backhand.errors import BackhandError

_NAMES = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_WORDS = {int(getattr(signal, name)): word for name, word in _NAMES.items() if hasattr(signal, name)}


class Interrupted(BackhandError):
    """The run was stopped by a signal, after a checkpoint.

    Args:
        number: the signal. The exit code is 128 more: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, step: int, next_step: str) -> None:
        name = stop_word(number) or "stopped"
        super().__init__(f"{name} after step {step}; everything up to it is saved", next_step=next_step)
        self.step = step
        self.exit_code = 128 + number


def stop_word(number: int) -> str | None:
    """Return the participle for a signal, such as "terminated"; None for a signal that does not stop a run."""
    return _WORDS.get(number)


def signal_in(reason: str) -> int | None:
    """Return the signal in the message of an `Interrupted`, or None for any other reason."""
    return next((number for number, word in _WORDS.items() if reason.startswith(f"{word} after")), None)


class Interruption:
    """Context manager that handles the signals. It does nothing outside the main thread, as Python requires.

    Attributes:
        requested: the signal that requested the stop, or None.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested: int | None = None
        self._announce = announce
        self._graceful = False
        self._received = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _WORDS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                    self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()
        if error is None and self.requested is not None:
            _stop(self.requested)  # the run ended before it could stop; what follows it must not begin

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Within the block, the first signal only sets `requested`. Elsewhere, it stops at once."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def heard_elsewhere(self, number: int) -> None:
        """Stop this process like another one of the run. Its own first signal does not count as a second one."""
        self.requested = self.requested or number

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._graceful and not self._received:
            self._received = True
            self.requested = self.requested or number
            with suppress(RuntimeError):  # Python does not allow printing if the signal interrupted a print
                self._announce("stopping after this step and saving; a second signal stops at once, without saving")
            return
        _stop(number)


def _stop(number: int) -> NoReturn:
    # Not an Exception: a library's `except Exception` must not swallow it.
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
