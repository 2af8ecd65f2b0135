"""Options of the loss of rewarded answers.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass

from backhand.objectives.kinds.options import BetaOptions


@dataclass(frozen=True)
class RewardLossOptions(BetaOptions):
    """The loss of rewarded answers."""
