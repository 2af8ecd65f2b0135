"""`backhand watch`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.report.watch_options import WatchOptions


def _watch(options: WatchOptions) -> None:
    from backhand.report.watch import watch_command

    watch_command(options)


watch = command(WatchOptions, _watch, positional=("run",))
