"""Backhand's commands as processes: their results are the page's results, and their messages are its messages."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backhand.errors import BackhandError, not_none
from backhand.safe_path import python_words, safe_environment
from backhand.system import end_group

MAX_OUTPUT_BYTES = 32 * 2**20
_AT_ONCE = 2
_CHECK_S = 0.5
_AT_WORK = b"still at work after "
"""Beginning of a line of `printing.never_silent`."""


class CommandError(BackhandError):
    """A command that failed; its text is what it printed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Sequences that colour text or move the cursor, and other control characters than a tab and a line break."""


def readable(printed: str) -> str:
    """Return what a command printed without control codes; of a line that was drawn again, its last state."""
    printed = re.sub(r"(?m)^still at work after .*\n(?=still at work after )", "", printed)
    return "\n".join(_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip() for line in printed.split("\n"))


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    code: int
    output: str
    messages: str  # standard error

    def json(self) -> Any:
        """Return the JSON on standard output. Raises CommandError if there is none."""
        try:
            return json.loads(self.output)
        except ValueError:
            raise CommandError(self.messages.strip() or self.output) from None

    @property
    def notes(self) -> list[str]:
        """The notes and warnings on standard error, see `words.show_notes`."""
        return re.findall(r"(?m)^(?:note|WARNING): (.+)$", self.messages)


def shown(words: Sequence[str]) -> str:
    """Return the words after `backhand` as a command to copy."""
    return shlex.join(["backhand", *words])


class Commands:
    """Runs commands, a few at a time.

    Args:
        directory: the directory in which they run.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self.progress: dict[str, str] = {}  # the latest activity of each command at work, by the page's name of it

    async def run(
        self,
        words: Sequence[str],
        gone: Callable[[], Awaitable[bool]],
        *,
        text: str = "",
        module: str = "backhand",
        work: str = "",
    ) -> Outcome:
        """Run a command to its end.

        Args:
            words: the words after `backhand`.
            gone: returns True if nobody waits for the result any more. The command is then ended.
            text: standard input.
            module: the module to run.
            work: name under which `progress` has the latest activity.

        Raises:
            CommandError: nobody waits any more, or the output is too long.
        """
        async with self._turns:
            process = await asyncio.create_subprocess_exec(
                *python_words(module, *words),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=self._directory,
                env=os.environ | safe_environment(),
                start_new_session=True,
                limit=MAX_OUTPUT_BYTES,
            )
            working = asyncio.create_task(self._communicate(process, text, work))
            try:
                while not (await asyncio.wait({working}, timeout=_CHECK_S))[0]:
                    if await gone():
                        raise CommandError("the page was closed before the command ended")
                output, messages = working.result()
            finally:
                if process.returncode is None:
                    end_group(process.pid)
                    await process.wait()
                working.cancel()
                self.progress.pop(work, None)
        if len(output) > MAX_OUTPUT_BYTES:
            raise CommandError("the output of the command is too long for a page")
        return Outcome(process.returncode or 0, output.decode("utf-8", "replace"), messages.decode("utf-8", "replace"))

    async def _communicate(self, process: asyncio.subprocess.Process, text: str, work: str) -> tuple[bytes, bytes]:
        """Send the input and read both outputs. Lines about the current activity become progress, not messages."""
        sending, output, messages = not_none(process.stdin), not_none(process.stdout), not_none(process.stderr)

        async def send() -> None:
            with suppress(ConnectionError):
                sending.write(text.encode("utf-8", "replace"))
                await sending.drain()
            sending.close()

        async def read() -> bytes:
            lines = []
            async for line in messages:
                if line.startswith(_AT_WORK):
                    self.progress[work] = line.decode("utf-8", "replace").partition(": ")[2].strip()
                else:
                    lines.append(line)
            return b"".join(lines)

        _, data, printed = await asyncio.gather(send(), output.read(), read())
        await process.wait()
        return data, printed

    async def checked(
        self, words: Sequence[str], gone: Callable[[], Awaitable[bool]], *, text: str = "", work: str = ""
    ) -> Outcome:
        """Run a command. Raises CommandError, with what it printed, if it fails."""
        outcome = await self.run(words, gone, text=text, work=work)
        if outcome.code:
            raise CommandError(outcome.messages.strip() or f"the command ended with code {outcome.code}")
        return outcome
