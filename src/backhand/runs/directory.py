"""The run directory: its files, its lock, and the treatment of an existing run."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypedDict

from backhand.errors import UsageError, not_utf8
from backhand.files import (
    FileLayer,
    directory_errors,
    remove_tree,
    replace_file,
    save_errors,
    sync_file,
    write_all,
    write_file,
)
from backhand.json_shape import convert, fitting, parse
from backhand.reading import read_json, read_plain, read_settings
from backhand.runs.records import AnswerLine, metrics_line
from backhand.system import NO_LINK, PLAIN, lock
from backhand.words import name_list, nearest_names

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
CONFIG = "config.toml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PROOFS = "proofs.jsonl"
FACTS = "facts.json"
STATUS = "status.json"
ANSWERS = "answers.jsonl"
REPORT = "report.html"
LOGS = "logs"
REFERENCE = "reference.json"
TEACHER_ANSWERS = "teacher_answers.jsonl"
LOCK = ".lock"
TEMPORARY = ".tmp-"
# The run that `--overwrite` replaces is in REPLACED until the new run has a checkpoint. It is moved through _MOVING.
REPLACED = ".replaced"
_MOVING = ".replacing"
# config.toml is first: without it, a partly moved directory is no run that could be resumed.
OWNED = (
    *(CONFIG, ADAPTER, CHECKPOINTS, METRICS, SUMMARY, PROOFS, FACTS, STATUS, ANSWERS, REPORT, LOGS, REFERENCE),
    TEACHER_ANSWERS,
)
_ADAPTER_FILES = r"(adapter_config\.json|adapter_model\.safetensors|backhand\.json|README\.md)"
_CHECKPOINT_FILES = rf"({_ADAPTER_FILES}|manifest\.json|progress\.json|state\.safetensors)"
_WRITTEN = re.compile(
    rf"{ADAPTER}/{_ADAPTER_FILES}|{CHECKPOINTS}/(latest|step-\d+(\.old)?(/{_CHECKPOINT_FILES})?)"
    rf"|{LOGS}/(tensorboard|wandb|mlflow[^/]*)(/.*)?|[^/]+|(.*/)?{re.escape(TEMPORARY)}.*"
)
"""Paths of the files that a run writes below the names of `OWNED`, and those names."""


class _Facts(TypedDict):
    """Values that the facts.json of every run has."""

    began: str
    total_steps: int
    digests: dict[str, Any]
    packages: dict[str, Any]


class _RunTable(TypedDict):
    """Options that a run writes although they have their defaults."""

    output: str
    keep: int
    resume: bool
    overwrite: bool
    max_bad_steps: int


class _Configuration(TypedDict):
    """Tables that the config.toml of every run has."""

    model: dict[str, Any]
    data: dict[str, Any]
    adapter: dict[str, Any]
    optimization: dict[str, Any]
    run: _RunTable


class RunDirectory:
    """The directory of one run. Use `opened`, which holds the lock.

    Attributes:
        path: the directory, with links resolved.
    """

    def __init__(self, path: Path, files: FileLayer) -> None:
        self.path = path
        self.files = files
        self.adapter, self.checkpoints = path / ADAPTER, path / CHECKPOINTS

    def put_aside(self) -> None:
        """Move the files of the existing run aside, and no others.

        `settle` removes them, `put_back` restores them.

        Raises:
            ResourceError: a file cannot be moved.
        """
        with save_errors("the run directory", self.path, 0):
            names = [name for name in OWNED if (self.path / name).exists()]
            if not names:
                return
            self._remove_temporary()
            self.files.make_directory(self.path / _MOVING)
            for name in names:
                self.files.rename(self.path / name, self.path / _MOVING / name)
            self.files.rename(self.path / _MOVING, self.path / REPLACED)
            self.files.sync_directory(self.path)

    def settle(self) -> None:
        """Remove the replaced run, once the new run has a checkpoint. Raises ResourceError."""
        with save_errors("the run directory", self.path, 0):
            if (self.path / REPLACED).exists():
                remove_tree(self.files, self.path / REPLACED)

    def put_back(self) -> bool:
        """Restore the replaced run, unless the new run has a checkpoint; return True if it is restored.

        Raises:
            ResourceError: a file cannot be moved.
        """
        with save_errors("the run directory", self.path, 0):
            if (self.path / REPLACED).exists():
                if self._has_checkpoint():
                    remove_tree(self.files, self.path / REPLACED)
                    return False
                for name in OWNED:
                    remove_tree(self.files, self.path / name)
                self.files.rename(self.path / REPLACED, self.path / _MOVING)
            if not (self.path / _MOVING).exists():
                return False
            for child in sorted((self.path / _MOVING).iterdir()):
                self.files.rename(child, self.path / child.name)
            self.files.remove_directory(self.path / _MOVING)
            self.files.sync_directory(self.path)
            return True

    def discard(self) -> bool:
        """Remove the run, unless it has a checkpoint; return True if it is removed. Raises ResourceError."""
        if self._has_checkpoint():
            return False
        with save_errors("the run directory", self.path, 0):
            for name in OWNED:
                remove_tree(self.files, self.path / name)
            self._remove_temporary()
        return True

    def recover(self, *, resume: bool) -> None:
        """Repair a directory whose process was killed while it replaced a run. Raises ResourceError."""
        if not resume or not (self.path / CONFIG).exists() or not (self.path / REPLACED).exists():
            self.put_back()

    def _has_checkpoint(self) -> bool:
        """Return True if there is a checkpoint; it gets its name when all of it is on the disk."""
        return self.checkpoints.is_dir() and any(child.name.startswith("step-") for child in self.checkpoints.iterdir())

    def mend(self) -> None:
        """Remove the leftovers of an interrupted write, and an incomplete line at the end of proofs.jsonl.

        Raises:
            ResourceError: a file cannot be removed or written.
        """
        with save_errors("the run directory", self.path, 0):
            self._remove_temporary()
            proofs = self.path / PROOFS
            torn = proofs.exists() and not read_plain(proofs).endswith(b"\n")
        if torn:
            self.write(PROOFS, _as_lines(self.lines(PROOFS)))

    def _remove_temporary(self) -> None:
        for path in sorted(self.path.iterdir()):
            if path.name.startswith(TEMPORARY):
                remove_tree(self.files, path)

    def write(self, name: str, text: str) -> None:
        """Replace a file atomically. Raises ResourceError."""
        data = text.encode("utf-8")
        with save_errors(name, self.path, len(data)):
            replace_file(self.files, self.path / name, data)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a JSON line. Raises ResourceError."""
        data = (json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n").encode("utf-8")
        with save_errors(name, self.path, len(data)):
            descriptor = self.files.open_to_append(self.path / name)
            try:
                write_all(self.files, descriptor, data)
            finally:
                self.files.close(descriptor)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, proofs.jsonl or answers.jsonl, without entries of a wrong type.

        Lines that are not such records are left out, for example a last line that was cut off by a crash.
        """
        reader = _LINE_READERS[name]
        records = []
        try:
            text = read_plain(self.path / name).decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        for line in text.split("\n"):
            with suppress(ValueError):
                if record := reader(parse(line)):
                    records.append(record)
        return records

    def forget_after(self, step: int, *, evaluates_again: bool = False) -> None:
        """Drop metrics of later steps, which are about to be repeated.

        Args:
            evaluates_again: also drop this step's own evaluation.

        Raises:
            ResourceError: the file cannot be written.
        """

        def stays(record: Mapping[str, Any]) -> bool:
            of_an_evaluation = "loss" not in record
            return record["step"] < step or (record["step"] == step and not (evaluates_again and of_an_evaluation))

        self.write(METRICS, _as_lines(filter(stays, self.lines(METRICS))))

    def sync_lines(self) -> None:
        """Wait until metrics and proofs are on the disk, so that no checkpoint is newer than they are.

        Raises:
            ResourceError: the disk fails.
        """
        for name in (METRICS, PROOFS):
            with save_errors(name, self.path, 0):
                sync_file(self.files, self.path / name)
        with save_errors("the run directory", self.path, 0):
            self.files.sync_directory(self.path)

    def publish_adapter(self, contents: Mapping[str, bytes]) -> None:
        """Replace `adapter/` by these files, all at once. Raises ResourceError."""
        temporary, old = self.path / f".tmp-adapter-{os.getpid()}", self.path / f".tmp-old-adapter-{os.getpid()}"
        with save_errors("the adapter", self.path, sum(map(len, contents.values()))):
            put_directory(self.files, self.adapter, contents, temporary, old)

    def make_checkpoints(self) -> None:
        """Create `checkpoints/` if it does not exist. Raises ResourceError."""
        with save_errors("the list of checkpoints", self.path, 0):
            if not self.checkpoints.exists():
                self.files.make_directory(self.checkpoints)
                self.files.sync_directory(self.path)


def put_directory(files: FileLayer, path: Path, contents: Mapping[str, bytes], temporary: Path, old: Path) -> None:
    """Replace the directory at `path` by one with these files, all at once. Raises OSError.

    An existing directory is renamed to `old` meanwhile, and renamed back if the new one cannot take its name.

    Args:
        contents: bytes by name, in the order in which they are written.
        temporary: path at which the new directory is written.
    """
    try:
        remove_tree(files, temporary)
        files.make_directory(temporary)
        for name, data in contents.items():
            write_file(files, temporary / name, data)
        files.sync_directory(temporary)
        if os.path.lexists(path):
            remove_tree(files, old)
            files.rename(path, old)
        files.rename(temporary, path)
        files.sync_directory(path.parent)
        remove_tree(files, old)
    except BaseException:  # including a second Ctrl-C
        with suppress(OSError):
            if old.exists() and not path.exists():
                files.rename(old, path)
            remove_tree(files, temporary)
        raise


@contextmanager
def opened(output: Path, *, resume: bool, overwrite: bool, files: FileLayer | None = None) -> Iterator[RunDirectory]:
    """Check and lock the run directory, or create it. Existing files are not changed yet.

    Raises:
        UsageError: the name is not UTF-8, or the path is a file or a dangling link. The directory contains links; it
            contains a run, without `resume` or `overwrite`; it contains other files, without `resume`; it contains no
            run to resume; its lock is another program's; or another process writes to it.
        ResourceError: it cannot be created or is not writable.
    """
    path = _real_directory(output)
    for place in (path, Path.cwd()):  # relative paths are recorded as absolute ones
        _check_utf8(place)
    existed = path.exists()
    if existed:
        _check_contents(path, resume=resume, overwrite=overwrite)
    elif resume:
        raise _no_run(output)
    made = [parent for parent in path.parents if not parent.exists()]
    with directory_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    try:
        _check_contents(path, resume=resume, overwrite=overwrite)  # again, since another process may have written to it
        directory = RunDirectory(path, files or FileLayer())
        if existed:
            directory.recover(resume=resume)
        yield directory
    finally:
        with suppress(OSError):
            if not existed and not any(child.name != LOCK for child in path.iterdir()):
                (path / LOCK).unlink()
                path.rmdir()
                for parent in made:
                    parent.rmdir()  # the first that contains other files ends the loop
        os.close(lock)


def _as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _check_utf8(place: Path) -> None:
    try:
        str(place).encode("utf-8")
    except UnicodeEncodeError:
        raise not_utf8(
            str(place),
            where="output",
            why="a run records its path in files that are UTF-8",
            next_step="rename the directory, or work in another one",
        ) from None


def _real_directory(output: Path) -> Path:
    try:
        if output.is_symlink() and not output.exists():
            raise UsageError(
                f"{output} is a dangling link",
                where="output",
                why=f"it points to {output.readlink()}",
                next_step="create that directory, remove the link, or give another output",
            )
        path = output.resolve()
        mode = path.stat().st_mode
    except FileNotFoundError:
        return output.resolve()
    except (NotADirectoryError, RuntimeError) as error:
        raise UsageError(
            f"{output} lies below a file or a loop of links",
            where="output",
            why=str(error),
            next_step="give another directory",
        ) from None
    except OSError as error:
        raise UsageError(
            f"{output} cannot be opened", where="output", why=error.strerror, next_step="give another directory"
        ) from None
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{output} is a file, not a directory", where="output", next_step="give another name")
    return path


def _no_run(path: Path) -> UsageError:
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    runs = [other.name for other in siblings if other != path and (other / CONFIG).is_file()]
    near = [str(path.parent / name) for name in nearest_names(path.name, runs)]
    meant = f"did you mean {' or '.join(near)}? To begin a new run, " if near else ""
    return UsageError(f"there is no run in {path}", where="output", next_step=f"{meant}leave out --resume")


def _check_contents(path: Path, *, resume: bool, overwrite: bool) -> None:
    with directory_errors(path):
        names = sorted(child.name for child in path.iterdir())
    children = [name for name in names if name != LOCK and not name.startswith(TEMPORARY)]
    links = [name for name in (*OWNED, LOCK, REPLACED, _MOVING) if (path / name).is_symlink()]
    if links:
        raise UsageError(
            f"{', '.join(links)} in {path} is a link, and writing through it could change files elsewhere",
            where="output",
            next_step="remove the link, or give another directory",
        )
    run = is_run(path)
    if resume:
        if not run and not (path / CONFIG).exists():
            raise _no_run(path)
    elif children and not run:
        raise UsageError(
            f"{path} already contains files" + (", and only a run is replaced" if overwrite else ""),
            where="output",
            why=f"it has no mark of a run, and contains {name_list(children)}",
            next_step=f"give --output {free_name(path)}",
        )
    elif run and not overwrite:
        raise UsageError(
            f"{path} already contains a run",
            where="output",
            next_step=f"continue it with --resume, replace it with --overwrite, or give --output {free_name(path)}",
        )
    elif foreign := _foreign(path):
        raise UsageError(
            f"the run in {path} contains files that no run writes",
            where="output",
            why=name_list(foreign),
            next_step=f"move them to another place, or give --output {free_name(path)}",
        )


def is_run(path: Path) -> bool:
    """Return True if a directory has the mark of a run: its facts, or its lock and its whole configuration.

    A run writes its facts after its configuration. Both may be in a part of the directory that is being replaced.
    """
    places = (path, path / REPLACED, path / _MOVING)
    return any(map(_has_facts, places)) or ((path / LOCK).is_file() and any(map(_has_configuration, places)))


def _has_facts(place: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(read_json(place / FACTS, _Facts))
    return False


def _has_configuration(place: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError):
        return bool(convert(tomllib.loads(read_settings(place / CONFIG)), _Configuration))
    return False


def _foreign(path: Path) -> list[str]:
    """Return the files below the names of a run that no run writes, as paths in the directory."""
    below = (child for name in OWNED for child in sorted((path / name).rglob("*")))
    names = (child.relative_to(path).as_posix() for child in below)
    return [name for name in names if not _WRITTEN.fullmatch(name)]


def run_of(adapter: Path | None) -> Path | None:
    """Return the run directory that contains this adapter, or None."""
    if adapter is None:
        return None
    try:
        path = adapter.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links or a NUL character: reading raises the error
        return None
    parents = (path, *path.parents)[:4]
    return next((one for one in parents if (one / CONFIG).is_file() and (one / ADAPTER).is_dir()), None)


def free_name(path: Path) -> str:
    """Return the first of `NAME-2`, `NAME-3` and so on that does not exist, as a word of a shell."""
    free = next(name for number in count(2) if not (name := path.with_name(f"{path.name}-{number}")).exists())
    return shlex.quote(str(free.relative_to(Path.cwd()) if free.is_relative_to(Path.cwd()) else free))


def _locked(path: Path) -> int:
    """Lock the lock file; return its descriptor. The system releases the lock when the process ends."""
    while True:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | PLAIN | NO_LINK, 0o666)
        holder = os.read(descriptor, 64).decode("ascii", "replace")
        if holder and not holder.isdecimal():
            os.close(descriptor)
            raise UsageError(
                f"{LOCK} in {path} is no lock of a run",
                where="output",
                why="it contains more than the number of a process",
                next_step=f"give --output {free_name(path)}, or move that file",
            )
        if not lock(descriptor):
            os.close(descriptor)
            raise UsageError(
                f"another process is writing to {path}",
                where="output",
                why=f"process {holder or 'unknown'} holds its lock",
                next_step="wait for it or stop it, or give another directory",
            )
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == (path / LOCK).stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        os.close(descriptor)  # its holder has removed the file in between: lock the new one


ProofKind = Literal["gradients", "guards", "invariances", "resume", "merge", "export"]


@dataclass(frozen=True)
class Proof:
    """A checked statement."""

    proof: str  # the statement
    passed: bool  # True if it holds
    value: float | str | None  # the measured value
    bound: float | str | None = None  # the limit of the value; None if the value is informative only
    command: str = "train"  # the command that checked it
    kind: ProofKind = "guards"  # subject of the statement; the report has a table for each kind
    detail: str = ""  # place of the largest value, or the object of comparison


_LINE_READERS: Mapping[str, Callable[[object], dict[str, Any]]] = {
    METRICS: metrics_line,
    PROOFS: partial(fitting, shape=Proof),
    ANSWERS: partial(fitting, shape=AnswerLine),
}

ProofLog = Callable[[Proof], None]


def proof_log(directory: RunDirectory) -> ProofLog:
    """Return a function that appends proofs to the run's proofs.jsonl, with the time."""

    def log(proof: Proof) -> None:
        directory.append(PROOFS, {**asdict(proof), "time": datetime.now(UTC).isoformat(timespec="seconds")})

    return log
