"""Options that several objectives have.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from backhand.bounds import Bound, Options
from backhand.errors import UsageError

SMALLEST, LARGEST = 1e-6, 1e6
"""Bounds of factors of the gradient. Beyond them, gradients underflow or overflow."""
Weight = Annotated[float, Bound(at_least=SMALLEST, at_most=LARGEST)]


@dataclass(frozen=True)
class BetaOptions(Options):
    """The strength of a loss."""

    beta: Annotated[float, Bound(at_least=0.0, at_most=LARGEST)] | None = None
    """Strength with which the model is held to the one it starts from (`dpo`, `kto`; τ of `ipo`). For `orpo` it is λ,
    the weight of the odds ratio; for `simpo` the factor of the rewards; for `grpo` the weight of the divergence from
    the base model. Default: 0.1, for `simpo` 2, for `grpo` 0."""


@dataclass(frozen=True)
class SmoothingOptions(Options):
    """The smoothing of labels."""

    label_smoothing: Annotated[float, Bound(at_least=0.0, below=1.0)] = 0.0
    """Probability that chosen and rejected are exchanged in a pair: for `simpo`, and for `dpo` with `robust` (below
    0.5), `exo_pair` (above 0), `aot` or `aot_unpaired`. For `decide`, the share of each answer that training spreads
    over all options of its question (1512.00567). Probabilities are then too even without a temperature, so `decide`
    needs held-out rows for it."""


def check_size(beta: float | None) -> None:
    """Raise UsageError for a strength other than 0 that is lost in rounding."""
    if beta is not None and 0 < beta < SMALLEST:
        why = "gradients are multiples of it, and would be lost in rounding"
        raise UsageError(f"beta {beta} is below {SMALLEST}", where="beta", why=why)
