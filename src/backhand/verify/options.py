"""Options of `backhand verify`. This file imports no torch, because the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from backhand.bounds import Bound, Options
from backhand.data.options import DataOptions
from backhand.errors import UsageError
from backhand.nn.model_options import BaseModelOptions, check_base


@dataclass(frozen=True)
class VerifiedModelOptions(BaseModelOptions):
    """The model to prove, if any, and its compute settings."""

    model: str = ""
    """Prove the gradients of this base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`. By
    default every op is proved, and a block and a decoder of every family."""


@dataclass(frozen=True)
class VerifyRunOptions:
    """The proofs to run, and where to record them."""

    op: str | None = None
    """Prove only this op, or `block` or `decoder`, and list each of its mutants."""

    large: bool = False
    """Prove only the sums of the ops at the sizes of real models, in each form that this processor supports."""

    adapter: Path | None = None
    """Prove the gradients of this adapter on `model`, by default the model that it was trained on. Without an adapter,
    `model` gets a random one with nonzero lora_B."""

    max_tokens: Annotated[int, Bound(at_least=8)] = 256
    """With `model` or `adapter`: use about this many tokens of the first rows. Long rows are cut."""

    run: Path | None = None
    """Append every proof to proofs.jsonl of this run directory. Without `op` and `model`, the run's model, rows and
    adapter are proved."""

    json: bool = False
    """Print one JSON object instead of the tables."""


@dataclass(frozen=True)
class VerifyOptions(Options):
    """Options of one verification.

    Attributes:
        verify: the proofs to run, and where to record them.
        model: the base model and its compute settings.
        data: rows for proving a model, by default a few neutral texts of the package.
    """

    verify: VerifyRunOptions = field(default_factory=VerifyRunOptions)
    model: VerifiedModelOptions = field(default_factory=VerifiedModelOptions)
    data: DataOptions = field(default_factory=DataOptions)

    @property
    def proves_model(self) -> bool:
        """True if a model is proved, and not the ops."""
        return bool(self.model.model or self.verify.adapter)

    def _check_together(self) -> None:
        check_base(self.model)
        if self.verify.large and (self.verify.op is not None or self.proves_model or self.verify.run is not None):
            raise UsageError(
                "large is given together with an op, a model or a run",
                where="large",
                next_step="give --large alone: it has separate cases",
            )
        if self.proves_model:
            if self.verify.op is not None:
                raise UsageError(
                    f"op {self.verify.op!r} is given together with a model or an adapter",
                    where="op",
                    next_step="give --op for one op on its own cases, or --model for a model on its rows",
                )
            if self.model.engine == "transformers":
                raise UsageError(
                    "engine 'transformers' computes gradients by autograd, so there are none by hand to prove",
                    where="engine",
                )
        elif self.verify.run is None and self.data.data:
            raise UsageError("data is given, but no model", where="data", next_step="give --model as well")
