"""Reading files: type detection, size limits, and a check that no input lies inside the output.

A path may name a pipe without a writer or a device that never ends. These functions neither wait for the former nor
read the latter.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from backhand import json_shape
from backhand.errors import UsageError
from backhand.system import NO_LINK, NO_WAIT, PLAIN, others_can_write, wait_for_pipe

T = TypeVar("T")

MAX_SETTINGS_BYTES = 8 * 2**20
"""Size limit of files that contain settings, as opposed to tensors or rows."""
MAX_TABLES_BYTES = 2**28
"""Size limit of files that contain lists of names: tokenizers and indices of weights."""
_PIPE_WAIT_S = 30


def name_file(path: Path) -> Path:
    """Return the path of the file with the name that an uploaded file had before."""
    return path.with_name(f"{path.name}.name")


def uploaded_name(path: Path) -> str:
    """Return the name that an uploaded file had before, or the file's own name."""
    try:
        return read_settings(name_file(path)) or path.name
    except (OSError, ValueError):  # a record of another machine may contain a path that is none
        return path.name


def open_plain(path: Path | str, *, or_pipe: bool = False, private: bool = False) -> io.BufferedReader:
    """Open a regular file for reading, without waiting. A link is followed.

    Args:
        or_pipe: also accept a pipe, such as `<(command)`, if it has data within half a minute.
        private: refuse a link, and a file that another user owns or may write to.

    Raises:
        OSError: it cannot be opened, or it is no regular file; `strerror` names the type.
        ValueError: the path contains a zero character.
    """
    descriptor = os.open(path, os.O_RDONLY | NO_WAIT | PLAIN | (NO_LINK if private else 0))
    try:
        status = os.fstat(descriptor)
        mode = status.st_mode
        pipe = or_pipe and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode) and not pipe:
            raise OSError(errno.EINVAL, f"it is {_kind_of_node(mode)}, not a plain file", str(path))
        if private:
            _check_private(status, path)
        if pipe and not wait_for_pipe(descriptor, _PIPE_WAIT_S):
            why = f"it is a pipe, and nothing came out of it for {_PIPE_WAIT_S} s"
            raise OSError(errno.ETIMEDOUT, why, str(path))
        return open(descriptor, "rb")  # noqa: PTH123 - the caller closes it
    except BaseException:
        os.close(descriptor)
        raise


def check_private_folder(path: Path) -> None:
    """Raise OSError if the folder does not exist, or if another user owns it or may write to it."""
    _check_private(path.stat(), path)


def _check_private(status: os.stat_result, path: Path | str) -> None:
    if others_can_write(status):
        raise PermissionError(errno.EPERM, "another user owns it or may write to it", str(path))


def read_plain(path: Path | str, most: int | None = None) -> bytes:
    """Return the bytes of a regular file.

    Args:
        most: the largest size; None for the size of the file when it is opened.

    Raises:
        OSError: as `open_plain`, and if the file is larger or grows while it is read.
    """
    with open_plain(path) as file:
        limit = os.fstat(file.fileno()).st_size if most is None else most
        data = file.read(limit + 1)
    if len(data) > limit:
        why = "it grows while it is read" if most is None else f"it has more than {most:,} bytes"
        raise OSError(errno.EFBIG, why, str(path))
    return data


def read_settings(path: Path | str) -> str:
    """Return the text of a small file; invalid UTF-8 becomes U+FFFD. Raises OSError as `read_plain`."""
    return read_plain(path, MAX_SETTINGS_BYTES).decode("utf-8", "replace")


def read_json(path: Path | str, shape: type[T]) -> T:
    """Read a small JSON file of a shape, see `json_shape`. Raises OSError as `read_plain`, and ValueError."""
    return json_shape.load(read_plain(path, MAX_SETTINGS_BYTES), shape)


def _kind_of_node(mode: int) -> str:
    devices = (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), *devices)
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "something else")


_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer (run `git lfs pull`, or download the file itself)"),
    (b"PK\x03\x04", "a zip archive, perhaps from torch.save"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\x93NUMPY", "a NumPy array"),
)


def kind_of(head: bytes) -> str | None:
    """Return the type of a file that is often given by mistake, from its first few hundred bytes.

    Returns:
        A noun phrase for an error message, or None if the type is not recognised.
    """
    if not head:
        return "an empty file"
    if head[4:9] == b"\0\0\0\0{":
        # The length of a safetensors header and its first brace. A length of 640 would look like a pickle.
        return None
    if kind := next((kind for magic, kind in _MAGIC if head.startswith(magic)), None):
        return kind
    if len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6):
        return "a Python pickle, which could run code when opened"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "an HTML page, perhaps an error or login page of the server it came from"
    return None


def refuse_inputs_inside(
    output: Path, inputs: Mapping[str, Path | str | None], *, owned: Collection[str] | None = None
) -> None:
    """Refuse an input that is, or lies in, a directory that is about to be replaced.

    Args:
        owned: names in `output` that are replaced; all names if None.

    Raises:
        UsageError: an input would be replaced; the first one is named.
    """
    root = _resolved(output)
    for option, given in inputs.items():
        if given is None or not os.path.lexists(given):
            continue
        for place in (_resolved(Path(given)), Path(os.path.abspath(given))):  # noqa: PTH100 - a link is an input too
            if not place.is_relative_to(root):
                continue
            parts = place.relative_to(root).parts
            if not parts or owned is None or parts[0] in owned:
                raise UsageError(
                    f"{given} is part of what --overwrite replaces",
                    where=option,
                    why=f"it lies in {output}",
                    next_step="give another --output, or copy it to another place first",
                )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()
