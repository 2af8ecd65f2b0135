r"""A file of numbered records that only grows, found again under a digest; what is not whole in it is noticed.

    head      b"backhand records 1 " + digest + b"\n"
    record    number (4 bytes), length (4), CRC-32 of number, length and data (4), all little-endian; then the data

What it holds can be made anew, so nothing is synced and nothing is ever repaired: a checksum tells what is whole. A
file with another head, or whose last record is cut off, gives way to an empty one; a record that has changed since is
as if it were not there, and may be appended again, the last one of a number being the one that counts.
"""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

from backhand.files import FileLayer, remove_tree, write_all
from backhand.reading import open_plain

_HEAD = struct.Struct("<III")
_MAGIC = b"backhand records 1 "


class RecordFile:
    """Opened to read and to append; made where it is not there, and made anew where it is another one or damaged.

    Args:
        path: of the file; its directory exists.
        digest: of everything that decides what the records hold, in ASCII.

    Attributes:
        found: how many records were there.
        replaced: why what stood there was not used, or None.

    Raises:
        OSError: it cannot be made or read.
    """

    def __init__(self, files: FileLayer, path: Path, digest: str) -> None:
        self._files = files
        self._path = path
        self._head = _MAGIC + digest.encode("ascii") + b"\n"
        self._places: dict[int, tuple[int, int]] = {}  # where a record's data begins, and its length
        self._end = 0
        self.replaced = self._look()
        if self.replaced is not None:
            self._places.clear()
            remove_tree(files, path)
        self.found = len(self._places)
        self._make_or_open()

    def _make_or_open(self) -> None:
        new = not os.path.lexists(self._path)
        self._writing = self._files.open_new(self._path) if new else self._files.open_to_append(self._path)
        try:
            if new:
                write_all(self._files, self._writing, self._head)
                self._end = len(self._head)
            self._reading = open_plain(self._path)
        except BaseException:
            self._files.close(self._writing)
            raise

    def _look(self) -> str | None:
        """Find the records of a file that is there; why it is of no use, or None."""
        if self._path.is_symlink():
            return "it is a link"
        if not self._path.exists():
            return None
        with open_plain(self._path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(self._head)) != self._head:
                return "it was made for another base, other rows or another cut"
            self._end = len(self._head)
            while self._end < size:
                file.seek(self._end)
                head = file.read(_HEAD.size)
                number, length, _ = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0, 0)
                start, self._end = self._end + _HEAD.size, self._end + _HEAD.size + length
                if length == 0 or self._end > size:  # where the system lost what was not synced there may be zeros
                    return "it is cut off or damaged"
                self._places[number] = start, length
        return None

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def read(self, number: int) -> bytearray | None:
        """The data of a record; None where there is none, or it is no longer what was written."""
        if number not in self._places:
            return None
        start, length = self._places[number]
        record = bytearray(_HEAD.size + length)
        self._reading.seek(start - _HEAD.size)
        whole = False
        with suppress(OSError):
            whole = self._reading.readinto(record) == len(record)
        data = record[_HEAD.size :]
        if not whole or record[: _HEAD.size] != _head_of(number, data):
            del self._places[number]
            return None
        return data

    def append(self, number: int, data: bytes | memoryview) -> None:
        """Add a record. Raises OSError, perhaps with part of it there: the file is then of no more use."""
        write_all(self._files, self._writing, _head_of(number, data) + bytes(data))
        self._places[number] = self._end + _HEAD.size, len(data)
        self._end += _HEAD.size + len(data)

    def close(self, *, remove: bool = False) -> None:
        """Let go of the file; with `remove` it is gone afterwards. Raises OSError where it cannot be removed."""
        self._reading.close()
        with suppress(OSError):
            self._files.close(self._writing)
        if remove:
            remove_tree(self._files, self._path)


def _head_of(number: int, data: bytes | bytearray | memoryview) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(struct.pack("<II", number, len(data))))
    return _HEAD.pack(number, len(data), checksum)
