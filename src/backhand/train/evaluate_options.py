"""What `backhand evaluate` can be told. This file imports no torch: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from backhand.data.options import DataOptions
from backhand.errors import UsageError
from backhand.train.config import ModelOptions, check_kind


@dataclass(frozen=True)
class EvaluateRunOptions:
    """What to evaluate, and how."""

    adapter: Path | None = None
    """Adapter to put beside the base model: the directory that training or PEFT wrote, or a GGUF file; not given: the
    base model alone."""

    max_new_tokens: int = 256
    """Longest greedy completion that is compared with the row's last one. At least 1."""

    micro_batch_rows: int = 16
    """Rows per forward pass. At least 1."""

    completions: bool = True
    """Also answer every row and compare: exact match. Off, only the losses are measured."""

    json: bool = False
    """Print one JSON object in place of the table."""

    def validate(self) -> EvaluateRunOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        for name in ("max_new_tokens", "micro_batch_rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} {value!r} is not an integer of at least 1", where=name)
        return self


@dataclass(frozen=True)
class EvaluateOptions:
    """One evaluation: the model, the rows, and what to measure on them.

    Attributes:
        model: the base model and how it is computed.
        data: rows, template, lengths; `data` names the rows to evaluate.
        run: adapter and output.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    run: EvaluateRunOptions = field(default_factory=EvaluateRunOptions)

    def validate(self) -> EvaluateOptions:
        """Check every field before anything is loaded; return self. Raises UsageError."""
        check_kind("model", self.model, ModelOptions)
        check_kind("data", self.data, DataOptions)
        check_kind("run", self.run, EvaluateRunOptions)
        for part in (self.model, self.data, self.run):
            part.validate()
        return self
