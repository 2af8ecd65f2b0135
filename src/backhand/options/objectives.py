"""What is minimised, and its numbers, under the names that TRL's configurations have for them.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, get_args

from backhand.bounds import Bound, Options
from backhand.data.rows import Purpose
from backhand.errors import UsageError

ObjectiveName = Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto", "grpo"]
_OfMargin = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
_OfSides = Literal["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
_Sorted = Literal["aot", "aot_unpaired"]
_OfLabels = Literal["kto", "apo_zero_unpaired"]
LossType = Literal[_OfMargin, _OfSides, _Sorted, _OfLabels]

_TAKEN: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("beta", "loss_type", "label_smoothing", "discopop_tau"),
    "ipo": ("beta",),
    "orpo": ("beta",),
    "simpo": ("beta", "simpo_gamma", "label_smoothing"),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    "grpo": ("beta",),
}
_USUAL_BETA = {"simpo": 2.0, "grpo": 0.0}
SORTED: tuple[str, ...] = get_args(_Sorted)
_SMOOTHED = ("exo_pair", "robust", *SORTED)

_SMALLEST, _LARGEST = 1e-6, 1e6
"""Gradients are multiples of these numbers, or of one over their squares, and must be neither lost nor infinite."""
_Weight = Annotated[float, Bound(at_least=_SMALLEST, at_most=_LARGEST)]


@dataclass(frozen=True)
class ObjectiveOptions(Options):
    """What is minimised."""

    objective: ObjectiveName = "sft"
    """What to train for: `sft`, the answers of the rows; with pairs of answers `dpo` (arXiv 2305.18290), `ipo`
    (2310.12036), `orpo` (2403.07691) or `simpo` (2405.14734); with answers that are desirable or not `kto`
    (2402.01306); with rewards of answers that the model writes itself `grpo` (2402.03300, and its kin: `loss`)."""

    beta: Annotated[float, Bound(at_least=0.0, at_most=_LARGEST)] | None = None
    """How close the model stays to the one it starts from, the more the higher (`dpo`, `kto`; of `ipo` the paper's τ);
    of `orpo` the paper's λ, the weight of the odds; of `simpo` the rewards' factor; of `grpo` the weight of
    the divergence from the base model. Not given: 0.1, of `simpo` 2, of `grpo` 0."""

    loss_type: LossType | None = None
    """Form of the loss of `dpo`, as in TRL's DPOConfig (not given: `sigmoid`), or of `kto`: `kto` or
    `apo_zero_unpaired`. What each is stands in `backhand.ops.dpo` and `backhand.ops.kto`; `aot` and `aot_unpaired`
    (2406.05882) sort the pairs of a step."""

    label_smoothing: Annotated[float, Bound(at_least=0.0, below=1.0)] = 0.0
    """How likely a pair is the wrong way round: `simpo`, and `dpo` with `robust` (below 0.5), `exo_pair` (above
    0), `aot` or `aot_unpaired`."""

    discopop_tau: Annotated[float, Bound(at_least=_SMALLEST)] = 0.05
    """Temperature of `dpo` with `discopop`."""

    simpo_gamma: Annotated[float, Bound(at_least=0.0, at_most=_LARGEST)] = 0.5
    """Margin by which the rewards of a pair are to differ (`simpo`)."""

    desirable_weight: _Weight = 1.0
    """Weight of desirable answers (`kto`)."""

    undesirable_weight: _Weight = 1.0
    """Weight of answers that are not desirable (`kto`)."""

    def _check_together(self) -> None:
        usual = ObjectiveOptions()
        for option in fields(self):
            name = option.name
            if name == "objective" or name in _TAKEN[self.objective] or getattr(self, name) == getattr(usual, name):
                continue
            having = [objective for objective, taken in _TAKEN.items() if name in taken]
            raise UsageError(
                f"{name} {getattr(self, name)!r} is given, and {self.objective} has none",
                where=name,
                next_step=f"leave it out, or give --objective {' or '.join(having)}",
            )
        if self.beta == 0 and self.objective != "grpo":
            raise UsageError("beta 0.0 is not a finite number above 0", where="beta")
        if self.beta is not None and 0 < self.beta < _SMALLEST:
            why = "gradients are multiples of it, and would be lost in rounding"
            raise UsageError(f"beta {self.beta} is below {_SMALLEST}", where="beta", why=why)
        if self.loss_type is not None and (self.loss_type in get_args(_OfLabels)) != (self.objective == "kto"):
            raise UsageError(
                f"loss_type {self.loss_type!r} is none of {self.objective}",
                where="loss_type",
                next_step=f"{self.loss_type} belongs to --objective {'dpo' if self.objective == 'kto' else 'kto'}",
            )
        self._check_smoothing()

    def _check_smoothing(self) -> None:
        smoothing, form = self.label_smoothing, self.loss_type
        if self.objective == "dpo" and smoothing and form not in _SMOOTHED:
            raise UsageError(
                f"label_smoothing {smoothing} is given, and loss_type {form or 'sigmoid'!r} has none",
                where="label_smoothing",
                next_step=f"leave it out, or give --loss-type {' or '.join(_SMOOTHED)}",
            )
        if form == "robust" and smoothing >= 0.5:
            raise UsageError(
                f"label_smoothing {smoothing} is not below 0.5, as robust needs it", where="label_smoothing"
            )
        if form == "exo_pair" and not smoothing:
            raise UsageError(
                "exo_pair needs a label_smoothing above 0",
                where="label_smoothing",
                next_step="give --label-smoothing 0.001, as its paper does",
            )

    def resolved(self) -> ObjectiveOptions:
        """With what is chosen by default written down."""
        beta = self.strength if "beta" in _TAKEN[self.objective] else None
        loss_type = self.form if "loss_type" in _TAKEN[self.objective] else None
        return replace(self, beta=beta, loss_type=loss_type)

    @property
    def purpose(self) -> Purpose:
        """What the rows are read for."""
        special: dict[str, Purpose] = {"sft": "answers", "kto": "labels", "grpo": "prompts"}
        return special.get(self.objective, "pairs")

    @property
    def has_reference(self) -> bool:
        """Whether the loss is measured against the model that the run starts from."""
        return self.objective in ("dpo", "ipo", "kto")

    @property
    def strength(self) -> float:
        """`beta`, or what it is by default."""
        return self.beta if self.beta is not None else _USUAL_BETA.get(self.objective, 0.1)

    @property
    def form(self) -> LossType:
        """`loss_type`, or what it is by default."""
        usual: LossType = "ipo" if self.objective == "ipo" else "kto" if self.objective == "kto" else "sigmoid"
        return self.loss_type or usual
