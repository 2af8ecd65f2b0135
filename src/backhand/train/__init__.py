"""Configuration, loop, optimizer, evaluation, run directory.

The package is callable: `backhand.train(config)` is `backhand.report.train.train(config)`, although `backhand.train` is
also the name of this package. Importing it imports nothing heavy.
"""

from __future__ import annotations

import sys
import types
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from backhand.train.callbacks import Callback
    from backhand.train.config import TrainConfig
    from backhand.train.summary import RunSummary


class _CallablePackage(types.ModuleType):
    def __call__(self, config: TrainConfig, *, callbacks: Iterable[Callback] = ()) -> RunSummary:
        """Train as `config` says, and leave a report; see `backhand.report.train.train`."""
        # By its name: the room of the report stands above this one, which does not need it.
        train = import_module("backhand.report.train").train
        summary: RunSummary = train(config, callbacks=callbacks)
        return summary


sys.modules[__name__].__class__ = _CallablePackage
