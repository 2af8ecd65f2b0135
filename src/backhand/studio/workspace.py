"""The studio's directory. Other users can read none of it.

- `server.lock`: locked by the one server of the directory, with its address without the token.
- `studio.json`: token and port of the address. `open.html` sends the browser to this address.
- `rows/`: uploads, and prompts to be baked, under names of our own.
- `runs/NAME/`: run directories, the only state of a run.
- `queue/`: runs that wait, see `queue`.
- `jobs/NAME.json`: command, process and exit code of the last start of a run. `NAME.log` has its output.
- `exports/NAME/`: converted adapters.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypedDict

from backhand.data.sources import SUFFIXES, data_suffix
from backhand.errors import DataError, ResourceError, UsageError, short_reason
from backhand.files import FileLayer, remove_tree, replace_file, save_errors, write_file
from backhand.reading import name_file, read_json, uploaded_name
from backhand.runs.directory import TEMPORARY
from backhand.system import NO_LINK, PLAIN, lock, others_can_write

MAX_UPLOADS = 200
_FREE_BYTES = 2**28
"""Space that an upload leaves on the disk."""
_LOCK = "server.lock"
_SETTINGS = "studio.json"
_OPENER = "open.html"
_UNREADABLE = ".unreadable"
"""Ending of an empty file next to an upload that could not be read."""
_PARTS = ("rows", "runs", "queue", "jobs", "exports")
_UPLOAD = re.compile(r"rows-([0-9]+)\..*")
_UPLOAD_IN_TEXT = re.compile(r"\brows-[0-9]+(?:\.[a-z]+)+")
_CONTEXT = re.compile(r"context-[0-9a-f]{16}\.txt")
_WORKBOOK, _DOCUMENT = "this is a spreadsheet workbook", "this is a Word document: it needs a table of rows first"
_OFFICE = {".xlsx": _WORKBOOK, ".xls": _WORKBOOK, ".ods": _WORKBOOK, ".docx": _DOCUMENT, ".doc": _DOCUMENT}
"""Reasons why files of office programs are not rows, by their ending."""
_NAME = re.compile(r"[^\W_](?:[\w -]{0,58}\w)?")


class _Settings(TypedDict):
    token: str
    port: int


class Upload(NamedTuple):
    """An uploaded file of rows."""

    label: str  # name that it had in the browser
    bytes: int
    stored: str  # time of the upload, as an ISO time


class Workspace:
    """The studio's directory.

    Attributes:
        root: the directory, absolute.
        token: the secret in the address.
        port: port of the last time, or 0.
    """

    def __init__(self, root: Path, allowed: Sequence[Path] = ()) -> None:
        """Open the directory, or create it.

        Raises:
            UsageError: it contains other files, or another user may write to it.
            ResourceError: it cannot be created or read.
        """
        self.root = root.expanduser().absolute()
        self._allowed = tuple(path.expanduser().resolve() for path in allowed)
        self.rows, self.runs, self.queue, self.jobs, self.exports = (self.root / part for part in _PARTS)
        with save_errors("the studio's directory", self.root, 0, again="give another --directory"):
            existed = self.root.exists()
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if existed:
                self._check_ours()
            self.root.chmod(0o700)
            for part in _PARTS:
                (self.root / part).mkdir(mode=0o700, exist_ok=True)
        try:
            settings = read_json(self.root / _SETTINGS, _Settings)
            self.token, self.port = settings["token"], settings["port"]
        except (OSError, ValueError):
            self.token, self.port = secrets.token_urlsafe(24), 0

    @contextmanager
    def locked(self) -> Iterator[Callable[[str], None]]:
        """Lock the directory for a server, and remove the uploads during which an earlier one was killed.

        Yields:
            a function that writes the server's address, without the token, for those who try to start another one.

        Raises:
            UsageError: the directory has a server already; names its address.
            ResourceError: the lock or the token cannot be written.
        """
        with save_errors(_LOCK, self.root, 0, again="give another --directory"):
            descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | PLAIN | NO_LINK, 0o600)
        try:
            if not lock(descriptor):
                raise UsageError(
                    f"{self.root} has a server already",
                    where="directory",
                    why=os.read(descriptor, 1000).decode("utf-8", "replace") or "another process has locked it",
                    next_step=f"open {self.root / _OPENER} in a browser, or stop it, or give another directory",
                )

            def announce(address: str) -> None:
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"process {os.getpid()} answers at {address}".encode())

            os.ftruncate(descriptor, 0)
            self.remember(self.port)
            for unfinished in self.rows.glob(f"{TEMPORARY}*"):
                unfinished.unlink()
            yield announce
        finally:
            os.close(descriptor)

    def remember(self, port: int) -> None:
        """Store the token and the port for the next start. Raises ResourceError."""
        self.port = port
        data = json.dumps({"token": self.token, "port": port}).encode()
        with save_errors(_SETTINGS, self.root, len(data)):
            replace_file(FileLayer(), self.root / _SETTINGS, data, 0o600)

    def opener(self, url: str) -> Path:
        """Write a page that goes on to an address. Return its path, which the process list may show.

        Raises:
            ResourceError: the page cannot be written.
        """
        path, address = self.root / _OPENER, html.escape(url)
        data = (
            '<!doctype html><html lang="en"><title>Backhand</title>'
            f'<meta http-equiv="refresh" content="0;url={address}">'
            f'<p><a href="{address}">Continue to Backhand</a></p></html>\n'
        ).encode()
        with save_errors(_OPENER, self.root, len(data)):
            replace_file(FileLayer(), path, data, 0o600)
        return path

    def _check_ours(self) -> None:
        if others_can_write(self.root.stat()):
            raise UsageError(
                f"another user owns {self.root} or may write to it",
                where="directory",
                next_step="give another directory, or take the permission away: chmod go-w",
            )
        names = {path.name for path in self.root.iterdir() if not path.name.startswith(TEMPORARY)}
        if _SETTINGS not in names and not names.issubset((*_PARTS, _OPENER, _LOCK)):
            raise UsageError(
                f"{self.root} contains other files",
                where="directory",
                why="everything in the studio's directory becomes unreadable for others",
                next_step="give a new directory, such as ~/backhand",
            )

    def uploads(self) -> dict[str, Upload]:
        """Return the uploads by the name of their file, the newest first."""
        files = [path for path in self.rows.iterdir() if path.is_file() and data_suffix(path) in SUFFIXES]
        files.sort(key=lambda path: -path.stat().st_mtime_ns)
        return {path.name: _upload(path) for path in files}

    async def save_upload(self, name: str, parts: AsyncIterator[bytes]) -> str:
        """Write an upload under a name that no upload had before; return the name. An unfinished upload leaves nothing.

        Raises:
            DataError: the suffix is not that of a file of rows.
            ResourceError: there are too many uploads, or the disk is full.
        """
        suffixes = [part.lower() for part in Path(name).suffixes[-2:]]
        suffix = "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
        if data_suffix(Path(f"rows{suffix}")) not in SUFFIXES:
            raise DataError(
                f"{name} is not a file of rows",
                why=_OFFICE.get(suffix),
                next_step="In Excel or LibreOffice, choose Save As and the type CSV UTF-8, and upload that file"
                if suffix in _OFFICE
                else f"save it as one of {', '.join(SUFFIXES)}, and upload that file",
            )
        if len(self.uploads()) >= MAX_UPLOADS:
            raise ResourceError(f"there are {MAX_UPLOADS} files of rows already", next_step="delete some of them")
        temporary = self.rows / f"{TEMPORARY}{secrets.token_hex(8)}"
        with save_errors("the upload", self.rows, 0):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o600)
            try:
                with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
                    async for part in parts:
                        if shutil.disk_usage(self.rows).free < len(part) + _FREE_BYTES:
                            raise ResourceError("the disk is full", where=str(self.rows), next_step="free some space")
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
                stored = self._take_name(suffix, name[:200])
                temporary.rename(stored)
            finally:
                temporary.unlink(missing_ok=True)
        return stored.name

    def _take_name(self, suffix: str, label: str) -> Path:
        """Return the path for an upload. Its label is created exclusively, so that no other upload gets the name."""
        while True:
            names = (_UPLOAD.fullmatch(path.name) for path in self.rows.iterdir())
            number = max((int(name[1]) for name in names if name), default=0) + 1
            stored = self.rows / f"rows-{number}{suffix}"
            with suppress(FileExistsError):
                write_file(FileLayer(), name_file(stored), label.encode("utf-8", "replace"))
                return stored

    def delete_upload(self, name: str) -> None:
        """Delete an upload. Raises UsageError if there is none of this name."""
        path = self.upload(name)
        path.unlink()
        self.mark_unreadable(name, unreadable=False)
        # An empty label remains, so that a command with this path never reads the rows of a later upload.
        replace_file(FileLayer(), name_file(path), b"")

    def mark_unreadable(self, name: str, *, unreadable: bool) -> None:
        """Remember whether an upload could be read."""
        mark = self.rows / f"{name}{_UNREADABLE}"
        if unreadable:
            replace_file(FileLayer(), mark, b"")
        else:
            mark.unlink(missing_ok=True)

    def unreadable(self) -> set[str]:
        """Return the names of the uploads that could not be read."""
        return {path.name.removesuffix(_UNREADABLE) for path in self.rows.glob(f"*{_UNREADABLE}")}

    def exported(self, name: str) -> list[tuple[str, int]]:
        """Return (file name, bytes) of each converted adapter of a run."""
        files = (path for path in (self.exports / name).glob("*") if path.is_file())
        return sorted((path.name, path.stat().st_size) for path in files)

    def upload(self, name: str) -> Path:
        """Return the path of an upload. Raises UsageError if there is none of this name."""
        if name not in self.uploads():
            raise UsageError(
                "there is no such file of rows any more", next_step="choose another one, or upload it again"
            )
        return self.rows / name

    def own_names(self, text: str) -> str:
        """Return a message with the names that uploads had in the browser, and paths below the studio's directory."""
        return _UPLOAD_IN_TEXT.sub(
            lambda found: self._own_name(found[0]),
            text.replace(f"{self.rows}{os.sep}", "").replace(f"{self.root}{os.sep}", ""),
        )

    def _own_name(self, upload: str) -> str:
        return uploaded_name(self.rows / upload)

    def save_context(self, text: str) -> str:
        """Write a prompt that a run turns into an adapter, under a name made from its text; return the name.

        Raises:
            ResourceError: there are too many, or the disk is full.
        """
        data = text.encode("utf-8", "replace")
        path = self.rows / f"context-{hashlib.sha256(data).hexdigest()[:16]}.txt"
        if not path.exists():
            if len([*self.rows.glob("context-*.txt")]) >= MAX_UPLOADS:
                next_step = f"delete some of the files context-*.txt in {self.rows}"
                raise ResourceError(f"there are {MAX_UPLOADS} prompts already", next_step=next_step)
            with save_errors("the prompt", self.rows, len(data)):
                replace_file(FileLayer(), path, data, 0o600)
        return path.name

    def context(self, name: str) -> Path:
        """Return the path of a prompt. Raises UsageError if there is none of this name."""
        path = self.rows / name
        if not _CONTEXT.fullmatch(name) or not path.is_file():
            raise UsageError("there is no such prompt", next_step="go back to What to learn, and write or paste it")
        return path

    def allowed(self, name: str) -> Path:
        """Return the resolved path.

        Raises:
            UsageError: it is neither below the studio's directory nor below an allowed folder.
        """
        try:
            path = (self.root / Path(name).expanduser()).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError("this is not a possible path", why=short_reason(error)) from None
        if not any(path.is_relative_to(folder) for folder in (self.root.resolve(), *self._allowed)):
            raise UsageError(
                f"{path} is not in a folder that this page may read",
                next_step=f"start it with --allow {path.parent}, or upload the file",
            )
        return path

    def run(self, name: str) -> Path:
        """Return the path for a run of this name, which need not exist. Raises UsageError."""
        return self.runs / checked_name(name)

    def free_name(self, wanted: str) -> str:
        """Return a possible name that no run has, made from another text."""
        stem = re.sub(r"[^\w-]+|_+", " ", wanted).strip(" -")[:50].strip(" -") or "run"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not self.taken(name))

    def taken(self, name: str) -> bool:
        """Return True if a run, or a start that waits, has this name."""
        return self.run(name).exists() or self.job_file(name).exists() or name in self.queued()

    def queued(self) -> dict[str, Path]:
        """Return the files of the starts that wait, by the name of the run, in their order."""
        return {path.stem.partition("-")[2]: path for path in sorted(self.queue.glob("*.json"))}

    def job_file(self, name: str) -> Path:
        """Return the path of the record of a run's last start."""
        return self.jobs / f"{name}.json"

    def log_file(self, name: str) -> Path:
        """Return the path of the output of a run's last start."""
        return self.jobs / f"{name}.log"

    def rename(self, old: str, new: str) -> None:
        """Rename a run with its log and exports. Raises UsageError if the new name is taken or not possible."""
        if self.taken(new):
            raise UsageError(f"there is a run {new} already", next_step="give another name")
        for place in (self.run, self.job_file, self.log_file, self.exports.joinpath):
            if place(old).exists():
                place(old).rename(place(new))

    def delete(self, name: str) -> None:
        """Delete a run with its log and exports. Raises ResourceError."""
        files = FileLayer()
        with save_errors("the deletion", self.root, 0):
            for path in (self.run(name), self.exports / name, self.job_file(name), self.log_file(name)):
                remove_tree(files, path)


def is_possible(name: str) -> bool:
    """Return True if a run may have this name."""
    return _NAME.fullmatch(name) is not None


def checked_name(name: str) -> str:
    """Return a run's name. Raises UsageError unless it is letters, digits, spaces, underscores and hyphens."""
    if not is_possible(name):
        raise UsageError(
            f"{name!r} is not a possible name of a run",
            why="a name has at most 60 letters, digits, spaces, underscores and hyphens, and starts with a letter",
            next_step="give another name",
        )
    return name


def _upload(path: Path) -> Upload:
    status = path.stat()
    return Upload(uploaded_name(path), status.st_size, datetime.fromtimestamp(status.st_mtime, UTC).isoformat())
