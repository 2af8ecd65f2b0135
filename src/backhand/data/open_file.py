"""Opening a data file, plain or gzip, and telling by its first bytes what it is."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backhand.errors import DataError

HEAD_BYTES = 4096
UTF8_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_READ_FAULTS = (OSError, EOFError, zlib.error)


@contextmanager
def open_bytes(path: str | Path) -> Iterator[io.BufferedReader]:
    """Open `path` for reading as bytes; gzip, known by its first bytes, is unpacked on the way. Pipes work.

    Raises:
        DataError: not there, a folder, not readable, or broken while it was read.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            if raw.peek(2)[:2] != b"\x1f\x8b":
                yield raw
                return
            with io.BufferedReader(gzip.GzipFile(fileobj=raw), HEAD_BYTES) as reader:
                yield reader  # type: ignore[misc]
    except FileNotFoundError:
        raise DataError("there is no such file", where=str(path)) from None
    except IsADirectoryError:
        raise DataError("this is a folder, not a file", where=str(path)) from None
    except _READ_FAULTS as error:
        raise DataError("the file cannot be read", where=str(path), why=str(error)) from None


def is_parquet(reader: io.BufferedReader) -> bool:
    """Whether the file begins as Parquet does."""
    return head_of(reader).startswith(b"PAR1")


def head_of(reader: io.BufferedReader) -> bytes:
    """The first bytes, up to `HEAD_BYTES`, without consuming them."""
    return reader.peek(HEAD_BYTES)[:HEAD_BYTES]


def start_text(reader: io.BufferedReader, path: str | Path) -> bytes:
    """Check that the file is UTF-8 text by its look, move past a byte-order mark, and return the head after it.

    Raises:
        DataError: empty, UTF-16 or UTF-32, a zip archive, a web page, a Git LFS pointer or other binary data.
    """
    head = head_of(reader)
    where = f"{path}:1"
    if not head:
        raise DataError("the file is empty", where=str(path), next_step=_EMPTY)
    wide = next((name for mark, name in _WIDE_BOMS if head.startswith(mark)), None) or _wide_without_mark(head)
    if wide:
        raise DataError(
            f"the file is {wide}, not UTF-8",
            where=where,
            next_step=f"convert it: iconv -f {wide} -t UTF-8 OLD > NEW",
        )
    if head.startswith(b"PK\x03\x04"):
        raise DataError("the file is a zip archive", where=where, next_step="unpack it first")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(
            "the file is a Git LFS pointer, not the data itself", where=where, next_step="fetch it: git lfs pull"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise DataError(
            "the file is a web page, not data", where=where, next_step="download the raw file instead of its page"
        )
    if b"\0" in head:
        raise DataError(
            "the file is binary, not text",
            where=where,
            why="there is a zero byte near its beginning",
            next_step="give rows as JSON lines, CSV or Parquet; a Parquet file is told by its first bytes PAR1",
        )
    if head.startswith(UTF8_BOM):
        reader.read(len(UTF8_BOM))
        head = head[len(UTF8_BOM) :]
        if not head:
            raise DataError("the file is empty", where=str(path), next_step=_EMPTY)
    return head


_EMPTY = "look whether it was written to the end, or give another file"


def _wide_without_mark(head: bytes) -> str | None:
    """UTF-16 that lacks its mark: every other byte of ASCII text is then zero."""
    even, odd = head[0::2], head[1::2]
    if len(head) < 4 or not even or not odd:
        return None
    shares = even.count(0) / len(even), odd.count(0) / len(odd)
    if max(shares) > 0.4 and min(shares) < 0.1:
        return "UTF-16BE" if shares[0] > shares[1] else "UTF-16LE"
    return None
