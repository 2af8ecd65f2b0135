"""All file writing: atomic and fsynced.

`FileLayer` has one method per call that changes the disk, so that tests can make any of them fail. A crash may happen
between any two calls, and the system may lose data that was not synced. Checkpoints are built from `write_file`,
`FileLayer.rename` and `FileLayer.sync_directory` alone.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from backhand.errors import RESUME_STEP, BackhandError, ResourceError, UsageError
from backhand.system import NO_WAIT, PLAIN, open_unnamed, sync_directory

_WRITE_BYTES = 1 << 24


class FileLayer:
    """The calls of the operating system that change files. Each may raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Create a directory that does not exist yet."""
        path.mkdir()

    def open_new(self, path: Path) -> int:
        """Create a file that does not exist yet, with the umask's mode; return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o666)

    def open_to_append(self, path: Path) -> int:
        """Open a file for appending, or create it; return its descriptor. A pipe is not waited for."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_WAIT | PLAIN, 0o666)

    def open_unnamed(self, directory: Path) -> int:
        """Open a temporary file that disappears when it is closed; return its descriptor."""
        return open_unnamed(directory)

    def set_mode(self, descriptor: int, mode: int) -> None:
        """Set a file's permission bits, if the system has them."""
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; return the number of bytes."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until the file is on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def size(self, path: Path) -> int:
        """Return the size of a file in bytes."""
        return path.stat().st_size

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in a directory are on the disk."""
        sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or directory. An existing file is replaced atomically."""
        source.replace(target)

    def remove_file(self, path: Path) -> None:
        """Remove a file or a link."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()


def write_file(files: FileLayer, path: Path, data: bytes, mode: int | None = None) -> None:
    """Create a file, sync it and check its size. The mode is the umask's if it is None.

    Raises OSError; part of the file may then exist.
    """
    descriptor = files.open_new(path)
    try:
        if mode is not None:
            files.set_mode(descriptor, mode)
        write_all(files, descriptor, data)
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    written = files.size(path)
    if written != len(data):
        raise OSError(errno.EIO, f"the file has {written} bytes after {len(data)} were written", str(path))


def write_all(files: FileLayer, descriptor: int, data: bytes | memoryview) -> None:
    """Write all bytes, in several calls if necessary. Raises OSError."""
    rest = memoryview(data)
    while rest:
        written = files.write(descriptor, rest[:_WRITE_BYTES])
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest = rest[written:]


def sync_file(files: FileLayer, path: Path) -> None:
    """Wait until a file is on the disk, if it exists. Raises OSError."""
    if not path.exists():
        return
    descriptor = files.open_to_append(path)
    try:
        files.sync(descriptor)
    finally:
        files.close(descriptor)


def replace_file(files: FileLayer, path: Path, data: bytes, mode: int | None = None) -> None:
    """Replace a file atomically: after a crash, either the old file or the new file exists. Raises OSError."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    remove_tree(files, temporary)
    try:
        write_file(files, temporary, data, mode)
        files.rename(temporary, path)
    except BaseException:  # including a second Ctrl-C
        with suppress(OSError):
            remove_tree(files, temporary)
        raise
    files.sync_directory(path.parent)


def remove_tree(files: FileLayer, path: Path) -> None:
    """Remove a file or a directory tree, if it exists. Links are removed, not followed. Raises OSError."""
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
def save_errors(what: str, path: Path, needed_bytes: int, *, again: str = RESUME_STEP) -> Iterator[None]:
    """Convert an OSError while saving into a BackhandError that gives the bytes needed and free.

    Raises:
        ResourceError: disk full, quota, file-size limit, missing permission, input/output error.
        UsageError: a file of another type blocks the path.
    """
    try:
        yield
    except OSError as error:
        raise _explained(what, path, needed_bytes, error, again) from error


@contextmanager
def directory_errors(path: Path) -> Iterator[None]:
    """Convert an OSError while a run directory is created, read or locked into a BackhandError.

    Raises:
        ResourceError: disk full, quota, missing permission, input/output error.
        UsageError: a file of another type blocks the path.
    """
    try:
        yield
    except OSError as error:
        kind: type[BackhandError] = UsageError if error.errno in _BLOCKED else ResourceError
        if error.errno in _BLOCKED:
            why, remedy = f"{error.strerror}: {error.filename or path}", "move that file"
        else:
            why, remedy = reason(error), _remedy(error, otherwise="check the disk")
            if error.errno == errno.EACCES and error.filename and Path(error.filename) != path:
                why = f"{error.strerror}: {error.filename}"
        step = f"{remedy}, or give another --output"
        raise kind(f"{path} cannot be used as a run directory", where="output", why=why, next_step=step) from error


# For a pipe, `reading.open_plain` raises EINVAL, and `FileLayer.open_to_append` ENXIO.
_BLOCKED = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO)


def _explained(what: str, path: Path, needed_bytes: int, error: OSError, again: str) -> BackhandError:
    if error.errno in _BLOCKED:
        return UsageError(
            f"{what} cannot be saved",
            where=str(error.filename or path),
            why=error.strerror,
            next_step=f"move that file, then {again}",
        )
    if error.errno == errno.ENOENT and not path.exists():
        return ResourceError(
            f"{what} cannot be saved",
            where=str(path),
            why="the directory is gone: it was removed or renamed while this command ran",
            next_step=f"restore it under this name, then {again}; if it is lost, start again",
        )
    why = reason(error)
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        why += f"; {needed_bytes:,} bytes are needed{_free(path)}"
    remedy = _remedy(error, otherwise="check the disk, or copy the run to another one")
    return ResourceError(
        f"{what} cannot be saved",
        where=str(path),
        why=why,
        next_step=f"earlier checkpoints are intact: {remedy}, then {again}",
    )


def _remedy(error: OSError, *, otherwise: str) -> str:
    if _short_write(error):
        return "free space, or raise the limit (ulimit -f)"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free space"
        case errno.EFBIG:
            return "raise the limit (ulimit -f)"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "make the directory writable"
    return otherwise


def _free(path: Path) -> str:
    free = free_bytes(path)
    return "" if free is None else f", {free:,} are free"


def free_bytes(path: Path) -> int | None:
    """Return the free bytes on the disk of a path, which need not exist yet; None if the system does not report it."""
    for place in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the directory is not writable",
    errno.EPERM: "the directory is not writable",
}


def make_directory(directory: Path) -> None:
    """Create a directory and its parents, if they do not exist.

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
    """Write a file atomically, through a temporary file in the same directory.

    A replaced file keeps its mode; a new one has the umask's.

    Raises:
        UsageError: `path` is no regular file. Replacing a link or a device would destroy it.
        ResourceError: disk full, missing permission, file-size limit. The old file is unchanged, without leftovers.
    """
    mode = replaceable_mode(path)
    try:
        replace_file(FileLayer(), path, data, mode)
    except OSError as error:
        raise resource_error("cannot be written", path, error, needed_bytes=len(data)) from None


def write_together(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that belong together: first all temporary files, then all renames.

    A directory that was created for them is removed again if writing fails.

    Raises:
        UsageError: the directory is a file, or one of the paths is no regular file.
        ResourceError: disk full, missing permission, file-size limit. Existing files are unchanged.
    """
    modes = {name: replaceable_mode(directory / name) for name in contents}
    places = {name: directory / f".{name}.{os.getpid()}.tmp" for name in contents}
    with made_directory(directory):
        try:
            for name, data in contents.items():
                with suppress(FileNotFoundError):  # from a killed process with the same number
                    places[name].unlink()
                write_file(FileLayer(), places[name], data, modes[name])
            for name in contents:
                places[name].replace(directory / name)
            sync_directory(directory)
        except OSError as error:
            needed = sum(map(len, contents.values()))
            raise resource_error("cannot be written", directory, error, needed_bytes=needed) from None
        finally:
            for place in places.values():
                with suppress(OSError):
                    place.unlink()


@contextmanager
def made_directory(directory: Path) -> Iterator[None]:
    """Create a directory and its parents for the block; if the block fails, remove those created that are empty.

    Raises:
        UsageError: the path, or a parent, is a file.
        ResourceError: it cannot be created.
    """
    missing = _missing(directory)
    try:
        make_directory(directory)
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def check_directory(directory: Path) -> None:
    """Check that a directory exists or can be created. It is created for a moment, since only that is certain.

    Raises:
        UsageError: the path, or a parent, is a file.
        ResourceError: it cannot be created.
    """
    missing = _missing(directory)
    with made_directory(directory):
        _remove_empty(missing)


def _missing(directory: Path) -> list[Path]:
    """Return the directory and its parents that do not exist, the innermost first."""
    return [place for place in (directory, *directory.parents) if not place.exists()]


def _remove_empty(directories: Iterable[Path]) -> None:
    for place in directories:
        with suppress(OSError):
            place.rmdir()


def replaceable_mode(path: Path) -> int | None:
    """Return the permission bits of the regular file at `path`, or None if there is none or it cannot be examined.

    Raises:
        UsageError: `path` is no regular file. Replacing a link or a device would destroy it.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None  # a missing permission is found when the file is written
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
        raise UsageError(
            f"this is {kind} and will not be replaced", where=str(path), next_step="remove it, or give another output"
        )
    return stat.S_IMODE(mode)


def _short_write(error: OSError) -> bool:
    """Return True for NumPy's error about a short write: its `tofile` does not report the system's reason."""
    return error.errno is None and re.search(r"\d requested and \d|^Not enough free space", str(error)) is not None


def reason(error: OSError) -> str:
    """Return the reason of a failed write in words."""
    if _short_write(error):
        return "the disk is full, or the file-size limit is reached"
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def resource_error(what: str, path: Path, error: OSError, *, needed_bytes: int | None = None) -> ResourceError:
    """Convert the system's error about writing to `path`."""
    needed = f"; {needed_bytes:,} bytes are needed" if needed_bytes is not None else ""
    remedy = _remedy(error, otherwise="check the disk")
    return ResourceError(
        what, where=str(path), why=reason(error) + needed, next_step=f"{remedy}, or choose another directory"
    )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder next to `output`; at the end, rename it to `output`.

    If the block raises, for example because a proof fails, `output`, the folder and parents made for them are not left.

    Raises:
        UsageError: `output` exists, or lies below a file.
        ResourceError: disk full, not writable, file-size limit.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link, which is then refused
    folder = output.parent / f".{output.name}.{os.getpid()}.tmp"
    with made_directory(output.parent):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # from a killed process with the same number
            folder.mkdir()
            yield folder / output.name
            _sync(folder / output.name)
            if output.is_symlink() or output.exists():
                raise UsageError(f"{output} exists", where="output", why="it was created while this command ran")
            (folder / output.name).rename(output)
            sync_directory(output.parent)
        except OSError as error:
            raise resource_error("cannot be written", output, error) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or a directory tree is on the disk. Raises OSError."""
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
        sync_directory(path)
        return
    with path.open("rb" if os.name == "posix" else "r+b") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def csv_bytes(header: Sequence[str], lines: Iterable[Sequence[object]]) -> bytes:
    """Return a table as the bytes of a .csv file."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return file.getvalue().encode()


def write_with_summary(directory: Path, files: Mapping[str, bytes], summary: Mapping[str, object]) -> list[str]:
    """Write each file atomically, and a summary.json that lists them; return all names.

    Raises:
        UsageError: `directory` is a file.
        ResourceError: a file cannot be written.
    """
    make_directory(directory)
    names = [*files, "summary.json"]
    for name, data in {**files, "summary.json": json_bytes({**summary, "files": names})}.items():
        write_atomically(directory / name, data)
    return names


def json_bytes(value: object) -> bytes:
    """Return a summary as indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
