"""Options of the losses that compare answers, named as in TRL's configurations.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from backhand.bounds import Bound
from backhand.errors import UsageError
from backhand.objectives.kinds.options import LARGEST, SMALLEST, BetaOptions, SmoothingOptions, Weight, check_size

_OfMargin = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
_OfSides = Literal["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
_Sorted = Literal["aot", "aot_unpaired"]
_OfLabels = Literal["kto", "apo_zero_unpaired"]
LossType = Literal[_OfMargin, _OfSides, _Sorted, _OfLabels]
OF_PAIRS: tuple[str, ...] = get_args(Literal[_OfMargin, _OfSides, _Sorted])
OF_LABELS: tuple[str, ...] = get_args(_OfLabels)
SORTED: tuple[str, ...] = get_args(_Sorted)
_SMOOTHED = ("exo_pair", "robust", *SORTED)


@dataclass(frozen=True)
class PairOptions(SmoothingOptions, BetaOptions):
    """The loss of compared answers."""

    loss_type: LossType | None = None
    """Form of the loss of `dpo`, as in TRL's DPOConfig (default: `sigmoid`), or of `kto`: `kto` or `apo_zero_unpaired`.
    `backhand.ops.preference` defines each form. `aot` and `aot_unpaired` (2406.05882) sort the pairs of a step."""

    discopop_tau: Annotated[float, Bound(at_least=SMALLEST)] = 0.05
    """Temperature of `dpo` with `discopop`."""

    simpo_gamma: Annotated[float, Bound(at_least=0.0, at_most=LARGEST)] = 0.5
    """Target margin between the rewards of a pair (`simpo`)."""

    desirable_weight: Weight = 1.0
    """Weight of desirable answers (`kto`)."""

    undesirable_weight: Weight = 1.0
    """Weight of undesirable answers (`kto`)."""

    @property
    def form(self) -> str:
        """The form of the loss: `loss_type`, or its default."""
        options: Any = self
        return self.loss_type or str(options.spec.forms[0])


def check_strength(beta: float | None) -> None:
    """Raise UsageError for a strength that is no factor of a gradient."""
    if beta == 0:
        raise UsageError("beta 0.0 is not a finite number above 0", where="beta")
    check_size(beta)


def check_form(options: Any, forms: tuple[str, ...]) -> None:
    """Raise UsageError if the form of the loss is not one of these forms."""
    if options.loss_type is not None and options.loss_type not in forms:
        raise UsageError(
            f"loss_type {options.loss_type!r} is not a form of {options.objective}",
            where="loss_type",
            next_step=f"{options.loss_type} belongs to --objective {'dpo' if options.loss_type in OF_PAIRS else 'kto'}",
        )


def check_smoothing(options: Any) -> None:
    """Raise UsageError unless the form of the loss uses its smoothing."""
    smoothing, form = options.label_smoothing, options.loss_type
    if smoothing and form not in _SMOOTHED:
        raise UsageError(
            f"label_smoothing {smoothing} is given, but loss_type {form or 'sigmoid'!r} does not use it",
            where="label_smoothing",
            next_step=f"leave it out, or give --loss-type {' or '.join(_SMOOTHED)}",
        )
    if form == "robust" and smoothing >= 0.5:
        raise UsageError(f"label_smoothing {smoothing} is not below 0.5, as robust needs it", where="label_smoothing")
    if form == "exo_pair" and not smoothing:
        raise UsageError(
            "exo_pair needs a label_smoothing above 0",
            where="label_smoothing",
            next_step="give --label-smoothing 0.001, as its paper does",
        )
