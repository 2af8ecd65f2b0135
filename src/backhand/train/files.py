"""The file layer: every call by which a run changes the disk, one method each, so that tests can fail any of them.

A crash may come between any two calls, and the system may lose what was not synced. `write_file` and `FileLayer.rename`
with `sync_directory` are all that checkpoints are built from.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backhand.adapters.atomic_files import reason, sync_directory
from backhand.errors import BackhandError, ResourceError, UsageError

_WRITE_BYTES = 1 << 24


class FileLayer:
    """Calls of the operating system that change files, and nothing else; each may raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Create a directory that does not exist yet."""
        path.mkdir()

    def open_new(self, path: Path) -> int:
        """Create a file that does not exist yet, its mode following the umask; return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def open_to_append(self, path: Path) -> int:
        """Open a file for appending, creating it if need be; return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; return how many bytes."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until the file is on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def size(self, path: Path) -> int:
        """Bytes in a file."""
        return path.stat().st_size

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in a directory are on the disk."""
        sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or directory a new name; an existing file is replaced in one step."""
        source.replace(target)

    def remove_file(self, path: Path) -> None:
        """Remove a file or a link."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()


def write_file(files: FileLayer, path: Path, data: bytes) -> None:
    """Create a file with these bytes, synced and of the right size. Raises OSError, perhaps with part of it there."""
    descriptor = files.open_new(path)
    try:
        write_all(files, descriptor, data)
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    written = files.size(path)
    if written != len(data):
        raise OSError(errno.EIO, f"{written} bytes are there of {len(data)} written", str(path))


def write_all(files: FileLayer, descriptor: int, data: bytes) -> None:
    """Write every byte, in as many calls as it takes. Raises OSError."""
    rest = memoryview(data)
    while rest:
        written = files.write(descriptor, rest[:_WRITE_BYTES])
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest = rest[written:]


def sync_file(files: FileLayer, path: Path) -> None:
    """Wait until what has been appended to a file is on the disk; nothing there is fine. Raises OSError."""
    if not path.exists():
        return
    descriptor = files.open_to_append(path)
    try:
        files.sync(descriptor)
    finally:
        files.close(descriptor)


def replace_file(files: FileLayer, path: Path, data: bytes) -> None:
    """Put a file in place of another in one step: after a crash there is the old one or the new one. Raises OSError."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    remove_tree(files, temporary)
    try:
        write_file(files, temporary, data)
        files.rename(temporary, path)
    except BaseException:  # a second Ctrl-C among them
        with suppress(OSError):
            remove_tree(files, temporary)
        raise
    files.sync_directory(path.parent)


def remove_tree(files: FileLayer, path: Path) -> None:
    """Remove a file, or a directory with all that is in it; links are removed, not followed. Nothing there is fine.

    Raises OSError.
    """
    try:
        is_directory = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_directory:
        files.remove_file(path)
        return
    for child in sorted(path.iterdir()):
        remove_tree(files, child)
    files.remove_directory(path)


@contextmanager
def saving(
    what: str, path: Path, needed_bytes: int, *, again: str = "run the same command with --resume"
) -> Iterator[None]:
    """Turn an OSError while saving into our error, with the bytes needed against those that are free.

    Args:
        what: is saved.
        path: the directory it is saved in.
        needed_bytes: its size.
        again: what to do once there is room.

    Raises:
        ResourceError: disk full, quota, file-size limit, not writable, input/output error.
        UsageError: something else than a directory is in the way.
    """
    try:
        yield
    except OSError as error:
        raise _explained(what, path, needed_bytes, error, again) from error


@contextmanager
def taking_directory(path: Path) -> Iterator[None]:
    """Turn an OSError while a run directory is made, read or locked into our error: nothing has been trained yet.

    Raises:
        ResourceError: disk full, quota, not writable, input/output error.
        UsageError: something else than a directory is in the way.
    """
    try:
        yield
    except OSError as error:
        what = f"{path} cannot hold a run"
        if error.errno in _IN_THE_WAY:
            raise UsageError(
                what,
                where="output",
                why=f"{error.strerror}: {error.filename or path}",
                next_step="move away what is in its place, or give another --output",
            ) from error
        raise ResourceError(
            what, where="output", why=reason(error), next_step=f"{_remedy(error)}, or give another --output"
        ) from error


_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)


def _explained(what: str, path: Path, needed_bytes: int, error: OSError, again: str) -> BackhandError:
    if error.errno in _IN_THE_WAY:
        return UsageError(
            f"{what} cannot be saved",
            where=str(error.filename or path),
            why=error.strerror,
            next_step=f"move away what is in its place, then {again}",
        )
    why = reason(error)
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        why += f"; {needed_bytes:,} bytes are needed{_free(path)}"
    return ResourceError(
        f"{what} cannot be saved",
        where=str(path),
        why=why,
        next_step=f"what was saved before is intact: {_remedy(error)}, then {again}",
    )


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free space"
        case errno.EFBIG:
            return "raise the limit (ulimit -f)"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "make the directory writable"
    return "look after the disk, or copy the run to another one"


def _free(path: Path) -> str:
    for place in (path, *path.parents):
        with suppress(OSError):
            return f", {shutil.disk_usage(place).free:,} are free"
    return ""
