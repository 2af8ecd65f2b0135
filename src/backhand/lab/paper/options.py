"""Options of `backhand paper`. This file imports no torch, because the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from backhand.adapters.config import Alpha, Rank, parse_modules
from backhand.bounds import Bound, Check, Count, Options, Seed, several
from backhand.data.options import DataOptions
from backhand.errors import UsageError
from backhand.options.config import ModelOptions, OptimizationOptions

Analysis = Literal["similarity", "amplification", "merging", "memory", "updates", "sweep"]
ANALYSES: tuple[Analysis, ...] = get_args(Analysis)


@dataclass(frozen=True)
class PaperRunOptions(Options):
    """The analyses to run, and the directory for results."""

    adapter: tuple[Path, ...] = ()
    """One adapter, or two adapters whose subspaces are compared, from runs or from PEFT."""

    output: Path | None = None
    """Directory for pictures, .csv tables and summary.json. Without it results are only printed. `sweep` needs it."""

    analyses: tuple[Analysis, ...] = ()
    """Analyses to run, with the number of adapters that each needs: `similarity` (two), `amplification`, `merging`,
    `memory` (one), `updates` (none: two claims about the optimizer, on a layer of the base model), `sweep` (none:
    trains). By default all that the number of adapters allows, except `sweep`."""

    directions: Count | None = None
    """Number of leading directions of each update for `amplification`, by default the adapter's rank."""

    update_seeds: Annotated[int, Bound(at_least=20)] = 32
    """Fresh adapters at each rank for `updates`."""

    json: bool = False
    """Print the summary as one JSON object instead of the tables."""

    seed: Seed = 0
    """Seed of random controls, of the tokens for timing, and of the runs of a sweep."""

    def chosen(self) -> tuple[Analysis, ...]:
        """Return the analyses to run, in their order."""
        if self.analyses:
            return tuple(analysis for analysis in ANALYSES if analysis in self.analyses)
        possible = {1: ANALYSES[1:5], 2: ANALYSES[:5]}
        return possible.get(len(self.adapter), ())

    def _check_together(self) -> None:
        if len(self.adapter) > 2:
            raise UsageError(f"{len(self.adapter)} adapters are given, at most two can be compared", where="adapter")
        if not self.chosen():
            raise UsageError(
                "there is nothing to analyse",
                where="adapter",
                next_step="give one or two adapters, or --analyses updates or --analyses sweep",
            )
        needed = 2 if "similarity" in self.analyses else 1 if {*self.analyses} & {*ANALYSES[:4]} else 0
        if len(self.adapter) < needed:
            raise UsageError(
                f"{', '.join(self.analyses)}: {needed} adapter{'s are' if needed > 1 else ' is'} needed, "
                f"{len(self.adapter)} given",
                where="adapter",
            )
        if "sweep" in self.analyses and self.output is None:
            raise UsageError("a sweep stores its runs in output", where="output", next_step="give a directory")


def _check_targets(where: str, targets: str) -> None:
    if not parse_modules((targets,)):
        raise UsageError(f"{targets!r} names no modules", where=where)


@dataclass(frozen=True)
class SweepOptions:
    """A sweep over targets and ranks, to compare adapted weights and to find the smallest sufficient rank."""

    sweep_ranks: Annotated[tuple[Rank, ...], several()] = (1, 2, 4, 8)
    """Ranks to train, each with every set of `sweep_targets`."""

    sweep_targets: Annotated[tuple[Annotated[str, Check(_check_targets)], ...], several()] = (
        "q_proj",
        "q_proj,v_proj",
        "q_proj,k_proj,v_proj,o_proj",
        "all-linear",
    )
    """Sets of modules, each named as in `--target-modules` of `train`."""

    sweep_budget: Count | None = None
    """Largest number of trained parameters in the comparison at a fixed budget. Each target set gets the largest rank
    within the budget. By default it is the number for the second target set (the first, if there is only one) at the
    largest rank."""

    sweep_alpha: Alpha = 32.0
    """Alpha of every adapter. With scaling alpha / rank the first steps are similar at every rank."""

    max_new_tokens: Count = 64
    """Length limit of the greedy completion that is compared with the last reply of a held-out row."""


@dataclass(frozen=True)
class PaperOptions(Options):
    """The findings of the LoRA paper, measured on given adapters.

    Attributes:
        run: the analyses to run.
        sweep: the runs of `sweep`.
        model: the base model and its compute settings.
        data: rows for `sweep`, by default the demo's task.
        optimization: optimizer settings of `sweep`.
    """

    run: PaperRunOptions = field(default_factory=PaperRunOptions)
    sweep: SweepOptions = field(default_factory=SweepOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
