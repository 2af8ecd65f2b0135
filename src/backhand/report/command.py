"""`backhand report`: the page of one run, or a comparison of several runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backhand.errors import BackhandError, error_text
from backhand.files import FileLayer, make_directory, replace_file, replaceable_mode, save_errors
from backhand.printing import say
from backhand.report.comparison import comparison_page
from backhand.report.options import ReportOptions
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.directory import PROOFS, REPORT

COMPARISON = "comparison.html"


def report_command(options: ReportOptions) -> Path:
    """Write the page and print its path; return the path.

    Raises:
        UsageError: no run is given, a directory contains no run, or `output` is no regular file.
        ArtifactError: a run's configuration cannot be read.
        ResourceError: the page cannot be written.
    """
    options.validate()
    runs = [read_run(path) for path in options.runs]
    if len(runs) == 1:
        page, default = run_page(runs[0]), runs[0].path / REPORT
    else:
        page, default = comparison_page(runs), Path(COMPARISON)
    target = default if options.output is None else options.output
    make_directory(target.parent)
    write_page(target, page)
    say(f"Report: {shlex.quote(str(target))}", file=sys.stdout)
    return target


def write_report(run: Path) -> Path:
    """Write or replace `report.html` in a run directory; return its path.

    Raises:
        UsageError: there is no run, or report.html is no regular file.
        ArtifactError: its configuration cannot be read.
        ResourceError: it cannot be written.
    """
    target = run / REPORT
    write_page(target, run_page(read_run(run)))
    return target


@contextmanager
def report_kept(run: Path | None) -> Iterator[None]:
    """Rewrite a run's report.html after the block if its proofs.jsonl has changed, even if the block raises.

    A run without report.html gets none. An error while the page is written is printed and does not end the command.
    """
    before = _proofs_version(run)
    try:
        yield
    finally:
        if run is not None and _proofs_version(run) != before and (run / REPORT).is_file():
            try:
                write_report(run)
            except (BackhandError, OSError) as error:
                say(*f"the report could not be written: {error_text(error)}".split("\n"))


def _proofs_version(run: Path | None) -> tuple[int, int] | None:
    try:
        status = (run / PROOFS).stat() if run is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_size, status.st_mtime_ns)


def write_page(target: Path, page: bytes) -> None:
    """Write a page atomically.

    Raises:
        UsageError: `target` is no regular file, but for example a link or a pipe.
        ResourceError: it cannot be written.
    """
    replaceable_mode(target)
    with save_errors("the report", target.parent, len(page), again="write it with `backhand report`"):
        replace_file(FileLayer(), target, page)
