"""Rewards of answers, by functions in a process of their own (`functions`): what hangs there is ended, not waited for.

A function that raises, takes too long, ends its process, or gives NaN or a wrong number of rewards ends the run. Which
answer it was is found by asking again, one answer at a time. What functions print is shown on standard error, a bounded
amount per request and with control characters written out: it often is a model's own text.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from backhand.data.rows import Asked
from backhand.errors import CheckError, ResourceError, UsageError
from backhand.options.rewards import NO_PROCESS
from backhand.printing import LONGEST_LINE, bounded, say
from backhand.safe_path import python_words, safe_environment
from backhand.system import install, wait_for_pipe
from backhand.words import count_of, shorten

_START_S = 120.0
_ALONE_S = 5.0
"""How long a function that took too long for all answers may take for one."""
_BYTES_PER_REWARD, _BYTES_BESIDES = 64, 1 << 20
"""Bounds of the bytes that answer a request: names and messages may be long, numbers are not."""
_SHOWN_BYTES = 1 << 16
"""Of what functions print during a request."""
_INTRUDED = "wrote into the pipe that rewards come back by: what is printed belongs on standard output or error"


class _Printed:
    """Shows the lines that reward functions print, at most `_SHOWN_BYTES` per request."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._left, self._left_out = _SHOWN_BYTES, 0
        self._thread = threading.Thread(target=self._read, name="reward functions' output", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Begin the next request."""
        left_out, self._left_out = self._left_out, 0
        self._left = _SHOWN_BYTES
        if left_out:
            self._say(f"… ({left_out:,} more bytes left out)")

    def close(self) -> None:
        """Show the rest, after the process has ended."""
        self._thread.join(timeout=1.0)  # a program that a function started may still hold the pipe
        self.renew()

    def _read(self) -> None:
        held = b""
        with suppress(OSError, ValueError), self._pipe:
            while data := os.read(self._pipe.fileno(), 1 << 16):
                *lines, held = (held + data).split(b"\n")
                if len(held) > LONGEST_LINE:
                    lines, held = [*lines, held], b""
                for line in lines:
                    self._show(line)
        if held:
            self._show(held)

    def _show(self, line: bytes) -> None:
        if self._left <= 0:
            self._left_out += len(line) + 1
            return
        self._left -= len(line) + 1
        self._say(line.decode("utf-8", "backslashreplace").rstrip("\r").expandtabs())

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody is left to read it
            say(f"reward: {bounded(text)}")


@dataclass(frozen=True)
class Written:
    """An answer as reward functions are given it."""

    asked: Asked  # the row that it answers
    text: str  # without control tokens
    token_ids: Sequence[int]  # of it, the stop token among them


class _Failed(Exception):
    """A function did not give its rewards: which one, how it ended, and whether it was waited for in vain."""

    def __init__(self, function: str, how: str, *, hangs: bool = False) -> None:
        super().__init__(how)
        self.function, self.how, self.hangs = function, how, hangs


class RewardProcess:
    """Holds the process with the reward functions; a context manager.

    Args:
        timeout_s: that a function may take for a batch of answers.
    """

    def __init__(self, names: Sequence[str], timeout_s: float) -> None:
        self.names, self.timeout_s = tuple(names), timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._printed: _Printed | None = None
        self._token = b""  # begins every line that answers the newest request
        self._buffer = b""

    def __enter__(self) -> RewardProcess:
        """Start the process. Raises UsageError: a function is not there, or its file cannot be run."""
        try:
            self._start()
        except _Failed as failed:
            self.close()
            raise UsageError(
                f"the reward function {failed.function} cannot be loaded",
                where="reward",
                why=failed.how,
                next_step=_remedy(failed),
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rewards(self, answers: Sequence[Written]) -> list[list[float]]:
        """(functions, answers) rewards; NaN where a function says None, that it does not judge this answer.

        Raises:
            CheckError: names the function and the row.
        """
        try:
            found = self._asked(answers, self.timeout_s)
        except _Failed as failed:
            raise self._error(failed, answers) from None
        for name, values in zip(self.names, found, strict=True):
            if len(values) != len(answers):
                least = "at least " if len(values) > len(answers) else ""
                gave = f"gave {least}{count_of(len(values), 'reward')} for {count_of(len(answers), 'answer')}"
                raise _refused(name, gave, None)
            for value, answer in zip(values, answers, strict=True):
                if value is not None and not math.isfinite(value):
                    raise _refused(name, f"gave {value}", answer)
        for number, answer in enumerate(answers):
            if all(values[number] is None for values in found):
                raise _refused(", ".join(self.names), "gave None: nothing judges the answer", answer)
        return [[math.nan if value is None else value for value in values] for values in found]

    def close(self) -> None:
        """End the process."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if self._printed is not None:
            self._printed.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            python_words("backhand.loop.rewards.functions"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **safe_environment()},
            start_new_session=True,  # what interrupts the run is not for the functions
        )
        assert self._process.stderr is not None
        self._printed = _Printed(self._process.stderr)
        self._send(list(self.names))
        self._received(time.monotonic() + _START_S, self.names[0], 0)

    def _asked(self, answers: Sequence[Written], timeout_s: float) -> list[list[float | None]]:
        if self._process is None:
            self._start()
        self._send(_batch(answers))
        function = self.names[0]
        while True:
            said = self._received(time.monotonic() + timeout_s, function, len(answers))
            if "rewards" in said:
                rewards: list[list[float | None]] = said["rewards"]
                return rewards
            function = said["begins"]

    def _error(self, failed: _Failed, answers: Sequence[Written]) -> CheckError:
        """The same by one answer after the other, until it happens again."""
        seconds = min(self.timeout_s, _ALONE_S) if failed.hangs else self.timeout_s
        for answer in answers:
            try:
                self._asked([answer], seconds)
            except _Failed as again:
                return _refused(again.function, failed.how, answer)
        return _refused(failed.function, f"{failed.how}, with all answers of a step and with none alone", answers[0])

    def _send(self, value: Any) -> None:
        """Write a request, with a token of its own."""
        assert self._process is not None and self._process.stdin is not None and self._printed is not None
        self._printed.renew()
        self._token = secrets.token_hex(16).encode()
        with suppress(BrokenPipeError):  # it has ended: that is seen where it should answer
            self._process.stdin.write(b"%s %s\n" % (self._token, json.dumps(value).encode()))
            self._process.stdin.flush()

    def _received(self, deadline: float, function: str, answers: int) -> dict[str, Any]:
        """Return the next line of the answer.

        Raises:
            _Failed: a function failed, or something else than an answer came. A new process is started afterwards.
        """
        assert self._process is not None and self._process.stdout is not None
        source = self._process.stdout.fileno()
        most = _BYTES_BESIDES + _BYTES_PER_REWARD * len(self.names) * (answers + 1)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not wait_for_pipe(source, left):
                self.close()
                raise _Failed(function, "did not come to an end in time", hangs=True)
            data = os.read(source, 1 << 16)
            if not data:
                code = self._process.wait()
                self.close()
                if code == NO_PROCESS:
                    raise ResourceError(
                        "the process of the reward functions cannot be started",
                        where="reward",
                        why=os.strerror(errno.EAGAIN),
                        next_step="raise the limit of processes (ulimit -u)",
                    )
                raise _Failed(function, f"ended its process with exit code {code}")
            self._buffer += data
            if len(self._buffer) > most:
                self.close()
                raise _Failed(function, _INTRUDED)
        line, _, self._buffer = self._buffer.partition(b"\n")
        said = _answer(line, self._token)
        if said is None:
            self.close()
            raise _Failed(function, _INTRUDED)
        if "error" in said:
            raise _Failed(said["function"], said["error"])
        return said


def _answer(line: bytes, token: bytes) -> dict[str, Any] | None:
    """Return the line as `functions` wrote it, or None if a function wrote it, or wrote into it."""
    begin, _, text = line.partition(b" ")
    if not secrets.compare_digest(begin, token):
        return None
    try:
        said = json.loads(text)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _batch(answers: Sequence[Written]) -> dict[str, Any]:
    names = dict.fromkeys(name for answer in answers for name in answer.asked.columns)
    conversational = [not isinstance(answer.asked.prompt, str) for answer in answers]
    return {
        "prompts": [answer.asked.prompt for answer in answers],
        "completions": [
            [{"role": "assistant", "content": answer.text}] if turns else answer.text
            for answer, turns in zip(answers, conversational, strict=True)
        ],
        "completion_ids": [list(answer.token_ids) for answer in answers],
        "references": [answer.asked.reference for answer in answers],
        "columns": {name: [answer.asked.columns.get(name) for answer in answers] for name in names},
    }


def _refused(function: str, how: str, answer: Written | None) -> CheckError:
    said = "" if answer is None else f", of the answer {shorten(answer.text)!r}"
    return CheckError(
        f"the reward function {function} {how}{said}",
        where=None if answer is None else answer.asked.source,
        why="a reward is a finite number, or None where the function does not judge an answer",
        next_step="correct the function and go on with --resume; the run has a checkpoint from before this step",
    )


def _remedy(failed: _Failed) -> str:
    package = next((name for name in ("reasoning_gym", "jsonschema") if f"'{name}'" in failed.how), None)
    if package is not None:
        return install("'backhand[rewards]'")
    return "correct its file or its name; the current directory is no place to import from: name a file.py:function"
