"""Writing a file so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from backhand.errors import ResourceError, UsageError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the directory is not writable",
    errno.EPERM: "the directory is not writable",
}


def make_directory(directory: Path) -> None:
    """Create a directory and its parents; an existing one is fine.

    Raises:
        UsageError: the path, or a parent, is a file.
        ResourceError: it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            "this is a file, not a directory", where=str(directory), next_step="give another output"
        ) from None
    except OSError as error:
        raise resource_error("cannot be created", directory, error) from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, and put it in place in one step.

    The mode follows the umask, or, where a file is replaced, that of the old file.

    Raises:
        UsageError: `path` is something else than a plain file: replacing a link or a device would destroy it.
        ResourceError: disk full, not writable, file-size limit; the old file is as it was, nothing is left beside it.
    """
    mode = replaceable_mode(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_and_sync(temporary, data, mode)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise resource_error("cannot be written", path, error, needed_bytes=len(data)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def replaceable_mode(path: Path) -> int | None:
    """Permission bits of the plain file at `path`; None where there is nothing, or its directory cannot be looked into.

    Raises:
        UsageError: `path` is something else than a plain file: replacing a link or a device would destroy it.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None  # whether a file can be made there is for the writing to find out
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
        raise UsageError(
            f"this is {kind} and will not be replaced", where=str(path), next_step="remove it, or give another output"
        )
    return stat.S_IMODE(mode)


def _write_and_sync(path: Path, data: bytes, mode: int | None) -> None:
    with suppress(FileNotFoundError):  # left by a process of the same number that was killed
        path.unlink()
    with path.open("xb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def reason(error: OSError) -> str:
    """Why the system did not write, in words."""
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def resource_error(what: str, path: Path, error: OSError, *, needed_bytes: int | None = None) -> ResourceError:
    """Our error for what the system said about writing to `path`."""
    needed = f"; {needed_bytes:,} bytes are needed" if needed_bytes is not None else ""
    return ResourceError(
        what, where=str(path), why=reason(error) + needed, next_step="free space, or choose another directory"
    )
