"""Open data files as bytes, and check that they contain UTF-8 text."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backhand.errors import DataError
from backhand.reading import open_plain

HEAD_BYTES = 4096


UTF8_BOM = b"\xef\xbb\xbf"


_WIDE_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


_OFFICE_97 = bytes.fromhex("d0cf11e0a1b11ae1")
"""First bytes of .xls and .doc."""


_READ_FAULTS = (OSError, EOFError, zlib.error)


@contextmanager
def open_bytes(path: str | Path) -> Iterator[io.BufferedReader]:
    """Open `path` as bytes. Files with the magic bytes of gzip are decompressed. Pipes work.

    Raises:
        DataError: the path does not exist, is a directory, or cannot be read.
    """
    path = Path(path)
    try:
        with open_plain(path, or_pipe=True) as raw:
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
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError("the file cannot be read", where=str(path), why=why) from None


def head_of(reader: io.BufferedReader) -> bytes:
    """Return the first bytes, up to `HEAD_BYTES`, without consuming them."""
    return reader.peek(HEAD_BYTES)[:HEAD_BYTES]


def start_text(reader: io.BufferedReader, path: str | Path) -> bytes:
    """Check that the file looks like UTF-8 text, skip a byte-order mark, and return the first bytes after it.

    Raises:
        DataError: empty, UTF-16 or UTF-32, a zip archive, a web page, a Git LFS pointer or other binary data.
    """
    head = head_of(reader)
    where = f"{path}:1"
    if not head:
        raise DataError("the file is empty", where=str(path), next_step=_EMPTY)
    wide = next((name for mark, name in _WIDE_BOMS if head.startswith(mark)), None) or _wide_without_mark(head)
    zipped, git_lfs = head.startswith(b"PK\x03\x04"), head.startswith(b"version https://git-lfs")
    page = head.lstrip().lower().startswith((b"<!doctype", b"<html"))
    old, kind = head.startswith(_OFFICE_97), Path(path).suffix.lower()
    for holds, what, remedy in (
        (
            wide,
            f"{wide}, not UTF-8",
            f"{SAVE_AS_UTF8}; in a terminal: iconv -f {wide} -t UTF-8 OLD > NEW",
        ),
        ((zipped and b"xl/" in head) or (old and kind != ".doc"), "an Excel workbook", "save it as CSV UTF-8"),
        (
            (zipped and b"word/" in head) or old,
            "a Word document",
            "put its rows into a table, and save that as CSV UTF-8",
        ),
        (zipped and kind in (".xlsx", ".ods"), "a spreadsheet", "save it as CSV UTF-8"),
        (zipped, "a zip archive", "unpack it first; if it is a workbook, open it and save it as CSV UTF-8"),
        (git_lfs, "a Git LFS pointer, not the data itself", "fetch it: git lfs pull"),
        (page, "a web page, not data", "download the raw file instead of its page"),
    ):
        if holds:
            raise DataError(f"the file is {what}", where=where, next_step=remedy)
    if b"\0" in head:
        raise DataError(
            "the file is binary, not text",
            where=where,
            why="there is a zero byte near its beginning",
            next_step="give rows as JSON lines, CSV or Parquet; a Parquet file starts with the bytes PAR1",
        )
    if head.startswith(UTF8_BOM):
        reader.read(len(UTF8_BOM))
        head = head[len(UTF8_BOM) :]
        if not head:
            raise DataError("the file is empty", where=str(path), next_step=_EMPTY)
    return head


SAVE_AS_UTF8 = "from Excel or an editor, save it as CSV UTF-8"
_EMPTY = "check that it was written completely, or give another file"


def _wide_without_mark(head: bytes) -> str | None:
    """Detect UTF-16 without a byte-order mark: every other byte of ASCII text is zero."""
    even, odd = head[0::2], head[1::2]
    if len(head) < 4 or not even or not odd:
        return None
    shares = even.count(0) / len(even), odd.count(0) / len(odd)
    if max(shares) > 0.4 and min(shares) < 0.1:
        return "UTF-16BE" if shares[0] > shares[1] else "UTF-16LE"
    return None
