"""`backhand evaluate`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.cli.train import DATA_PARSERS
from backhand.train.evaluate_options import EvaluateOptions


def _evaluate(options: EvaluateOptions) -> None:
    from backhand.train.evaluation import evaluate_command

    evaluate_command(options)


evaluate = command(EvaluateOptions, _evaluate, parse=DATA_PARSERS)
