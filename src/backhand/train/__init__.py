"""Configuration, loop, optimizer, evaluation, run directory.

The package is callable: `backhand.train(config)` is `backhand.train.run.train(config)`, although `backhand.train` is
also the name of this package. Importing it imports nothing heavy.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backhand.train.config import TrainConfig
    from backhand.train.summary import RunSummary


class _CallablePackage(types.ModuleType):
    def __call__(self, config: TrainConfig) -> RunSummary:
        """Train as `config` says; see `backhand.train.run.train`."""
        from backhand.train.run import train

        return train(config)


sys.modules[__name__].__class__ = _CallablePackage
