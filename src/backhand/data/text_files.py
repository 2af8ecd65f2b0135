"""Readers for text files: one JSON object a line, one JSON list, CSV. Line by line where the format allows it."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backhand.data.rows import BadRows, RawRow, checked_row, latin1_error, shorten
from backhand.errors import DataError

_DELIMITERS = ",;\t|"
_SPACE = " \t\r\n"


def read_json_lines(reader: io.BufferedReader, path: str | Path, bad: BadRows) -> Iterator[RawRow]:
    """One JSON object a line; blank lines and carriage returns are nothing.

    Raises:
        DataError: with the line, unless `bad` counts it.
    """
    for number, line in enumerate(reader, 1):
        source = f"{path}:{number}"
        try:
            text = line.decode("utf-8").strip()
            if text:
                yield checked_row(parse_json(text, source), source)
        except UnicodeDecodeError as error:
            bad.add(latin1_error(source, line[error.start]))
        except DataError as error:
            bad.add(error)


def parse_json(text: str, source: str) -> Any:
    """The value that `text` holds.

    Raises:
        DataError: with the column and a look at what stands there.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _json_error(error, text, source) from None
    except (ValueError, RecursionError) as error:
        raise DataError("this JSON cannot be read", where=source, why=str(error)) from None


def _json_error(error: json.JSONDecodeError, text: str, source: str) -> DataError:
    around = text[max(0, error.pos - 20) : error.pos + 20]
    shown = f" near {around!r}" if around.strip() else ""
    return DataError(f"this is not valid JSON{shown}", where=source, why=f"{error.msg}, at column {error.colno}")


def read_json_values(reader: io.BufferedReader, path: str | Path, bad: BadRows) -> Iterator[RawRow]:
    """A JSON list of objects, or objects one after the other that may each run over several lines.

    The whole file is read at once. A syntax error ends the reading, whatever `bad` says: nothing after it is sure.

    Raises:
        DataError: with the line.
    """
    text = _decode_whole(reader.read(), path)
    decoder = json.JSONDecoder()
    position, line, counted = 0, 1, 0
    position = _skip_space(text, position)
    in_list = text[position : position + 1] == "["
    position += in_list
    first = True
    while True:
        position = _skip_space(text, position)
        line += text.count("\n", counted, position)
        counted = position
        source = f"{path}:{line}"
        if position >= len(text):
            if in_list:
                raise _not_closed(source)
            return
        if in_list and text[position] == "]" and first:
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            row_line = line + text.count("\n", counted, error.pos)
            raise _json_error(error, text, f"{path}:{row_line}") from None
        except (ValueError, RecursionError) as error:
            raise DataError("this JSON cannot be read", where=source, why=str(error)) from None
        first = False
        try:
            yield checked_row(value, source)
        except DataError as error:
            bad.add(error)
        if in_list:
            position = _skip_space(text, position)
            end_line = line + text.count("\n", counted, position)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                around = text[position : position + 20]
                if not around:
                    raise _not_closed(f"{path}:{end_line}")
                raise DataError(
                    f"a comma or a closing bracket is missing before {around!r}",
                    where=f"{path}:{end_line}",
                    next_step="add it, or write one object a line into a .jsonl file",
                )
            position += 1
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        end_line = 1 + text.count("\n", 0, rest)
        raise DataError(
            f"something follows the end of the JSON list: {shorten(text[rest:], 20)!r}",
            where=f"{path}:{end_line}",
            next_step="remove it, or write one object a line into a .jsonl file",
        )


def _not_closed(where: str) -> DataError:
    return DataError(
        "the JSON list is not closed",
        where=where,
        why="the file may have been cut off",
        next_step="write the file again, or end it with ]",
    )


def _decode_whole(content: bytes, path: str | Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise latin1_error(f"{path}:{line}", content[error.start]) from None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


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
    lines.detach()


def _checked_header(row: list[str], source: str) -> list[str]:
    header = [name.strip() for name in row]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"the header names {twice[0]!r} twice", where=source)
    checked_row(dict.fromkeys(header), source, not_utf8=True)
    return header
