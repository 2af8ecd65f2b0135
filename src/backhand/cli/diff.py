"""`backhand diff`."""

from __future__ import annotations

from backhand.arithmetic.look_options import DiffOptions
from backhand.cli.command import command


def _diff(options: DiffOptions) -> None:
    from backhand.arithmetic.diff import diff_command

    diff_command(options)


diff = command(DiffOptions, _diff, positional=("first", "second"))
