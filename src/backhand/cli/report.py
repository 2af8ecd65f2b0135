"""`backhand report`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.report.options import ReportOptions


def _report(options: ReportOptions) -> None:
    from backhand.report.command import report_command

    report_command(options)


report = command(ReportOptions, _report, positional=("runs",))
