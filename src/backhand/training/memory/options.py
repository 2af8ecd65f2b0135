"""What `backhand plan` can be told: everything that `train` can, and what to print. This file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from backhand.adapters.config import LoRAConfig
from backhand.bounds import CountFromZero, check_fields
from backhand.data.options import DataOptions
from backhand.training.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
from backhand.training.objectives.options import ObjectiveOptions
from backhand.training.rewards.options import RewardOptions


@dataclass(frozen=True)
class PlanRunOptions:
    """What to look at, and what to print."""

    watch: bool = False
    """Count a second model for `backhand watch`: it answers with the newest adapter while this run trains."""

    calibrate: bool = True
    """Measure this machine's speed on some of the model's blocks, for about ten seconds; off, only memory is told."""

    show: CountFromZero = 0
    """Also list so many of the longest documents, which decide the memory: where they stand, and their tokens."""

    json: bool = False
    """Print one JSON object in place of the tables."""


@dataclass(frozen=True)
class PlanOptions:
    """A run to look at before it is made; its parts are those of `TrainConfig`.

    Attributes:
        plan: what to look at, and what to print.
        model: the base model and how it is computed.
        data: rows, template, lengths; without rows, rows of `max_length` tokens are assumed.
        adapter: rank, alpha, targets.
        optimization: steps, rates, batches.
        run: evaluation and checkpoints; nothing is written.
        objective: what is minimised.
        rewards: of answers that the model writes itself.
    """

    plan: PlanRunOptions = field(default_factory=PlanRunOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: LoRAConfig = field(default_factory=LoRAConfig)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    rewards: RewardOptions = field(default_factory=RewardOptions)

    def validate(self) -> PlanOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        check_fields(self.plan)
        self.config.validate()
        return self

    @property
    def config(self) -> TrainConfig:
        """The run itself."""
        return TrainConfig(**{part.name: getattr(self, part.name) for part in fields(TrainConfig)})

    @classmethod
    def of(cls, config: TrainConfig) -> PlanOptions:
        """A look at this run."""
        parts = {part.name: getattr(config, part.name) for part in fields(TrainConfig)}
        return cls(PlanRunOptions(), **parts)


@dataclass(frozen=True)
class ModelsOptions:
    """Which models to list, and how."""

    places: tuple[Path, ...] = ()
    """Folders to look through, or files; without any, the stores of Ollama, LM Studio, llama.cpp and Hugging Face."""

    json: bool = False
    """Print one JSON list in place of the table."""
