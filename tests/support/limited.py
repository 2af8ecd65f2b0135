"""A command in a process of its own, under limits of the system; one that hangs is killed and told of."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.processes import start

_PATIENCE_S = 240
"""A busy machine is slow; what hangs, hangs for ever."""


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    code: int | None
    output: str
    errors: str

    @property
    def what(self) -> str:
        """The line that says what is wrong."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error:")]
        return lines[-1] if lines else ""


def limited(
    words: Sequence[object],
    place: Path,
    *,
    file_bytes: int | None = None,
    memory_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run `backhand WORDS` in a directory.

    Args:
        words: of the command line.
        place: working directory.
        file_bytes: how long a file may become (ulimit -f).
        memory_bytes: address space above what a process with everything imported has.
        environment: further variables.
    """
    log = place / ".log"
    process = start(_run, [str(word) for word in words], str(place), file_bytes, memory_bytes, dict(environment or {}))
    process.join(_PATIENCE_S)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    texts = [Path(f"{log}.{name}") for name in ("out", "err")]
    output, errors = (path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in texts)
    for path in texts:
        path.unlink(missing_ok=True)
    assert code is not None, f"it hangs: backhand {' '.join(map(str, words))}"
    assert "Traceback" not in errors, errors
    return Ended(code, output, errors)


def _run(
    words: list[str], place: str, file_bytes: int | None, memory_bytes: int | None, environment: dict[str, str]
) -> None:
    os.chdir(place)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f".log.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
    os.environ.update(environment)
    if file_bytes is not None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if memory_bytes is not None:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    from backhand.cli.main import main

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
