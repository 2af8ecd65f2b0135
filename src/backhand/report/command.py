"""`backhand report`: the page of one run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

from backhand.adapters.atomic_files import make_directory
from backhand.report.comparison import comparison_page
from backhand.report.options import ReportOptions
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.report.writing import write_page
from backhand.train.run_directory import REPORT

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
    print(f"Report: {target}")
    return target
