"""What `backhand paper` can be told. This file imports no torch: the command line reads it for its help."""

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
    """What to analyse, and where to leave it."""

    adapter: tuple[Path, ...] = ()
    """One adapter, or two whose subspaces are compared: those that runs leave, or anybody's from PEFT."""

    output: Path | None = None
    """Directory for the pictures, tables as .csv and summary.json; not given: only print. `sweep` needs one."""

    analyses: tuple[Analysis, ...] = ()
    """Which analyses: `similarity` (needs two adapters), `amplification`, `merging`, `memory` (one), `updates` (none:
    two claims about the optimizer, on a layer of the base model), `sweep` (trains). Not given: all that the adapters
    allow, but `sweep`."""

    directions: Count | None = None
    """Leading directions of each update for `amplification`; not given: the adapter's rank."""

    update_seeds: Annotated[int, Bound(at_least=20)] = 32
    """Fresh adapters at each rank for `updates`."""

    json: bool = False
    """Print one JSON object, the summary, in place of the tables."""

    seed: Seed = 0
    """Of random controls, tokens to time, and the runs of a sweep."""

    def chosen(self) -> tuple[Analysis, ...]:
        """The analyses to run, in their order."""
        if self.analyses:
            return tuple(analysis for analysis in ANALYSES if analysis in self.analyses)
        possible = {1: ANALYSES[1:5], 2: ANALYSES[:5]}
        return possible.get(len(self.adapter), ())

    def _check_together(self) -> None:
        if len(self.adapter) > 2:
            raise UsageError(f"{len(self.adapter)} adapters are given, at most two are compared", where="adapter")
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
            raise UsageError("a sweep keeps its runs in output", where="output", next_step="name a directory")


def _check_targets(where: str, targets: str) -> None:
    if not parse_modules((targets,)):
        raise UsageError(f"{targets!r} names no modules", where=where)


@dataclass(frozen=True)
class SweepOptions:
    """A sweep over targets and ranks: which weights to adapt, and how small a rank suffices."""

    sweep_ranks: Annotated[tuple[Rank, ...], several()] = (1, 2, 4, 8)
    """Ranks to train, each on every one of `sweep_targets`."""

    sweep_targets: Annotated[tuple[Annotated[str, Check(_check_targets)], ...], several()] = (
        "q_proj",
        "q_proj,v_proj",
        "q_proj,k_proj,v_proj,o_proj",
        "all-linear",
    )
    """Sets of modules, each named as in `--target-modules` of `train`."""

    sweep_budget: Count | None = None
    """Trained numbers that every target set may use in the comparison at a fixed budget: each gets the largest rank
    within it. Not given: those of the second target set (the first, if there is one only) at the largest rank."""

    sweep_alpha: Alpha = 32.0
    """Alpha of every adapter; with scaling alpha / rank the first steps are alike at every rank."""

    max_new_tokens: Count = 64
    """Longest greedy completion that is compared with a held-out row's last one."""


@dataclass(frozen=True)
class PaperOptions(Options):
    """The findings of the LoRA paper, measured on adapters at hand.

    Attributes:
        run: what to analyse.
        sweep: what to train for `sweep`.
        model: the base model and how it is computed.
        data: rows for `sweep`; the demo's task if there are none.
        optimization: how `sweep` trains.
    """

    run: PaperRunOptions = field(default_factory=PaperRunOptions)
    sweep: SweepOptions = field(default_factory=SweepOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
