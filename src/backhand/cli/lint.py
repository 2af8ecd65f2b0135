"""`backhand lint`."""

from __future__ import annotations

from pathlib import Path

from backhand.cli.command import command
from backhand.cli.train import DATA_PARSERS
from backhand.data.lint_options import LintOptions, LintRunOptions


def _load(path: Path) -> LintOptions:
    """The rows, the model and the seed of a run's configuration; the rest of it has nothing to do with rows."""
    from backhand.train.config_file import load_config

    config = load_config(path)
    return LintOptions(LintRunOptions(model=config.model.model, seed=config.run.seed), config.data)


def _lint(options: LintOptions) -> None:
    from backhand.data.lint_command import lint_command

    lint_command(options)


lint = command(LintOptions, _lint, parse=DATA_PARSERS, load=_load)
