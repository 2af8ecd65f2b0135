"""Options of decisions.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass

from backhand.objectives.kinds.options import SmoothingOptions


@dataclass(frozen=True)
class DecisionOptions(SmoothingOptions):
    """The loss of decisions."""
