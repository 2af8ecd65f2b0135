"""A file in memory, page by page as it is read, and whether it still is the file that was opened.

Pages that were not read yet, or were given back, come from the disk again, so that a file that changes under a run
would change its numbers. What is looked at, `check`, costs two calls of the system: size and time of the last change of
the open file, and which file the path now leads to. What no look can find in time, a page that is gone when it is read,
is a bus error and ends in `kernels.bus_error`.
"""

from __future__ import annotations

import mmap
import os
import weakref
from datetime import datetime
from pathlib import Path

import numpy as np

from backhand.errors import ArtifactError
from backhand.kernels.bus_error import watch_mapping
from backhand.reading import open_plain


class MappedFile:
    """A plain file, mapped private and copy-on-write: nothing written to it reaches the file.

    Raises:
        ArtifactError: for a file that is empty or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_plain(path) as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._descriptor = os.dup(file.fileno())
        except ValueError:
            raise ArtifactError(f"{path} is empty", next_step="fetch the file again") from None
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be read: {error.strerror or error}", next_step="check the path and who may read it"
            ) from None
        self._opened = os.fstat(self._descriptor)
        # Both belong to the mapping, which the arrays made of it keep, perhaps for longer than this object.
        weakref.finalize(self.data, os.close, self._descriptor)
        address = np.frombuffer(self.data, np.uint8).ctypes.data
        watch_mapping(self.data, address, len(self.data), self._descriptor, str(path))

    def check(self) -> None:
        """Look whether it is as it was when it was opened.

        Raises:
            ArtifactError: it is shorter, longer or written to; or its path leads to another file, or to none.
        """
        was = self._opened
        try:
            now = os.fstat(self._descriptor)
        except OSError as error:
            raise self._changed(f"it can no longer be read: {error.strerror or error}") from None
        if now.st_size != was.st_size:
            raise self._changed(f"it had {was.st_size:,} bytes and has {now.st_size:,}")
        if now.st_mtime_ns != was.st_mtime_ns:
            raise self._changed(f"it was written to at {_moment(now)}; it was as of {_moment(was)}")
        try:
            there = self.path.stat()
        except FileNotFoundError:
            raise self._changed("it was removed or renamed") from None
        except OSError as error:
            raise self._changed(f"it is out of reach: {error.strerror or error}") from None
        if (there.st_dev, there.st_ino) != (was.st_dev, was.st_ino):
            raise self._changed(f"another file of {there.st_size:,} bytes has taken its place")

    def _changed(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} has changed while it was in use",
            why=why,
            next_step="put the file back as it was; a run goes on from its last checkpoint with --resume",
        )


def _moment(status: os.stat_result) -> str:
    return datetime.fromtimestamp(status.st_mtime).astimezone().isoformat(sep=" ", timespec="milliseconds")
