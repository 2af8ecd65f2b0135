"""`backhand demo`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.lab.demo_options import DemoOptions


def _demo(options: DemoOptions) -> None:
    from backhand.lab.demo import demo_command

    demo_command(options)


demo = command(DemoOptions, _demo)
