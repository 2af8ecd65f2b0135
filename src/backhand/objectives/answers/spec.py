"""Supervised fine-tuning on the answers of the rows.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _SFT(Spec):
    name = "sft"

    def traits(self, options: Any) -> Traits:  # noqa: ARG002
        return Traits(is_supervised=True)


SFT = _SFT()
