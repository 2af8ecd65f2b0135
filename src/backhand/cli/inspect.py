"""`backhand inspect`."""

from __future__ import annotations

from backhand.arithmetic.look_options import InspectOptions
from backhand.cli.command import command


def _inspect(options: InspectOptions) -> None:
    from backhand.arithmetic.inspect import inspect_command

    inspect_command(options)


inspect = command(InspectOptions, _inspect, positional=("adapter",))
