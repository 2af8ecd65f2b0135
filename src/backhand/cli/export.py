"""`backhand export` and `backhand merge`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.export.options import ExportOptions, MergeOptions


def _export(options: ExportOptions) -> None:
    from backhand.export.command import export_command
    from backhand.export.proving import run_of
    from backhand.report.writing import report_kept

    with report_kept(run_of(options.adapter)):
        export_command(options)


def _merge(options: MergeOptions) -> None:
    from backhand.export.merging import merge_command
    from backhand.export.proving import run_of
    from backhand.report.writing import report_kept

    with report_kept(run_of(options.adapter)):
        merge_command(options)


export = command(ExportOptions, _export)
merge = command(MergeOptions, _merge)
