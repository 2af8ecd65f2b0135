"""Commands that fail in every way a command can, to try the command line's own handling."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from backhand.bounds import Words
from backhand.cli.command import command
from backhand.cli.entry import Command
from backhand.errors import ArtifactError, BackhandError, CheckError, DataError, ResourceError, UsageError


class Stopped(BackhandError):
    """A command that was asked to stop and did."""

    exit_code = 143

    def __init__(self) -> None:
        super().__init__("terminated after step 3", next_step="go on with --resume")


def _parse_names(words: tuple[str, ...]) -> str | tuple[str, ...]:
    return words[0] if tuple(words) == ("all",) else tuple(name for word in words for name in word.split(","))


def _parse_numbers(words: tuple[str, ...]) -> dict[str, int]:
    return {name: int(number) for name, number in (word.split("=") for word in words)}


@dataclass(frozen=True)
class Inner:
    """A section."""

    size: int = 3
    """Size of the inner thing, in things."""

    names: Annotated[str | tuple[str, ...], Words(_parse_names)] = "all"
    """Names, or `all`."""

    numbers: Annotated[Mapping[str, int], Words(_parse_numbers)] = field(default_factory=dict)
    """Numbers by name."""


@dataclass(frozen=True)
class Outer:
    """Options with a section."""

    how: str = "well"
    """How to end."""

    rate: float = 0.5
    """Rate of ending; see `how` and `size`."""

    mode: Literal["how", "fast"] = "fast"
    """Either `how` or `fast`."""

    careful: bool = False
    """Whether to take care."""

    thorough: bool = True
    """Whether to be thorough."""

    where: Path = Path("here")
    """Place to end at."""

    inner: Inner = field(default_factory=Inner)


last_options: list[Outer] = []


def run_end(options: Outer) -> int | None:
    last_options[:] = [options]
    if options.rate < 0:
        raise UsageError(f"rate {options.rate} is below 0", where="rate")
    if options.inner.numbers.get("bad"):
        raise UsageError("bad is not allowed", where="numbers['bad']")
    match options.how:
        case "code":
            return options.inner.size
        case "note":
            print("a note", file=sys.stderr)
            print("the answer")
        case "usage":
            raise UsageError("wrong", where="somewhere", why="because", next_step="do better")
        case "data":
            raise DataError("bad row", where="rows.jsonl:3")
        case "artifact":
            raise ArtifactError("torn file")
        case "resource":
            raise ResourceError("too large")
        case "check":
            raise CheckError("not equal")
        case "bug":
            return [][options.inner.size]
        case "memory":
            raise MemoryError
        case "torch-memory":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes")
        case "disk-full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/adapter.safetensors")
        case "too-big":
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/data/adapter.safetensors")
        case "not-writable":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data")
        case "stopped":
            raise Stopped
        case "interrupt":
            raise KeyboardInterrupt
        case "exit":
            raise SystemExit(7)
        case "sleep":
            print("asleep", flush=True)
            time.sleep(60)
        case "print":
            for number in range(100_000):
                print(number)
    return None


def _load(path: Path) -> Outer:
    import tomllib

    table = tomllib.loads(path.read_text())
    return Outer(**{**table, "inner": Inner(**table.get("inner", {}))})


END = Command(
    "end",
    "End in some way.",
    "backhand end",
    "tests.support.cli_commands:Outer",
    "tests.support.cli_commands:run_end",
    file=_load,
)
end = command(END)


@dataclass(frozen=True)
class Files:
    """Options given by position."""

    verb: Literal["join", "split"]
    """What to do."""

    files: tuple[Path, ...] = ()
    """Which files."""

    weight: float = 1.0
    """How much."""


def _files(options: Files) -> None:
    if options.verb == "split" and not options.files:
        raise UsageError("no file is given", where="files")
    last_files.append(options)


last_files: list[Files] = []
files = command(Command("files", "", "", Files, _files, positional=("verb", "files")))
