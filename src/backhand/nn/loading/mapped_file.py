"""A memory-mapped file, and a check that it is still the file that was opened.

Pages that have not been read yet, or were released, come from the disk later. A file that changes during a run would
therefore change the run's numbers. `check` compares size and modification time of the open file, and the inode that
the path leads to. It costs two system calls. A page that has disappeared between two checks raises a bus error, which
`kernels.bus_error` handles.
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
    """A regular file, mapped private and copy-on-write, so that writes never reach the file.

    Raises:
        ArtifactError: if the file is empty or cannot be read.
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
                f"{path} cannot be read: {error.strerror or error}", next_step="check the path and its permissions"
            ) from None
        self._opened = os.fstat(self._descriptor)
        # Descriptor and watch belong to the mapping, because arrays over it can outlive this object.
        weakref.finalize(self.data, os.close, self._descriptor)
        address = np.frombuffer(self.data, np.uint8).ctypes.data
        watch_mapping(self.data, address, len(self.data), self._descriptor, str(path))

    def check(self) -> None:
        """Check that the file is unchanged since it was opened.

        Raises:
            ArtifactError: if its size or modification time has changed, or its path leads to another file or to none.
        """
        was = self._opened
        try:
            now = os.fstat(self._descriptor)
        except OSError as error:
            raise self._changed(f"it can no longer be read: {error.strerror or error}") from None
        if now.st_size != was.st_size:
            raise self._changed(f"it had {was.st_size:,} bytes and has {now.st_size:,}")
        if now.st_mtime_ns != was.st_mtime_ns:
            raise self._changed(
                f"it was written to at {_moment(now)}; before that it was last changed at {_moment(was)}"
            )
        try:
            at_path = self.path.stat()
        except FileNotFoundError:
            raise self._changed("it was removed or renamed") from None
        except OSError as error:
            raise self._changed(f"it is out of reach: {error.strerror or error}") from None
        if (at_path.st_dev, at_path.st_ino) != (was.st_dev, was.st_ino):
            raise self._changed(f"its path now leads to another file of {at_path.st_size:,} bytes")

    def _changed(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} has changed while it was in use",
            why=why,
            next_step="restore the file; a run continues from its last checkpoint with --resume",
        )


def _moment(status: os.stat_result) -> str:
    return datetime.fromtimestamp(status.st_mtime).astimezone().isoformat(sep=" ", timespec="milliseconds")
