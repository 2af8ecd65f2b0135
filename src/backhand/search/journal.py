"""The journal of a search, `study.journal`: one JSON object per line, which Optuna's storage replays.

Optuna's own file backend opens whatever has the name. This one reads plain files only, refuses a line that is not a
JSON object, and drops the half line that a killed process leaves at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backhand.errors import ArtifactError
from backhand.files import FileLayer, save_errors, write_all
from backhand.reading import MAX_TABLES_BYTES, read_plain
from backhand.system import NO_LINK, PLAIN

Record = Mapping[str, Any]


class Journal:
    """Backend for Optuna's `JournalStorage`. Its user holds the lock of the search.

    Raises:
        ArtifactError: the file cannot be read, or contains a line that is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            data = read_plain(path, MAX_TABLES_BYTES)
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise damaged_study(path, error.strerror or str(error)) from None
        whole, newline, self._half_line = data.rpartition(b"\n")
        self._bytes = len(whole + newline)
        lines = whole.split(b"\n") if newline else []
        self._records = [_record(line, path, number) for number, line in enumerate(lines, 1)]

    def read_logs(self, log_number_from: int) -> Sequence[Record]:
        """Return the records from this number on."""
        return self._records[log_number_from:]

    def append_logs(self, logs: Sequence[Record]) -> None:
        """Append records and sync the file. Raises ResourceError."""
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        data = "".join(f"{line}\n" for line in lines).encode()
        with save_errors("the study", self._path.parent, len(data)):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | NO_LINK | PLAIN, 0o666)
            try:
                if self._half_line:
                    os.ftruncate(descriptor, self._bytes)
                    self._half_line = b""
                os.lseek(descriptor, 0, os.SEEK_END)
                write_all(FileLayer(), descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._records += map(json.loads, lines)
        self._bytes += len(data)


def damaged_study(path: Path, why: str) -> ArtifactError:
    """Return the error for a journal that cannot be read or was not written by a search."""
    step = "restore the file from a copy, or start another search with another --output"
    return ArtifactError("the study is damaged", where=str(path), why=why, next_step=step)


def _record(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise damaged_study(path, f"line {number} is not a JSON object")
    return record
