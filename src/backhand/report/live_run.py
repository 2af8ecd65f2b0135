"""A run's page kept up to date: made again when one of the files it shows has changed, and then only once."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

from backhand.errors import BackhandError
from backhand.report.page import page_values
from backhand.report.rendering import PAGE_SCRIPTS, render
from backhand.report.run_record import read_run
from backhand.train.run_directory import (
    ADAPTER,
    ANSWERS,
    CHECKPOINTS,
    CONFIG,
    FACTS,
    METRICS,
    PROOFS,
    STATUS,
    SUMMARY,
)
from backhand.train.status import read_status

_SHOWN = (CONFIG, METRICS, PROOFS, ANSWERS, FACTS, SUMMARY, STATUS, ADAPTER, f"{CHECKPOINTS}/latest")
LIVE_SCRIPTS = (*PAGE_SCRIPTS, "watch.js")


class LiveRun:
    """One run, as it is at the moment of asking. Safe to ask from several threads.

    Args:
        path: its directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._version = ""
        self._page = b""
        read_run(path)

    def version(self) -> str:
        """Changes when anything that the page shows does, the death of the run's process included."""
        parts = []
        for name in _SHOWN:
            try:
                status = (self._path / name).stat()
                parts.append(f"{status.st_mtime_ns} {status.st_size} {status.st_ino}")
            except OSError:
                parts.append("-")
        state = read_status(self._path)
        parts.append(state.state if state else "-")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def page(self, box: dict[str, Any]) -> tuple[str, bytes]:
        """The version, and the whole page. While the run's files are being replaced, the page before that.

        Raises:
            BackhandError: there is no page before, and the run cannot be read.
        """
        with self._lock:
            version = self.version()
            if version != self._version:
                try:
                    values = page_values(read_run(self._path))
                except BackhandError:
                    if not self._page:
                        raise
                    return self._version, self._page
                self._page = render(
                    "watch.html.j2",
                    values | {"box": box, "version_shown": version},
                    scripts=LIVE_SCRIPTS,
                    connect="'self'",
                )
                self._version = version
            return self._version, self._page
