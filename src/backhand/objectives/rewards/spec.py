"""Rewards of sampled answers.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _GRPO(Spec):
    name = "grpo"

    def traits(self, options: Any) -> Traits:  # noqa: ARG002
        return Traits(rows="prompts", samples=True, trains_on_samples=True)


GRPO = _GRPO()
