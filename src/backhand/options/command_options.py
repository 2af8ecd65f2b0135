"""What `backhand evaluate`, `plan` and `models` can be told.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from backhand.bounds import Check, Count, CountFromZero, Options
from backhand.data.options import DataOptions
from backhand.generate.options import LabelNames
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.rewards import check_names


@dataclass(frozen=True)
class EvaluateRunOptions:
    """What to evaluate, and how."""

    adapter: Path | None = None
    """Adapter to put beside the base model: the directory that training or PEFT wrote, or a GGUF file; not given: the
    base model alone."""

    max_new_tokens: Count = 256
    """Longest greedy completion that is compared with the row's last one, or rewarded."""

    reward: Annotated[tuple[str, ...], Check(check_names)] = ()
    """In place of losses: what greedy answers are rewarded by, as in training (`--objective grpo`)."""

    micro_batch_rows: Count = 16
    """Rows per forward pass."""

    completions: bool = True
    """Also answer every row and compare: exact match. Off, only the losses are measured."""

    labels: LabelNames = ()
    """Judge answers as labels, such as `yes,no`; `auto` takes those of the adapter's training rows, or where these had
    none, those of the rows, if they are few and short. Not given: as `auto`, where there are any; `none`: not."""

    json: bool = False
    """Print one JSON object in place of the table."""


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """One evaluation: the model, the rows, and what to measure on them.

    Attributes:
        model: the base model and how it is computed.
        data: rows, template, lengths; `data` names the rows to evaluate.
        run: adapter and output.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    run: EvaluateRunOptions = field(default_factory=EvaluateRunOptions)


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
