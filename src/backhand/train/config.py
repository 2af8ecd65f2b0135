"""Everything a training run can be told: one dataclass per concern; it is the command line, the TOML file and the docs.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from backhand.adapters.config import LoRAConfig
from backhand.data.options import DataOptions
from backhand.errors import UsageError
from backhand.nn.model_options import BaseModelOptions

Recompute = Literal["auto", "none", "mlp", "block"]
Schedule = Literal["linear", "cosine", "constant"]

LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")

_BYTE_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class ModelOptions(BaseModelOptions):
    """The base model and how it is computed, and in how much memory."""

    memory: str | None = None
    """Memory the run may use in all, such as `6GB`; not given: what is free. Decides micro-batch and recomputation."""

    recompute: Recompute = "auto"
    """What is computed again in the backward pass instead of being kept: `none`, `mlp` or `block`; less memory, more
    time. `auto` chooses the first that fits the memory."""

    def validate(self) -> ModelOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        self.check_base_model()
        _check_choice("recompute", self.recompute, ("auto", "none", "mlp", "block"))
        if self.memory is not None:
            parse_bytes(self.memory, where="memory")
        if self.engine == "transformers" and self.recompute in ("mlp", "block"):
            raise UsageError(
                f"recompute {self.recompute!r} works with the backhand engine only",
                where="recompute",
                next_step="leave out --recompute, or use --engine backhand",
            )
        return self


@dataclass(frozen=True)
class OptimizationOptions:
    """How the adapter is trained: steps, rates and batches."""

    epochs: int = 3
    """Passes over the training rows. At least 1."""

    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever the epochs."""

    learning_rate: float = 2e-4
    """Highest learning rate of AdamW. Above 0."""

    schedule: Schedule = "linear"
    """How the rate falls after warm-up: `linear` or `cosine` to zero, or `constant`."""

    warmup_steps: int | None = None
    """Steps over which the rate rises to `learning_rate`, the first one above zero; not given: 3 % of all steps."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW. 0 or above."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to at most this norm over the whole adapter; 0 turns clipping off."""

    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients, in [0, 1)."""

    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients, in [0, 1)."""

    adam_epsilon: float = 1e-8
    """Added to the root in AdamW's quotient. Above 0."""

    batch_rows: int = 16
    """Rows per optimizer step. At least 1."""

    micro_batch_rows: int | None = None
    """Rows per forward and backward pass; not given: as many as fit the memory, at most `batch_rows`. Changes time and
    memory, not the result: every supervised token of a step weighs the same."""

    def validate(self) -> OptimizationOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        _check_count("epochs", self.epochs)
        _check_count("max_steps", self.max_steps, optional=True)
        _check_above_zero("learning_rate", self.learning_rate)
        _check_choice("schedule", self.schedule, ("linear", "cosine", "constant"))
        _check_count("warmup_steps", self.warmup_steps, lowest=0, optional=True)
        _check_number("weight_decay", self.weight_decay)
        _check_number("max_grad_norm", self.max_grad_norm)
        _check_number("adam_beta1", self.adam_beta1, below=1.0)
        _check_number("adam_beta2", self.adam_beta2, below=1.0)
        _check_above_zero("adam_epsilon", self.adam_epsilon)
        _check_count("batch_rows", self.batch_rows)
        _check_count("micro_batch_rows", self.micro_batch_rows, optional=True)
        if self.micro_batch_rows is not None and self.micro_batch_rows > self.batch_rows:
            raise UsageError(
                f"micro_batch_rows {self.micro_batch_rows} is larger than batch_rows {self.batch_rows}",
                where="micro_batch_rows",
                next_step="give at most batch_rows, or leave it out",
            )
        return self


@dataclass(frozen=True)
class RunOptions:
    """The run as such: where it is kept, when it is measured and saved, how it starts and stops."""

    output: Path = Path("run")
    """Run directory: adapter, checkpoints, metrics. Must not exist yet, unless resumed or overwritten."""

    eval_every: int | None = None
    """Held-out evaluation every so many steps; not given: five times a run. Always before the first step and at the
    end."""

    save_every: int | None = None
    """Checkpoint every so many steps; not given: five times a run. Always after a better held-out loss, at the end and
    on interruption."""

    keep: int = 2
    """Checkpoints to keep, besides the best one. At least 1."""

    early_stopping: int | None = None
    """Stop after this many evaluations in a row without a better held-out loss."""

    resume: bool = False
    """Continue the run in `output` from its newest valid checkpoint, to the same bits as an uninterrupted run."""

    overwrite: bool = False
    """Replace the run in `output`."""

    from_adapter: str | None = None
    """Start from this adapter's values instead of fresh ones, a directory or a GGUF file; its rank, alpha and targets
    are taken over, and other ones are refused."""

    seed: int = 0
    """Of the initial adapter, the order of rows, dropout, and the held-out split."""

    log_every: int = 1
    """A line in metrics.jsonl every so many steps."""

    max_bad_steps: int = 5
    """Stop after this many steps in a row with a non-finite loss or gradient; each one is skipped."""

    max_forgetting: float | None = None
    """Stop when the loss on neutral texts has risen by more than this many nats per token, as measured at each
    evaluation."""

    prove_resume: int | None = None
    """At the end, repeat the last so many steps from a checkpoint and compare every bit."""

    answers: int = 4
    """Held-out rows that base and adapter answer at the end, for the report to show side by side; 0 for none."""

    report_to: tuple[str, ...] = ()
    """Also log to `tensorboard`, `wandb` (offline unless WANDB_MODE is set), `mlflow` or `trackio`, each an extra to
    install; names are those of metrics.jsonl."""

    quiet: bool = False
    """Print errors only."""

    debug: bool = False
    """Show a traceback with an error."""

    def validate(self) -> RunOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        _check_count("eval_every", self.eval_every, optional=True)
        _check_count("save_every", self.save_every, optional=True)
        _check_count("keep", self.keep)
        _check_count("early_stopping", self.early_stopping, optional=True)
        _check_count("seed", self.seed, lowest=0)
        _check_count("log_every", self.log_every)
        _check_count("max_bad_steps", self.max_bad_steps)
        _check_count("prove_resume", self.prove_resume, optional=True)
        _check_count("answers", self.answers, lowest=0)
        for name in self.report_to:
            _check_choice("report_to", name, LOGGERS)
        if self.max_forgetting is not None:
            _check_above_zero("max_forgetting", self.max_forgetting)
        if self.seed >= 2**63:
            raise UsageError(f"seed {self.seed} is not below 2**63", where="seed")
        if not str(self.output):
            raise UsageError("output is empty", where="output", next_step="name a directory")
        if self.resume and self.overwrite:
            raise UsageError("resume and overwrite contradict each other", where="resume", next_step="give one of them")
        if self.resume and self.from_adapter is not None:
            raise UsageError(
                "resume continues the adapter of the run, from_adapter starts from another",
                where="from_adapter",
                next_step="give one of them",
            )
        return self


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The command line, `run.toml` and `backhand.train` take exactly this.

    Attributes:
        model: the base model and how it is computed.
        data: rows, template, lengths.
        adapter: rank, alpha, targets.
        optimization: steps, rates, batches.
        run: directory, evaluation, checkpoints.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: LoRAConfig = field(default_factory=LoRAConfig)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def validate(self) -> TrainConfig:
        """Check every field by itself and against the others, before anything is loaded; return self.

        Raises:
            UsageError: names the field, its value and the range it must lie in.
        """
        check_kind("model", self.model, ModelOptions)
        check_kind("data", self.data, DataOptions)
        check_kind("adapter", self.adapter, LoRAConfig)
        check_kind("optimization", self.optimization, OptimizationOptions)
        check_kind("run", self.run, RunOptions)
        for part in (self.model, self.data, self.adapter, self.optimization, self.run):
            part.validate()
            _check_utf8(part)
        # A resumed run has the held-out rows it began with: what differs from its own options is told then.
        if self.run.early_stopping is not None and not self.run.resume and not _holds_out(self.data):
            raise UsageError(
                f"early_stopping {self.run.early_stopping} needs held-out rows, and there are none",
                where="early_stopping",
                next_step="give eval_data or eval_fraction as well, or leave it out",
            )
        return self


def _check_utf8(part: Any) -> None:
    """Raise UsageError for a name that is not UTF-8, as a file of another system may have: config.toml is."""
    for option in fields(part):
        value = getattr(part, option.name)
        for text in value if isinstance(value, tuple | list) else (value,):
            try:
                str(text).encode("utf-8")
            except UnicodeEncodeError:
                raise UsageError(
                    f"{str(text)!r} is not UTF-8",
                    where=option.name,
                    why="a run writes its options into config.toml, which is",
                    next_step="rename it, or give a link to it that has another name",
                ) from None


def _holds_out(data: DataOptions) -> bool:
    """Whether some rows are kept from training: named, drawn, or lying beside the training rows."""
    from backhand.data.sources import held_out_beside  # readers of files: --help needs none of them

    return bool(data.eval_data or data.eval_fraction or held_out_beside(data.data))


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise UsageError where a program gives something else than the dataclass that is wanted."""
    if not isinstance(value, kind):
        raise UsageError(
            f"{name} is a {type(value).__name__}, not a {kind.__name__}",
            where=name,
            next_step=f"write {name}=backhand.{kind.__name__}(…)",
        )


def parse_bytes(text: str, *, where: str) -> int:
    """`6GB`, `512M`, `2.5GiB` or a plain number of bytes, in bytes (powers of 1024).

    Raises:
        UsageError: not a positive amount.
    """
    stripped = text.strip().lower().replace("ib", "b")
    digits = stripped.rstrip("bkmgt ")
    unit = stripped[len(digits) :].strip()
    try:
        amount = float(digits) * _BYTE_UNITS[unit if len(unit) < 2 else unit.removesuffix("b")]
    except (ValueError, KeyError):
        amount = math.nan
    if not 1 <= amount < 2**63:
        raise UsageError(f"{text!r} is not an amount of memory", where=where, next_step="write it as 6GB or 512MB")
    return int(amount)


def _check_choice(where: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{where} {value!r} is not one of {', '.join(choices)}", where=where)


def _check_count(where: str, value: object, *, lowest: int = 1, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise UsageError(f"{where} {value!r} is not an integer of at least {lowest}", where=where)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_above_zero(where: str, value: float) -> None:
    if not _is_number(value) or value <= 0:
        raise UsageError(f"{where} {value!r} is not a finite number above 0", where=where)


def _check_number(where: str, value: float, *, below: float = math.inf) -> None:
    if not _is_number(value) or not 0 <= value < below:
        bound = "a finite number of at least 0" if below == math.inf else f"a number in [0, {below:g})"
        raise UsageError(f"{where} {value!r} is not {bound}", where=where)
