"""What `backhand lint` can be told. This file imports no torch: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass, field

from backhand.data.options import DataOptions, check_count
from backhand.errors import UsageError


@dataclass(frozen=True)
class LintRunOptions:
    """What to look with, and what to print."""

    model: str = "smollm2-135m"
    """The base model whose tokenizer and chat template read the rows: a Hugging Face directory, a GGUF file, a hub id,
    or `smollm2-135m`. Its weights are not read."""

    seed: int = 0
    """Draws the rows that `eval_fraction` holds out, as in training."""

    show: int = 0
    """Also print the first so many training documents token by token, a `*` before each token that carries loss."""

    json: bool = False
    """Print one JSON object in place of the tables."""


@dataclass(frozen=True)
class LintOptions:
    """One look at rows.

    Attributes:
        lint: the model that reads them, and what to print.
        data: the rows, as for training.
    """

    lint: LintRunOptions = field(default_factory=LintRunOptions)
    data: DataOptions = field(default_factory=DataOptions)

    def validate(self) -> LintOptions:
        """Check every field before anything is read; return self. Raises UsageError naming field, value and range."""
        if not self.lint.model:
            raise UsageError("no base model is given", where="model", next_step="give a directory, a file or a hub id")
        check_count("seed", self.lint.seed, at_least=0)
        check_count("show", self.lint.show, at_least=0)
        self.data.validate()
        if not self.data.data:
            raise UsageError("there is no data", where="data", next_step="give --data FILE")
        return self
