"""Standard streams that are missing, limited to ASCII, or fail while the command runs."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


def open_missing_streams() -> None:
    """Replace missing standard streams: output is discarded, input is empty.

    It also occupies their file numbers. Otherwise a file of ours could get the number that a library prints to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - never closed


def accept_any_text() -> None:
    """Make the standard streams accept any text.

    Standard output escapes half of a surrogate pair, as standard error does. Streams that Python considers ASCII, as
    in the C locale without UTF-8 mode, use UTF-8, which piped JSON always is. An encoding or error handler in
    PYTHONIOENCODING is respected.
    """
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    streams: tuple[Any, ...] = (sys.stdin, sys.stdout, sys.stderr)
    for stream in streams:
        # `reconfigure` flushes a stream, which may be closed. A program's replacement may lack the method.
        with suppress(OSError, ValueError, AttributeError, TypeError, LookupError):
            reconfigure = stream.reconfigure
            if not encoding and codecs.lookup(stream.encoding).name == "ascii":
                reconfigure(encoding="utf-8", errors=stream.errors)
            if not errors and stream is sys.stdout:
                reconfigure(errors="backslashreplace")


def discard_output(stream: TextIO) -> None:
    """Discard further output of a stream whose reader has left, whose terminal is closed, or whose disk is full.

    Buffered output must not raise again when Python closes its streams, which would end the command with 120.
    """
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class _StandardError:
    """Standard error that discards output after an error, since a lost line is no reason for a command to fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard_output(self._stream)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard_output(self._stream)


@contextmanager
def tolerate_stderr_errors() -> Iterator[None]:
    """Replace standard error, inside the context, with a stream that ignores errors of output."""
    stream = sys.stderr
    if stream is None:  # `open_missing_streams` opens one that discards output
        yield
        return
    guarded = cast("TextIO", _StandardError(stream))
    sys.stderr = guarded
    try:
        yield
    finally:
        with suppress(ValueError):  # it was closed in the meantime
            guarded.flush()
        if sys.stderr is guarded:
            sys.stderr = stream
