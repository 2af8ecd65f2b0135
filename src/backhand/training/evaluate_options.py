"""What `backhand evaluate` can be told. This file imports no torch: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from backhand.bounds import Check, Count, Options
from backhand.data.options import DataOptions
from backhand.generate.options import LabelNames
from backhand.training.config import ModelOptions
from backhand.training.rewards.options import check_names


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
