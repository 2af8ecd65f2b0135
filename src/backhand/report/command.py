"""`backhand report`: the page of one run, or of several side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backhand.errors import BackhandError
from backhand.files import FileLayer, make_directory, replace_file, replaceable_mode, saving
from backhand.printing import say
from backhand.report.comparison import comparison_page
from backhand.report.options import ReportOptions
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.directory import PROOFS, REPORT

COMPARISON = "comparison.html"


def report_command(options: ReportOptions) -> Path:
    """Write the page, and say where it is; return its path.

    Raises:
        UsageError: no run, or one that is none; what stands at `output` is no plain file.
        ArtifactError: a run's configuration cannot be read.
        ResourceError: the page cannot be written.
    """
    options.validate()
    runs = [read_run(path) for path in options.runs]
    if len(runs) == 1:
        page, usual = run_page(runs[0]), runs[0].path / REPORT
    else:
        page, usual = comparison_page(runs), Path(COMPARISON)
    target = usual if options.output is None else options.output
    make_directory(target.parent)
    write_page(target, page)
    say(f"Report: {shlex.quote(str(target))}", file=sys.stdout)
    return target


def write_report(run: Path) -> Path:
    """Write `report.html` into a run directory, in place of one that is there; return its path.

    Raises:
        UsageError: there is no run, or report.html is something else than a plain file.
        ArtifactError: its configuration cannot be read.
        ResourceError: it cannot be written.
    """
    target = run / REPORT
    write_page(target, run_page(read_run(run)))
    return target


@contextmanager
def report_kept(run: Path | None) -> Iterator[None]:
    """Write a run's report.html again if its proofs.jsonl has grown meanwhile, also where a proof failed.

    A run without a page gets none. A page that cannot be written takes nothing from what was proved: it is said.
    """
    before = _proofs_version(run)
    try:
        yield
    finally:
        if run is not None and _proofs_version(run) != before and (run / REPORT).is_file():
            try:
                write_report(run)
            except (BackhandError, OSError) as error:
                say(*f"the report could not be written: {error}".split("\n"))


def _proofs_version(run: Path | None) -> tuple[int, int] | None:
    try:
        status = (run / PROOFS).stat() if run is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_size, status.st_mtime_ns)


def write_page(target: Path, page: bytes) -> None:
    """Write a page; after a crash there is the old one or the new one.

    Raises:
        UsageError: `target` is something else than a plain file, such as a link or a pipe.
        ResourceError: it cannot be written.
    """
    replaceable_mode(target)
    with saving("the report", target.parent, len(page), again="write it with `backhand report`"):
        replace_file(FileLayer(), target, page)
