"""Checks of the options of a run that several objectives share.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.errors import UsageError


def check_sampling(config: Any) -> None:
    """Raise UsageError for options of a `TrainConfig` with which answers cannot be sampled."""
    traits = config.objective.traits
    if traits.trains_on_samples and config.adapter.dropout:
        raise UsageError(
            f"dropout {config.adapter.dropout} would train another model than the one that samples",
            where="dropout",
            next_step="leave out --dropout",
        )
    if traits.samples and config.model.engine == "transformers":
        raise UsageError(
            "answers are sampled and trained on by the backhand engine alone",
            where="engine",
            why="its sampler and its training pass are one computation",
            next_step="leave out --engine",
        )
