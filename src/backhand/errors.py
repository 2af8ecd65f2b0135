"""Exceptions of the package. Each class carries the exit code of the command line, see docs/errors.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from backhand.printing import bounded

T = TypeVar("T")

RESUME_STEP = "go on with --resume"
"""The part of `next_step` that continues the run. It is replaced if the run that was overwritten is restored."""


def not_none(value: T | None) -> T:
    """Return `value`, which an earlier check guarantees not to be None. Raises AssertionError if it is None."""
    assert value is not None
    return value


class BackhandError(Exception):
    """A problem that the user can act on: what happened, where, why, and what to do next.

    Args:
        what: one sentence without a full stop that shows the user's own input.
        where: `file:line`, a configuration key or a tensor name.
        why: the reason, if `what` does not make it obvious.
        next_step: what to type or change.
    """

    exit_code = 1
    said_elsewhere = False
    """True if another process of the run prints the same error."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.why = why
        self.next_step = next_step
        super().__init__(what)

    def __str__(self) -> str:
        text = self._said()
        if self.why:
            text += f"\n  why: {bounded(self.why)}"
        if self.next_step:
            text += f"\n  next: {bounded(self.next_step)}"
        return text

    def reword(self, change: Callable[[str], str]) -> None:
        """Replace each part of the error by what `change` makes of it."""
        for part in ("what", "where", "why", "next_step"):
            if text := getattr(self, part):
                setattr(self, part, change(text))
        self.args = (self.what,)

    def _said(self) -> str:
        # In Python, `where` is often the first word of the sentence: "dtype 'x' is not one of auto, float32".
        if self.where is None or self.what.startswith(f"{self.where} "):
            return bounded(self.what)
        return f"{bounded(self.where)}: {bounded(self.what)}"

    @property
    def one_line(self) -> str:
        """The whole error on one line, for a list of errors."""
        return "; ".join(bounded(part) for part in (self._said(), self.why, self.next_step) if part)


class UsageError(BackhandError):
    """Wrong usage or configuration: unknown option, value out of range, target without a match, existing output."""

    exit_code = 2


class DataError(BackhandError):
    """Data that is missing, unreadable, malformed or without a supervised token."""

    exit_code = 3


class ArtifactError(BackhandError):
    """A model, adapter, checkpoint or tokenizer that is incompatible, corrupt or missing."""

    exit_code = 4


class ResourceError(BackhandError):
    """Too little memory or disk space, or missing permissions."""

    exit_code = 5


class CheckError(BackhandError):
    """A failed check: guard, proof, parity or non-finite values."""

    exit_code = 6


def not_utf8(name: str, *, where: str, why: str, next_step: str) -> UsageError:
    """Return the error for a name that cannot be written as UTF-8.

    Args:
        name: with surrogates for the bytes that could not be decoded.
        why, next_step: for a name whose bytes are not UTF-8. The bytes may be, in a locale of which Python takes file
            names for ASCII.
    """
    try:
        meant = os.fsencode(name).decode("utf-8")
    except UnicodeError:
        return UsageError(f"{name!r} is not UTF-8", where=where, why=why, next_step=next_step)
    return UsageError(
        f"{meant!r} cannot be read in this locale",
        where=where,
        why=f"Python takes file names for {sys.getfilesystemencoding()} here (LC_ALL=C with PYTHONUTF8=0)",
        next_step="set LC_ALL=C.UTF-8, or unset PYTHONUTF8",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none or its `__str__` raises."""
    try:
        text = str(error).strip()
    except Exception:  # noqa: BLE001 - a foreign exception class
        text = ""
    return (text.splitlines() or [type(error).__name__])[0]


def error_text(error: BackhandError | OSError) -> str:
    """Return an error as a message, the system's without its number and with its path."""
    if isinstance(error, BackhandError):
        return str(error)
    return f"{error.filename}: {short_reason(error)}" if error.filename else short_reason(error)


def short_reason(error: BaseException) -> str:
    """Return the message of another library's exception on one line, for `why`; of the system's, without its number.

    The second line is included if the first ends with a colon. A KeyError's message, which is a bare key, is preceded
    by the type.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the error names the path
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text
