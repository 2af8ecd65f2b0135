"""A page as a file, written in one step."""

from __future__ import annotations

from pathlib import Path

from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.train.files import FileLayer, replace_file, saving
from backhand.train.run_directory import REPORT


def write_report(run: Path) -> Path:
    """Write `report.html` into a run directory, in place of one that is there; return its path.

    Raises:
        UsageError: there is no run.
        ArtifactError: its configuration cannot be read.
        ResourceError: it cannot be written.
    """
    target = run / REPORT
    write_page(target, run_page(read_run(run)))
    return target


def write_page(target: Path, page: bytes) -> None:
    """Write a page; after a crash there is the old one or the new one. Raises ResourceError."""
    with saving("the report", target.parent, len(page)):
        replace_file(FileLayer(), target, page)
