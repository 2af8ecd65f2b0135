"""Options of the loss: the objective, and the options of all objectives in one section.

Each objective declares its options in its folder (`Spec.options`). This file imports no torch, because `--help` imports
it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from backhand.bounds import Options
from backhand.errors import UsageError
from backhand.objective.registry import names, objective, objectives, part
from backhand.objective.spec import Spec, Traits
from backhand.words import shown


def objectives_with(option: str) -> tuple[str, ...]:
    """Return the objectives that use an option which not all objectives use, or () for any other option."""
    return tuple(spec.name for spec in objectives() if option in spec.reads)


@dataclass(frozen=True)
class _ObjectiveName(Options):
    """The loss and its hyper-parameters."""

    objective: str = "sft"  # of the class below, one of all names
    """Training objective. `sft` trains on the answers of the rows. For pairs of answers there are `dpo` (arXiv
    2305.18290), `ipo` (2310.12036), `orpo` (2403.07691) and `simpo` (2405.14734); for answers labelled desirable or
    undesirable `kto` (2402.01306); for rewards of sampled answers `grpo` (2402.03300; variants: `loss`); for
    questions with a fixed set of answers `decide`, whose probabilities `backhand decide` returns; to make the model
    answer without a long prompt as it answers with it `bake` (2409.13697), see `context`; to learn from demonstrations
    with less forgetting `sdft` (2601.19897), see `teacher_prompt_template`; for vectors of texts, for search and
    duplicates, `embed`; for a score of a document and a query, to rank what a search has found, `rank`
    (2506.05176); for a classification head on hidden states, which learns labels or a number, `classify`."""

    @property
    def spec(self) -> Spec:
        """The objective."""
        return objective(self.objective)

    @property
    def traits(self) -> Traits:
        """Facts of the objective under these options."""
        return self.spec.traits(self)

    @property
    def strength(self) -> float:
        """`beta`, or its default; 0 for objectives without it."""
        return float(self.resolved().beta or 0.0)

    def resolved(self) -> ObjectiveOptions:
        """Return the options with all defaults filled in."""
        return replace(self, **self.spec.defaults(self))

    def _check_together(self) -> None:
        read = self.spec.reads
        for option in fields(self)[1:]:
            name = option.name
            if name in read or getattr(self, name) == option.default:
                continue
            raise UsageError(
                f"{name} {shown(getattr(self, name))} is given, but {self.objective} does not use it",
                where=name,
                next_step=f"leave it out, or give --objective {' or '.join(objectives_with(name))}",
            )
        self.spec.check_options(self)


def _of_all_objectives() -> type[_ObjectiveName]:
    """Return the class with the options of all objectives.

    The first base is the last objective's, because dataclasses collect their fields from the last base on.
    """
    parts = dict.fromkeys(part(spec.options) for spec in objectives() if spec.options)
    kind = make_dataclass(
        "ObjectiveOptions",
        [],
        bases=(*reversed(parts), _ObjectiveName),
        frozen=True,
        namespace={"__doc__": _ObjectiveName.__doc__, "__module__": __name__},
    )
    kind.__annotations__["objective"] = Literal[names()]
    return kind


if TYPE_CHECKING:
    ObjectiveOptions = Any  # its fields are those of the installed objectives
else:
    ObjectiveOptions = _of_all_objectives()
