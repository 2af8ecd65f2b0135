"""What `backhand search` can be told: everything that `train` can, and what to vary. This file imports no torch."""

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
    """What to vary, and how much of it to try."""

    over: tuple[str, ...] = ()
    """What to vary, as `NAME=LOW:HIGH`, `NAME=LOW:HIGH:log` or `NAME=A,B,C`, any option of the adapter and of the
    optimization; the names in a list of modules are joined with +. Not given: `learning_rate`, from an eighth to four
    times of what `auto` chooses."""

    trials: Count = 6
    """Trials in all, the options as they are given among them. Six do for one option; several want more."""

    sampler: SamplerName = "tpe"
    """How a trial's values are chosen: `tpe` begins with values spread evenly and goes on near the best of them;
    `random`; or `grid`, even steps of every range, as many as fit into `trials`."""

    prune: Prune = "halving"
    """Which trials stop early: with `halving` all but the best third at an eighth of their steps and all but one at
    a half; with `median` the worse half each time; with `none` no trial does."""

    hours: Positive | None = None
    """Begin no trial that would not leave enough of so many hours to finish the best one."""

    seeds: Annotated[int, Bound(at_least=1, at_most=100)] = 1
    """Runs of the best values and of the options as given, with so many seeds each: whether the difference is more than
    the spread between seeds."""

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What to vary. Raises UsageError."""
        return parse_dimensions(self.over or ("learning_rate=1e-4:1e-2:log",))


@dataclass(frozen=True)
class SearchConfig(TrainConfig):
    """A search over runs; its other parts are those of `TrainConfig`.

    Attributes:
        search: what to vary, and how much of it to try.
    """

    search: SearchOptions = field(default_factory=SearchOptions)

    def _check_together(self) -> None:
        super()._check_together()
        for dimension in self.search.dimensions:
            for value in dimension.ends:
                dimension.applied(self.run_config, value).validate()
        if self.run.workers > 1:
            raise UsageError(
                f"workers {self.run.workers} share the steps of one run, and a search has many",
                where="workers",
                next_step="leave it out, and start the same command several times with --resume",
            )
        if self.run.from_adapter is not None and any(one.part == "adapter" for one in self.search.dimensions):
            raise UsageError(
                "from_adapter decides the adapter's own options, so that they cannot be varied",
                where="from_adapter",
                next_step="leave it out, or vary options of the optimization only",
            )
