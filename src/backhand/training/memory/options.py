"""What `backhand plan` can be told: everything that `train` can, and what to print. This file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from backhand.bounds import CountFromZero
from backhand.training.config import TrainConfig


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
class PlanOptions(TrainConfig):
    """A run to look at before it is made; its other parts are those of `TrainConfig`.

    Attributes:
        plan: what to look at, and what to print; without rows, rows of `max_length` tokens are assumed.
    """

    plan: PlanRunOptions = field(default_factory=PlanRunOptions)


@dataclass(frozen=True)
class ModelsOptions:
    """Which models to list, and how."""

    places: tuple[Path, ...] = ()
    """Folders to look through, or files; without any, the stores of Ollama, LM Studio, llama.cpp and Hugging Face."""

    json: bool = False
    """Print one JSON list in place of the table."""
