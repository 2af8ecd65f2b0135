"""Loggers by their names on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec

from backhand.errors import UsageError
from backhand.train.loggers.interface import LoggerObserver

# The package that must be there, the class here.
_LOGGERS = {
    "tensorboard": ("tensorboard", "tensorboard:TensorBoardLogger"),
    "wandb": ("wandb", "wandb:WandbLogger"),
    "mlflow": ("mlflow", "mlflow:MLflowLogger"),
    "trackio": ("trackio", "trackio:TrackioLogger"),
}


def chosen_loggers(names: Iterable[str], note: Callable[[str], None]) -> list[LoggerObserver]:
    """An observer for each name.

    Raises:
        UsageError: its package is not installed.
    """
    observers = []
    for name in dict.fromkeys(names):
        package, home = _LOGGERS[name]
        if find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed", where="report_to", next_step=f"pip install 'backhand[{name}]'"
            )
        module, _, kind = home.partition(":")
        logger = getattr(import_module(f"backhand.train.loggers.{module}"), kind)()
        observers.append(LoggerObserver(name, logger, note))
    return observers
