"""`backhand plan`."""

from __future__ import annotations

from pathlib import Path

from backhand.cli.command import command
from backhand.cli.train import ADAPTER_PARSERS, DATA_PARSERS
from backhand.train.plan_options import PlanOptions


def _load(path: Path) -> PlanOptions:
    from backhand.train.config_file import load_config

    return PlanOptions.of(load_config(path))


def _plan(options: PlanOptions) -> None:
    from backhand.train.plan_command import plan_command

    plan_command(options)


plan = command(PlanOptions, _plan, parse=DATA_PARSERS | ADAPTER_PARSERS, load=_load)
