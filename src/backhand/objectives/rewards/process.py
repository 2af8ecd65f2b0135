"""Rewards of answers from functions in a process of their own (`functions`), which is killed when a function hangs.

A function ends the run if it raises, takes too long, ends its process, or returns NaN or a wrong number of rewards. The
answer that caused the failure is found by repeating the request with one answer at a time. Output of the functions is
shown on standard error with control characters escaped, because it often is a model's text. It is bounded per request.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shlex
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from backhand.data.examples import Example
from backhand.data.rows import REFERENCES, PromptRow
from backhand.errors import RESUME_STEP, CheckError, DataError, ResourceError, UsageError
from backhand.generation.session import REPLACEMENT
from backhand.objectives.rewards.functions import GIVEN, last_number
from backhand.options.rewards import GYM, NO_PROCESS, PLAIN, WITH_ARGUMENT, parse_name
from backhand.printing import LONGEST_LINE, bounded, say
from backhand.safe_path import python_words, safe_environment
from backhand.system import install, wait_for_pipe
from backhand.words import count_of, name_list, nearest_names, shorten

_START_TIMEOUT_S = 120.0
_SINGLE_TIMEOUT_S = 5.0
"""Time limit for one answer, of a function that took too long for all answers."""
_REWARD_BYTES, _MESSAGE_BYTES = 64, 1 << 20
"""Limits of a response: per reward, and for names and error messages."""
_OUTPUT_BYTES = 1 << 16
"""Limit of the function output that is shown per request."""
_INTRUDED = "wrote into the pipe that rewards come back by: what is printed belongs on standard output or error"


class _OutputReader:
    """Shows the output of reward functions line by line, at most `_OUTPUT_BYTES` per request."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._left, self._left_out = _OUTPUT_BYTES, 0
        self._thread = threading.Thread(target=self._read, name="reward functions' output", daemon=True)
        self._thread.start()

    def start_request(self) -> None:
        """Say how much was left out, and start counting again."""
        left_out, self._left_out = self._left_out, 0
        self._left = _OUTPUT_BYTES
        if left_out:
            self._say(f"… ({left_out:,} more bytes left out)")

    def close(self) -> None:
        """Show the rest of the output, after the process has ended."""
        self._thread.join(timeout=1.0)  # a program that a function started may still hold the pipe
        self.start_request()

    def _read(self) -> None:
        rest = b""
        with suppress(OSError, ValueError), self._pipe:
            while data := os.read(self._pipe.fileno(), 1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._show(line)
        if rest:
            self._show(rest)

    def _show(self, line: bytes) -> None:
        if self._left <= 0:
            self._left_out += len(line) + 1
            return
        self._left -= len(line) + 1
        self._say(line.decode("utf-8", "backslashreplace").rstrip("\r").expandtabs())

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # standard error is closed
            say(f"reward: {bounded(text)}")


@dataclass(frozen=True)
class RewardInput:
    """An answer with its row, as reward functions receive it."""

    asked: PromptRow  # the row
    text: str  # the answer without control tokens
    token_ids: Sequence[int]  # the answer's tokens, with the stop token


class _Failed(Exception):
    """A function returned no rewards.

    Attributes:
        function: its name.
        how: how it failed, as a predicate.
        timed_out: True if it took too long.
        returned: True if it returned something that is no reward.
        place: file, line and text of the user's code that raised an exception, or "".
        trace: the function's traceback if it raised an exception; shown by `--debug`.
        of_all: True if the failure is not about one answer.
        next_step: what to do about it, or "" to correct the function.
    """

    def __init__(
        self,
        function: str,
        how: str,
        *,
        timed_out: bool = False,
        returned: bool = False,
        place: str = "",
        trace: str = "",
        of_all: bool = False,
        next_step: str = "",
    ) -> None:
        super().__init__(how)
        self.function, self.how, self.timed_out, self.place = function, how, timed_out, place
        self.returned, self.of_all, self.next_step = returned, of_all, next_step
        self.trace = FunctionTraceback(trace) if trace else None


class FunctionTraceback(Exception):
    """The traceback of an exception in the functions' process, as the cause of the run's error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def check_references(names: Iterable[str], rows: Iterable[PromptRow]) -> None:
    """Raise DataError if a built-in reward compares with the right answer, and a row has none that it can read."""
    comparing = [name for name in names if parse_name(name).kind in (*PLAIN, GYM)]
    for row in rows if comparing else ():
        for name, what, why in _lacking(comparing, row):
            raise DataError(
                f"the reward {name} compares with the right answer, but {what}",
                where=row.source,
                why=why,
                next_step="add the right answer as a column answer, name its column with --columns answer=COLUMN, or "
                "leave the row out; regex:PATTERN, length:TOKENS or a function of your own need no right answer",
            )


def _lacking(names: Iterable[str], row: PromptRow) -> Iterator[tuple[str, str, str]]:
    """Yield each reward that cannot read the right answer of a row, with the problem and its reason."""
    for name in names:
        kind = parse_name(name).kind
        if row.reference is None and not (kind == GYM and row.columns.get("metadata") is not None):
            others = [shorten(column) for column, value in row.columns.items() if value is not None]
            read = f"it would be read from the first of {name_list(REFERENCES)}"
            yield name, "the row has none", f"{read}; next to the prompt, the row has {name_list(others) or 'nothing'}"
        elif kind == "number" and last_number(row.reference or "") is None:
            yield name, f"{shorten(row.reference or '')!r} contains no number", "the last numbers are compared"


class RewardProcess:
    """The process that runs reward functions; a context manager.

    Args:
        names: the functions.
        timeout_s: time limit of a function for one batch of answers.
        trains: False for an evaluation, which cannot be resumed and has no option for the time limit.
    """

    def __init__(self, names: Sequence[str], timeout_s: float, *, trains: bool = True) -> None:
        self.names, self.timeout_s, self.trains = tuple(names), timeout_s, trains
        self._process: subprocess.Popen[bytes] | None = None
        self._output: _OutputReader | None = None
        self._token = b""  # each line of the response to the newest request begins with it
        self._buffer = b""
        # Place of each user's function, and the parameters that it needs
        self._described: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> RewardProcess:
        """Start the process. Raises UsageError if a function cannot be loaded."""
        try:
            self._start()
        except _Failed as failed:
            self.close()
            raise UsageError(
                f"the reward function {failed.function} cannot be loaded",
                where="reward",
                why=f"{failed.how}, at {failed.place}" if failed.place else failed.how,
                next_step=failed.next_step
                or "correct its file or its name"
                + "; the current directory is no place to import from: name a file.py:function"
                * (parse_name(failed.function).kind == "module"),
            ) from failed.trace
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_parameters(self, examples: Iterable[Example]) -> None:
        """Raise UsageError if a function needs a parameter that is neither given always nor a column of the rows."""
        rows = (example.facts for example in examples)
        columns = list(dict.fromkeys(chain.from_iterable(row.columns for row in rows if isinstance(row, PromptRow))))
        for name, described in self._described.items():
            missing = [parameter for parameter in described["needs"] if parameter not in (*GIVEN, *columns)]
            if missing:
                near = [(one, nearest_names(one, (*GIVEN, *columns), count=1)) for one in missing]
                meant = [f"{close[0]} instead of {one}" for one, close in near if close]
                raise UsageError(
                    f"the reward function {name} has a parameter {missing[0]}, and nothing is given by this name",
                    where=described["place"],
                    why=f"given are {name_list([*GIVEN, *columns])}: the answers, and the columns of the rows",
                    next_step=f"write {' and '.join(meant)}" if meant else "name its parameters like these",
                )

    def rewards(self, answers: Sequence[RewardInput]) -> list[list[float]]:
        """Return (functions, answers) rewards. They are NaN for answers that a function returns None for.

        Raises:
            CheckError: a function failed. The error names the function and the row.
        """
        try:
            rewards = self._request(answers, self.timeout_s)
        except _Failed as failed:
            raise self._error(failed, answers) from failed.trace
        for name, values in zip(self.names, rewards, strict=True):
            if len(values) != len(answers):
                least = "at least " if len(values) > len(answers) else ""
                gave = f"gave {least}{count_of(len(values), 'reward')} for {count_of(len(answers), 'answer')}"
                raise self._refused(name, gave, None)
            for value, answer in zip(values, answers, strict=True):
                if value is not None and not math.isfinite(value):
                    raise self._refused(name, f"gave {value}", answer)
        for number, answer in enumerate(answers):
            if all(values[number] is None for values in rewards):
                error = self._refused(", ".join(self.names), "gave None: nothing judges the answer", answer)
                error.why = "at least one reward function must give each answer a number"
                raise error
        return [[math.nan if value is None else value for value in values] for values in rewards]

    def close(self) -> None:
        """Kill the process and show the rest of its output."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if self._output is not None:
            self._output.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            python_words("backhand.objectives.rewards.functions"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **safe_environment()},
            start_new_session=True,  # Ctrl-C in the terminal is for the run alone
        )
        assert self._process.stderr is not None
        self._output = _OutputReader(self._process.stderr)
        self._send(list(self.names))
        response = self._receive(_START_TIMEOUT_S, self.names[0], 0)
        self._described = dict(zip(self.names, response["ready"], strict=True))

    def _request(self, answers: Sequence[RewardInput], timeout_s: float) -> list[list[float | None]]:
        if self._process is None:
            self._start()
        self._send(_batch(answers))
        function = self.names[0]
        while True:
            response = self._receive(timeout_s, function, len(answers))
            if "rewards" in response:
                rewards: list[list[float | None]] = response["rewards"]
                return rewards
            function = response["begins"]

    def _error(self, failed: _Failed, answers: Sequence[RewardInput]) -> CheckError:
        """Repeat the request with one answer at a time to find the one that the function fails on."""
        if failed.of_all:
            return self._refused(failed.function, failed.how, None)
        seconds = min(self.timeout_s, _SINGLE_TIMEOUT_S) if failed.timed_out else self.timeout_s
        for answer in answers:
            try:
                self._request([answer], seconds)
            except _Failed as repeated:
                alone = repeated.timed_out and len(answers) > 1
                how = f"{failed.how}, and more than {seconds:g} s for one of them" if alone else failed.how
                return self._refused(repeated.function, how, answer, failed)
        if failed.timed_out:
            return self._refused(failed.function, failed.how, None, failed)
        how = f"{failed.how}, with all answers of a step and with none alone"
        return self._refused(failed.function, how, answers[0], failed)

    def _refused(
        self, function: str, how: str, answer: RewardInput | None, failed: _Failed | None = None
    ) -> CheckError:
        """Return the error about a function, with the line that failed, or else the place of the function.

        Args:
            function: its name.
            how: how it failed, as a predicate.
            answer: the answer that it failed on, or None.
            failed: the failure; None if the function returned rewards that cannot be used.
        """
        defined = [described["place"] for name, described in self._described.items() if name in function]
        reasons = [f"the function is at {place}" for place in defined if place]
        if failed is None or failed.returned:
            reasons.insert(0, "a reward is a finite number, or None where the function does not judge an answer")
        elif failed.place:
            reasons = [f"at {failed.place}"]
        quoted = ""
        if answer is not None:
            before = ": " if failed is not None and failed.timed_out else ", of the answer "
            # An answer that was cut at --max-new-tokens may end within a character.
            quoted = f"{before}{shorten(answer.text.rstrip(REPLACEMENT))!r}"
        next_step = failed.next_step if failed is not None and failed.next_step else "correct the function"
        return CheckError(
            f"the reward function {function} {how}{quoted}",
            where=None if answer is None else answer.asked.source,
            why="; ".join(reasons),
            next_step=f"{next_step}, and {RESUME_STEP if self.trains else 'evaluate again'}",
        )

    def _send(self, value: Any) -> None:
        """Write a request with a new token."""
        assert self._process is not None and self._process.stdin is not None and self._output is not None
        self._output.start_request()
        self._token = secrets.token_hex(16).encode()
        with suppress(BrokenPipeError):  # the process has ended; `_receive` reports it
            self._process.stdin.write(b"%s %s\n" % (self._token, json.dumps(value).encode()))
            self._process.stdin.flush()

    def _receive(self, timeout_s: float, function: str, answers: int) -> dict[str, Any]:
        """Return the next line of the response.

        Raises:
            _Failed: a function failed, or wrote into the pipe. The next request may start a new process.
        """
        assert self._process is not None and self._process.stdout is not None
        source, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        limit = _MESSAGE_BYTES + _REWARD_BYTES * len(self.names) * (answers + 1)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not wait_for_pipe(source, left):
                self.close()
                raise _late(function, timeout_s, answers, trains=self.trains)
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
            if len(self._buffer) > limit:
                self.close()
                raise _Failed(function, _INTRUDED)
        line, _, self._buffer = self._buffer.partition(b"\n")
        response = _parse_response(line, self._token)
        if response is None:
            self.close()
            raise _Failed(function, _INTRUDED)
        if "error" in response:
            raise _Failed(
                response["function"],
                response["error"],
                returned=not response["traceback"],
                place=response["place"],
                trace=response["traceback"],
                of_all=response.get("of_all", False),
                next_step=_installing(response["function"], response.get("missing", "")),
            )
        return response


def _parse_response(line: bytes, token: bytes) -> dict[str, Any] | None:
    """Parse a line of `functions`, or return None if a reward function wrote any part of it."""
    begin, _, text = line.partition(b" ")
    if not secrets.compare_digest(begin, token):
        return None
    try:
        response = json.loads(text)
    except ValueError:
        return None
    return response if isinstance(response, dict) else None


def _batch(answers: Sequence[RewardInput]) -> dict[str, Any]:
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


def _late(function: str, timeout_s: float, answers: int, *, trains: bool) -> _Failed:
    """Return the failure of a function that took too long for this number of answers, or to load if there are none."""
    what = f"for {count_of(answers, 'answer')}" if answers else "to load"
    faster = f"{'raise --reward-timeout, or ' if trains else ''}make the function faster"
    faster = faster if answers else "do less when its file is imported"
    return _Failed(function, f"took more than {timeout_s:g} s {what}", timed_out=True, next_step=faster)


def _installing(function: str, missing: str) -> str:
    """Return how to make a missing module available to a function, or "" if it is the function's own module."""
    parsed = parse_name(function)
    if not missing or (parsed.kind == "module" and parsed.place.partition(".")[0] == missing):
        return ""
    if parsed.kind in WITH_ARGUMENT:
        return install("'backhand[rewards]'")
    folder = Path(parsed.place).resolve().parent
    if parsed.kind == "file" and (folder / f"{missing}.py").is_file():
        return f"set PYTHONPATH={shlex.quote(str(folder))}, since no module is imported from the directory of a file"
    return f"install the package of the module {missing}, for example with {install(missing)}"
