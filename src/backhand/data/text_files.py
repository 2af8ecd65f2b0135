"""Read text files: JSON lines, JSON lists and CSV, line by line where the format allows it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from backhand.data.raw_rows import LONGEST_ROW_BYTES, NO_TITLE, RawRow, RowErrors, checked_row, latin1_error, repeated
from backhand.errors import DataError
from backhand.printing import going_on
from backhand.words import in_words, shorten

_DELIMITERS = ",;\t|"
_TABLE_LINES = 4
_SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?\r?', re.IGNORECASE)
LONGEST_LIST_BYTES = 2**30
_SPACE = re.compile(r"[ \t\r\n]+")


def read_json_lines(reader: io.BufferedReader, path: str | Path, bad: RowErrors) -> Iterator[RawRow]:
    """Yield one row per line. Blank lines are skipped.

    Raises:
        DataError: a line is malformed and `bad` does not count it.
    """
    number = 0
    with going_on(lambda: f"reading {path}, line {number:,}"):
        while line := reader.readline(LONGEST_ROW_BYTES + 1):
            number += 1
            source = f"{path}:{number}"
            if line.isspace():
                empty = _skip_empty_lines(reader)
                number += empty
                bad.empty_lines += empty + 1
                continue
            if len(line) > LONGEST_ROW_BYTES:
                raise _too_long(source)
            try:
                text = line.decode("utf-8").strip()
                if text:
                    yield checked_row(parse_json(text, source), source, surrogates="\\u" in text)
            except UnicodeDecodeError as error:
                bad.add(latin1_error(source, line[error.start]))
            except DataError as error:
                bad.add(error)


def _too_long(source: str) -> DataError:
    what = f"this line is longer than {in_words(LONGEST_ROW_BYTES)}"
    return DataError(what, where=source, next_step="write one row per line")


def _skip_empty_lines(reader: io.BufferedReader) -> int:
    """Skip the following lines of only white space, one buffer at a time, and return their number."""
    lines = 0
    while True:
        head = reader.peek()
        end = head.rfind(b"\n", 0, len(head) - len(head.lstrip())) + 1
        if not end:
            return lines
        lines += head.count(b"\n", 0, end)
        reader.read(end)


def parse_json(text: str, source: str) -> Any:
    """Return the value in a line of JSON. Raises DataError with the column and an excerpt."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        wrong = _json_error(error, text, source)
        if isinstance(error, json.JSONDecodeError) and text.startswith("{"):
            if error.pos >= len(text):
                wrong.next_step = "write each row on one line, or name the file .json, in which rows may span lines"
            elif error.msg == "Extra data":
                wrong.next_step = "end the line after the } that closes the row"
        raise wrong from None


class _TwiceError(ValueError):
    """A duplicate name in one object."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, *_ = repeated(name for name, _ in pairs)
        raise _TwiceError(f"the name {shorten(twice)!r} occurs twice in this JSON object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def _json_error(error: Exception, text: str, source: str) -> DataError:
    if isinstance(error, _TwiceError):
        return DataError(str(error), where=source, why="it is unknown which of its values is meant")
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


def read_json_values(reader: io.BufferedReader, path: str | Path, bad: RowErrors) -> Iterator[RawRow]:
    """Yield rows from a JSON list of objects, or from consecutive objects that may span several lines.

    The whole file is read at once. A syntax error ends the reading even if `bad` counts errors, because what follows is
    uncertain. If a row starts on the same line as the row before, its source also has its number, to be unique.

    Raises:
        DataError: the file is not valid JSON, or a row is malformed and `bad` does not count it.
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
                    next_step="add it, or write one object per line into a .jsonl file",
                )
            position += 1
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise DataError(
            f"there is text after the end of the JSON list: {shorten(text[rest:], 20)!r}",
            where=f"{path}:{lines.at(rest)}",
            next_step="remove it, or write one object per line into a .jsonl file",
        )


class _Lines:
    """Line numbers of positions in a text, which must be asked for in ascending order."""

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
        why="the file may be truncated",
        next_step="write the file again, or end it with ]",
    )


def _read_whole(reader: io.BufferedReader, path: str | Path) -> str:
    content = reader.read(LONGEST_LIST_BYTES + 1)
    if len(content) > LONGEST_LIST_BYTES:
        raise DataError(
            f"the JSON in this file is longer than {in_words(LONGEST_LIST_BYTES)}",
            where=str(path),
            next_step="write one object per line into a .jsonl file, which is read line by line",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise latin1_error(f"{path}:{line}", content[error.start]) from None


def _skip_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return position if space is None else space.end()


def read_csv(
    reader: io.BufferedReader, path: str | Path, bad: RowErrors, delimiter: str | None = None
) -> Iterator[RawRow]:
    """Yield rows of comma-separated values with a header line (RFC 4180). Every value is text.

    Rows without a value are skipped. The first line may be `sep=` with the delimiter, as Excel writes it.

    Args:
        delimiter: separator of the cells; that of `_delimiter_of` if None (`,`, `;`, tab or `|`).

    Raises:
        DataError: the header is unusable, or a row is malformed and `bad` does not count it.
    """
    csv.field_size_limit(LONGEST_ROW_BYTES)
    head = reader.peek(1 << 16).decode("utf-8", "replace")
    stated = _SEPARATOR_LINE.fullmatch(head.partition("\n")[0])
    if stated is not None:
        delimiter = stated[1]
        reader.readline()
    delimiter = _delimiter_of(head) if delimiter is None else delimiter
    lines = io.TextIOWrapper(reader, encoding="utf-8", errors="surrogateescape", newline="")
    cells = csv.reader(_bounded_lines(lines, path, stated is not None), delimiter=delimiter, strict=True)
    try:
        with going_on(lambda: f"reading {path}, line {cells.line_num:,}"):
            yield from _csv_rows(cells, path, bad, lines_before=stated is not None)
    finally:
        lines.detach()


def _bounded_lines(lines: io.TextIOWrapper, path: str | Path, lines_before: int) -> Iterator[str]:
    """Yield the lines. Raises DataError for one that is too long, without reading to its end."""
    for number in count(1 + lines_before):
        line = lines.readline(LONGEST_ROW_BYTES + 1)
        if len(line) > LONGEST_ROW_BYTES:
            raise _too_long(f"{path}:{number}")
        if not line:
            return
        yield line


def _delimiter_of(head: str) -> str:
    """Return the delimiter with which most rows have as many cells as the first row, and that has several.

    Between delimiters with equally many such rows, the one that is more frequent in the first line is returned.
    """
    lines = head.splitlines(keepends=True)

    def fit(delimiter: str) -> tuple[int, int, bool]:
        first, *others = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row] or [0]
        return others.count(first) if first > 1 else 0, lines[0].count(delimiter) if lines else 0, delimiter == ","

    return max(_DELIMITERS, key=fit)


def is_table(head: bytes) -> bool:
    """Return True if a file that starts with these bytes may be CSV: its first lines have equally many cells."""
    lines = head.decode("utf-8", "replace").splitlines()[: _TABLE_LINES + 1]
    lines = lines[:-1] if len(lines) > _TABLE_LINES else lines
    rows = ([row for row in csv.reader(lines, delimiter=one) if row] for one in _DELIMITERS)
    return any(len(found) > 1 and {len(row) for row in found} == {len(found[0])} != {1} for found in rows)


def _csv_rows(cells: Any, path: str | Path, bad: RowErrors, *, lines_before: int) -> Iterator[RawRow]:
    """Yield the rows. If a row's number, as a spreadsheet counts it, is not that of its line, its source has both."""
    header: list[str] | None = None
    for number in count(1):
        line = cells.line_num + 1 + lines_before
        source = f"{path}:{line}" if line == number else f"{path}:{line} (row {number})"
        try:
            row = next(cells, None)
        except csv.Error as error:
            lines = _lines_of_row(line, cells.line_num + lines_before)
            quote = f"; a quote that is not closed? {lines}" if lines else ""
            problem = DataError("this is not valid CSV", where=source, why=f"{error}{quote}")
            if header is None:
                raise problem from None
            bad.add(problem)
            continue
        if row is None:
            break
        if not any(map(str.strip, row)):
            bad.empty_lines += len(row) < 2
            bad.empty_rows += len(row) > 1
            continue
        if header is None:
            header = _checked_header(row, source)
            continue
        try:
            if len(row) != len(header):
                lines = _lines_of_row(line, cells.line_num + lines_before)
                raise DataError(
                    f"this row has {len(row)} cells, the header has {len(header)}",
                    where=source,
                    why="a cell that contains the delimiter, a quote or a line break must be in double quotes"
                    + (f"; {lines}" if lines else ""),
                    next_step=None
                    if len(header) > 1
                    else f"if {shorten(header[0])!r} is a title, {NO_TITLE}; if it is names of columns, write a line "
                    "before it that is sep= and the character between the names",
                )
            yield checked_row(dict(zip(header, row, strict=True)), source, not_utf8=True)
        except DataError as error:
            bad.add(error)


def _lines_of_row(first: int, last: int) -> str:
    """Return a clause on the lines of a malformed row that has several, or ""."""
    return f"lines {first} to {last} are read as one row" if last > first else ""


def _checked_header(row: list[str], source: str) -> list[str]:
    header = [name.strip() for name in row]
    twice = sorted(repeated(header))
    if twice == [""]:
        raise DataError(
            f"{header.count('')} columns of the header have no name",
            where=source,
            next_step=f"if it is a title, {NO_TITLE}; otherwise name these columns, or delete them",
        )
    if twice:
        raise DataError(
            f"the header names {twice[-1]!r} twice",
            where=source,
            why="it is unknown which of both columns is meant",
            next_step="rename one of both columns, or delete it",
        )
    checked_row(dict.fromkeys(header), source, not_utf8=True)
    return header
