"""TensorBoard: event files in `logs/tensorboard` of the run; `tensorboard --logdir runs` shows all runs below it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backhand.train.observer import RunStart
from backhand.train.run_directory import LOGS


class TensorBoardLogger:
    """Writes scalars, and the configuration as a text."""

    def begin(self, start: RunStart) -> None:
        """Open the event file; steps that are about to be done again are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(start.directory / LOGS / "tensorboard"), purge_step=start.step + 1 if start.step else None
        )
        options = json.dumps(dict(start.config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in options.splitlines()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A scalar a figure."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Log whether it ended well, and close the file."""
        self._writer.add_text("ended", "finished" if summary else "not finished")
        self._writer.close()
