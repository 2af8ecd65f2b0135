"""Options of `backhand search`: those of `train`, and the options to vary. This file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from backhand.bounds import Bound, Count, Options, Positive
from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.search.space import Dimension, parse_dimensions

SamplerName = Literal["tpe", "grid", "random"]
Prune = Literal["halving", "median", "none"]


@dataclass(frozen=True)
class SearchOptions(Options):
    """Options to vary, and the size of the search."""

    over: tuple[str, ...] = ()
    """Option to vary, as `NAME=LOW:HIGH`, `NAME=LOW:HIGH:log` or `NAME=A,B,C`. Options of the adapter and of the
    optimization can be varied. Join the names in a list of modules with +. Not given: `learning_rate`, from an eighth
    to four times the rate that `auto` chooses."""

    trials: Count = 6
    """Number of trials, including the first one with the options as given. Six are enough for one option; several
    options need more."""

    sampler: SamplerName = "tpe"
    """How the values of a trial are chosen. `tpe` starts with evenly spread values and continues near the best of them.
    `random` draws them. `grid` takes even steps of every range, as many as fit into `trials`."""

    prune: Prune = "halving"
    """Which trials stop early. `halving` stops all but the best third at an eighth of their steps, and all but one at a
    half. `median` stops the worse half each time. `none` trains every trial to the end."""

    hours: Positive | None = None
    """Time budget in hours. No trial starts that would not leave enough time to finish the best one."""

    seeds: Annotated[int, Bound(at_least=1, at_most=100)] = 1
    """Number of seeds with which the best values and the options as given are trained. The result then says if their
    difference is larger than the spread between seeds."""

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Options to vary, parsed. Raises UsageError."""
        return parse_dimensions(self.over or ("learning_rate=1e-4:1e-2:log",))


@dataclass(frozen=True)
class SearchConfig(TrainConfig):
    """Configuration of a search. Its other parts are those of `TrainConfig`.

    Attributes:
        search: the options to vary, and the size of the search.
    """

    search: SearchOptions = field(default_factory=SearchOptions)

    def _check_together(self) -> None:
        super()._check_together()
        for dimension in self.search.dimensions:
            for value in dimension.ends:
                dimension.applied(self.run_config, value).validate()
        if self.run.workers > 1:
            raise UsageError(
                f"workers {self.run.workers} share the steps of one run, and a search consists of many runs",
                where="workers",
                next_step="leave it out, and start the same command several times with --resume",
            )
        if self.run.from_adapter is not None and any(one.part == "adapter" for one in self.search.dimensions):
            raise UsageError(
                "from_adapter sets the adapter's options, which therefore cannot be varied",
                where="from_adapter",
                next_step="leave it out, or vary options of the optimization only",
            )
