"""`backhand combine`."""

from __future__ import annotations

from backhand.arithmetic.combine_options import CombineOptions, parse_weights
from backhand.cli.command import command


def _combine(options: CombineOptions) -> None:
    from backhand.arithmetic.combine import combine_command

    combine_command(options)


combine = command(CombineOptions, _combine, parse={"weights": parse_weights}, positional=("operation", "adapters"))
