"""`backhand sine`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.lab.sine_options import SineOptions


def _sine(options: SineOptions) -> None:
    from backhand.lab.sine import sine_command

    sine_command(options)


sine = command(SineOptions, _sine)
