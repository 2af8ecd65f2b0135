"""Readers for text files: one JSON object a line, one JSON list, CSV. Line by line where the format allows it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backhand.data.rows import BadRows, RawRow, checked_row, latin1_error
from backhand.errors import DataError
from backhand.printing import going_on
from backhand.reading import open_plain
from backhand.words import in_words, shorten

_DELIMITERS = ",;\t|"
LONGEST_LINE_BYTES = 2**28
LONGEST_LIST_BYTES = 2**30
_SPACE = re.compile(r"[ \t\r\n]+")


def read_json_lines(reader: io.BufferedReader, path: str | Path, bad: BadRows) -> Iterator[RawRow]:
    """One JSON object a line; blank lines and carriage returns are nothing.

    Raises:
        DataError: with the line, unless `bad` counts it.
    """
    number = 0
    with going_on(lambda: f"reading {path}, line {number:,}"):
        while line := reader.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            source = f"{path}:{number}"
            if line.isspace():
                empty = _skip_empty_lines(reader)
                number += empty
                bad.empty_lines += empty + 1
                continue
            if len(line) > LONGEST_LINE_BYTES:
                raise DataError(
                    f"this line is longer than {in_words(LONGEST_LINE_BYTES)}",
                    where=source,
                    next_step="write one row a line",
                )
            try:
                text = line.decode("utf-8").strip()
                if text:
                    yield checked_row(parse_json(text, source), source)
            except UnicodeDecodeError as error:
                bad.add(latin1_error(source, line[error.start]))
            except DataError as error:
                bad.add(error)


def _skip_empty_lines(reader: io.BufferedReader) -> int:
    """Move past the lines of nothing but white space that follow, a buffer at a time; how many they were."""
    lines = 0
    while True:
        head = reader.peek()
        end = head.rfind(b"\n", 0, len(head) - len(head.lstrip())) + 1
        if not end:
            return lines
        lines += head.count(b"\n", 0, end)
        reader.read(end)


def parse_json(text: str, source: str) -> Any:
    """The value that `text`, a line, holds. Raises DataError: with the column and a look at what stands there."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        wrong = _json_error(error, text, source)
        if isinstance(error, json.JSONDecodeError) and text.startswith("{"):
            if error.pos >= len(text):
                wrong.next_step = "write a row on one line, or call the file .json, where it may go on over several"
            elif error.msg == "Extra data":
                wrong.next_step = "end the line behind the } that closes the row"
        raise wrong from None


class _TwiceError(ValueError):
    """A name that stands twice in one object."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"the name {shorten(twice)!r} stands in this JSON twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def _json_error(error: Exception, text: str, source: str) -> DataError:
    if isinstance(error, _TwiceError):
        return DataError(str(error), where=source, why="which of its values is meant is not known")
    if not isinstance(error, json.JSONDecodeError):
        return DataError("this JSON cannot be read", where=source, why=str(error))
    around = text[max(0, error.pos - 20) : error.pos + 20]
    shown = f" near {around!r}" if around.strip() else ""
    quoted = text[error.pos : error.pos + 1] == "'"
    return DataError(
        f"this is not valid JSON{shown}",
        where=source,
        why=f"{error.msg}, at column {error.colno}",
        next_step="JSON has double quotes: write rows with json.dumps, not with str or repr" if quoted else None,
    )


def read_json_values(reader: io.BufferedReader, path: str | Path, bad: BadRows) -> Iterator[RawRow]:
    """A JSON list of objects, or objects one after the other that may each run over several lines.

    The whole file is read at once. A syntax error ends the reading, whatever `bad` says: nothing after it is sure. A
    row that begins on the line of the one before it, as all do in a list that is written without line breaks, is named
    by its number as well: a row's source is its own.

    Raises:
        DataError: with the line.
    """
    text = _read_whole(reader, path)
    lines = _Lines(text)
    position = _skip_space(text, 0)
    in_list = text[position : position + 1] == "["
    position += in_list
    line_before = number = 0
    while True:
        position = _skip_space(text, position)
        number += 1
        line = lines.at(position)
        source = f"{path}:{line} row {number}" if line == line_before else f"{path}:{line}"
        line_before = line
        if position >= len(text):
            if in_list:
                raise _not_closed(source)
            return
        if in_list and text[position] == "]" and number == 1:
            break
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            where = f"{path}:{lines.at(error.pos)}" if isinstance(error, json.JSONDecodeError) else source
            raise _json_error(error, text, where) from None
        try:
            yield checked_row(value, source)
        except DataError as error:
            bad.add(error)
        if in_list:
            position = _skip_space(text, position)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                where, around = f"{path}:{lines.at(position)}", text[position : position + 20]
                if not around:
                    raise _not_closed(where)
                raise DataError(
                    f"a comma or a closing bracket is missing before {around!r}",
                    where=where,
                    next_step="add it, or write one object a line into a .jsonl file",
                )
            position += 1
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise DataError(
            f"something follows the end of the JSON list: {shorten(text[rest:], 20)!r}",
            where=f"{path}:{lines.at(rest)}",
            next_step="remove it, or write one object a line into a .jsonl file",
        )


class _Lines:
    """In which line places of a text stand, each of them behind the one before."""

    def __init__(self, text: str) -> None:
        self._text, self._line, self._counted = text, 1, 0

    def at(self, position: int) -> int:
        self._line += self._text.count("\n", self._counted, position)
        self._counted = max(self._counted, position)
        return self._line


def _not_closed(where: str) -> DataError:
    return DataError(
        "the JSON list is not closed",
        where=where,
        why="the file may have been cut off",
        next_step="write the file again, or end it with ]",
    )


def _read_whole(reader: io.BufferedReader, path: str | Path) -> str:
    content = reader.read(LONGEST_LIST_BYTES + 1)
    if len(content) > LONGEST_LIST_BYTES:
        raise DataError(
            f"the JSON in this file is longer than {in_words(LONGEST_LIST_BYTES)}",
            where=str(path),
            next_step="write one object a line into a .jsonl file, which is read line by line",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise latin1_error(f"{path}:{line}", content[error.start]) from None


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return position if found is None else found.end()


def read_csv(
    reader: io.BufferedReader, path: str | Path, bad: BadRows, delimiter: str | None = None
) -> Iterator[RawRow]:
    """Comma-separated values with a header line (RFC 4180); every value is text.

    Args:
        delimiter: what separates the cells; found from the header line if not given (`,`, `;`, tab or `|`).

    Raises:
        DataError: with the line where the row begins, unless `bad` counts it; always for a header that cannot be used.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    header_text = reader.peek(1 << 16).split(b"\n", 1)[0].decode("utf-8", "replace")
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda candidate: (header_text.count(candidate), candidate == ","))
    lines = io.TextIOWrapper(reader, encoding="utf-8", errors="surrogateescape", newline="")
    cells = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        with going_on(lambda: f"reading {path}, line {cells.line_num:,}"):
            yield from _csv_rows(cells, path, bad)
    finally:
        lines.detach()


def _csv_rows(cells: Any, path: str | Path, bad: BadRows) -> Iterator[RawRow]:
    header: list[str] | None = None
    while True:
        source = f"{path}:{cells.line_num + 1}"
        try:
            row = next(cells, None)
        except csv.Error as error:
            problem = DataError("this is not valid CSV", where=source, why=str(error))
            if header is None:
                raise problem from None
            bad.add(problem)
            continue
        if row is None:
            break
        if not row or row == [""]:
            bad.empty_lines += 1
            continue
        if header is None:
            header = _checked_header(row, source)
            continue
        try:
            if len(row) != len(header):
                raise DataError(
                    f"this row has {len(row)} cells, the header has {len(header)}",
                    where=source,
                    why="a cell that holds the delimiter, a quote or a line break must stand in double quotes",
                )
            yield checked_row(dict(zip(header, row, strict=True)), source, not_utf8=True)
        except DataError as error:
            bad.add(error)


def _checked_header(row: list[str], source: str) -> list[str]:
    header = [name.strip() for name in row]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"the header names {twice[0]!r} twice", where=source)
    checked_row(dict.fromkeys(header), source, not_utf8=True)
    return header


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
    zipped, git_lfs = head.startswith(b"PK\x03\x04"), head.startswith(b"version https://git-lfs")
    page = head.lstrip().lower().startswith((b"<!doctype", b"<html"))
    for holds, kind, remedy in (
        (wide, f"{wide}, not UTF-8", f"convert it: iconv -f {wide} -t UTF-8 OLD > NEW"),
        (zipped and Path(path).suffix.lower() in (".xlsx", ".ods"), "a spreadsheet", "save it as CSV, in UTF-8"),
        (zipped, "a zip archive", "unpack it first"),
        (git_lfs, "a Git LFS pointer, not the data itself", "fetch it: git lfs pull"),
        (page, "a web page, not data", "download the raw file instead of its page"),
    ):
        if holds:
            raise DataError(f"the file is {kind}", where=where, next_step=remedy)
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
