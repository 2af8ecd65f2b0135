"""Options of a training run: one dataclass per concern.

The command line, the TOML file and the documentation are generated from the fields and their docstrings. This file
imports no torch, because `--help` imports it.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from backhand.adapters.config import LoRAConfig
from backhand.bounds import (
    Bound,
    Check,
    Count,
    CountFromZero,
    GivenBaseModel,
    GivenPath,
    NotNegative,
    Options,
    Positive,
    Seed,
    Share,
)
from backhand.data.forms import check_options
from backhand.data.options import DataOptions
from backhand.data.row_kind import row_kind
from backhand.errors import UsageError, not_utf8
from backhand.nn.model_options import BaseModelOptions
from backhand.objective.registry import objectives
from backhand.objective.spec import Traits
from backhand.options.objectives import ObjectiveOptions
from backhand.options.rewards import SAMPLING, RewardOptions
from backhand.words import shown

Recompute = Literal["auto", "none", "mlp", "block"]
CacheFrozen = Literal["auto", "memory", "disk", "off"]
Schedule = Literal["linear", "cosine", "constant"]
Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Reduce = Literal["ordered", "sum"]
MOST_WORKERS = 1024
Workers = Annotated[
    int,
    Bound(
        at_least=1,
        at_most=MOST_WORKERS,
        why="more processes than the machine has cores make nothing faster",
        next_step="give as many as the machine has cores or cards, at most",
    ),
]
_BYTE_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str, *, where: str) -> int:
    """Parse `6GB`, `512M`, `2.5GiB` or a plain number as bytes (powers of 1024).

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


def _check_memory(where: str, memory: Any) -> None:
    parse_bytes(str(memory), where=where)


def _check_resume(where: str, value: Any) -> None:
    if isinstance(value, str):
        raise UsageError(
            f"{where} {shown(value)} is neither true nor false",
            where=where,
            why="the run to continue is the one in output",
            next_step=f"give --resume --output {shlex.quote(value)}",
        )


@dataclass(frozen=True)
class ModelOptions(BaseModelOptions):
    """The base model and how it is computed, and in how much memory."""

    model: GivenBaseModel = "smollm2-135m"  # type: ignore[assignment]
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`."""

    memory: Annotated[str, Check(_check_memory)] | None = None
    """Memory that the run may use in total, such as `6GB`. Default: the memory that is free. It determines the
    micro-batch size and recomputation."""

    recompute: Recompute = "auto"
    """Activations to recompute in the backward pass instead of saving them: `none`, `mlp` or `block`. Recomputation
    needs less memory and more time. `auto` chooses the first of the three that fits into memory."""

    cache_frozen: CacheFrozen = "auto"
    """Cache for the hidden states that enter the lowest adapted layer, so that each row passes the layers below once
    per run: `memory`, `disk` (in the run directory) or `off`. The result has the same bits. `auto` uses memory if it
    suffices, otherwise the disk."""

    def _check_together(self) -> None:
        super()._check_together()
        if self.engine == "transformers" and self.recompute in ("mlp", "block"):
            raise UsageError(
                f"recompute {self.recompute!r} works with the backhand engine only",
                where="recompute",
                next_step="leave out --recompute, or use --engine backhand",
            )
        if self.engine == "transformers" and self.cache_frozen in ("memory", "disk"):
            raise UsageError(
                f"cache_frozen {self.cache_frozen!r} works with the backhand engine only",
                where="cache_frozen",
                next_step="leave out --cache-frozen, or use --engine backhand",
            )


_EPOCHS = 3
_AVERAGED_FROM = 50  # steps
_MOST_EPOCHS = 15  # by default


@dataclass(frozen=True)
class OptimizationOptions(Options):
    """Steps, learning rate and batches."""

    epochs: Count | None = None
    """Passes over the training rows. Default: 3, and with few rows for `decide` or `rank` as many as make 100 steps, at
    most 15."""

    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever the epochs."""

    learning_rate: Positive | Literal["auto"] = "auto"
    """Highest learning rate of AdamW. `auto` chooses it from the size of the frozen weights, see docs/rates.md, and
    writes it to config.toml."""

    loraplus_lr_ratio: Positive = 1.0
    """LoRA+ [arXiv:2402.12354]: factor of the learning rate of every lora_B that starts at zero. 1 is plain LoRA; 2 to
    16 is usual."""

    schedule: Schedule = "linear"
    """Decay of the learning rate after the warm-up: `linear` or `cosine` to zero, or `constant`."""

    warmup_steps: CountFromZero | None = None
    """Number of steps in which the rate rises to `learning_rate`. Default: 3 % of all steps."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW."""

    max_grad_norm: NotNegative = 1.0
    """Largest norm of the whole adapter's gradient, which is scaled down to it; 0 turns clipping off."""

    adam_beta1: Share = 0.9
    """Decay rate of AdamW's mean of gradients."""

    adam_beta2: Share = 0.999
    """Decay rate of AdamW's mean of squared gradients."""

    adam_epsilon: Positive = 1e-8
    """Term added to the denominator of AdamW's update for numerical stability."""

    average_share: Annotated[float, Bound(at_least=0.0, at_most=1.0)] | None = None
    """Average the adapter's values over about this share of the steps so far (1212.1824), which evens out the noise of
    single steps. Each evaluation measures the average and the newest values, and the better ones are saved; without
    held-out rows, the average is. 0: no average. Default: 0.6 for `decide` with at least 50 steps, otherwise 0."""

    batch_rows: Count = 16
    """Rows per optimizer step."""

    micro_batch_rows: Count | None = None
    """Rows per forward and backward pass. Default: as many as fit into memory, at most `batch_rows`. It changes time
    and memory but not the result, because every supervised token of a step has the same weight."""

    def _check_together(self) -> None:
        if self.micro_batch_rows is not None and self.micro_batch_rows > self.batch_rows:
            raise UsageError(
                f"micro_batch_rows {self.micro_batch_rows} is larger than batch_rows {self.batch_rows}",
                where="micro_batch_rows",
                next_step="give at most batch_rows, or leave it out",
            )


@dataclass(frozen=True)
class RunOptions(Options):
    """Output directory, evaluation, checkpoints, start and end of a run."""

    output: GivenPath = Path("run")  # type: ignore[assignment]
    """Run directory for adapter, checkpoints and metrics. It must not exist yet, unless `resume` or `overwrite` is
    given."""

    eval_every: Count | None = None
    """Number of steps between evaluations on held-out rows. Default: five evaluations per run. There is always one
    before the first step and one at the end."""

    save_every: Count | None = None
    """Number of steps between checkpoints. Default: five checkpoints per run. There is always one after a better
    held-out loss, at the end and on interruption."""

    keep: Count = 2
    """Number of checkpoints to keep in addition to the best one."""

    early_stopping: Count | None = None
    """Stop after this many evaluations in a row without a better held-out loss."""

    resume: Annotated[bool, Check(_check_resume)] = False
    """Continue the run in `output` from its newest valid checkpoint, to the same bits as an uninterrupted run."""

    overwrite: bool = False
    """Replace the run in `output`."""

    from_adapter: str | None = None
    """Adapter to start from instead of fresh values: a directory or a GGUF file. Its rank, alpha and targets are used;
    other values of these options are an error."""

    seed: Seed = 0
    """Seed of the initial adapter, the order of rows, dropout and the held-out split."""

    log_every: Count = 1
    """Number of steps between lines in metrics.jsonl."""

    max_bad_steps: Count = 5
    """Stop after this many consecutive steps with a non-finite loss or gradient. Each such step is skipped."""

    max_forgetting: Positive | None = None
    """Stop when the loss on neutral texts is more than this many nats per token above that of the base model, as
    measured at each evaluation. What an adapter to start from has forgotten counts as well."""

    prove_resume: Count | None = None
    """Number of steps to repeat from a checkpoint at the end of the run. Every bit of the result is compared."""

    answers: CountFromZero = 4
    """Number of held-out rows that base and adapter answer at the end, shown side by side in the report. With 0, no
    answers are generated, so exact match is not measured."""

    report_to: tuple[Logger, ...] = ()
    """Experiment trackers to log to: `tensorboard`, `wandb` (offline unless WANDB_MODE is set), `mlflow` or `trackio`.
    Each is an extra to install. Metrics have the names of metrics.jsonl."""

    workers: Workers = 1
    """Number of processes on this machine that share each step, started by torch's launcher. Under torchrun, which
    starts the processes itself, the option has no effect. The rows of a step and the dropout masks do not depend on
    it."""

    reduce: Reduce = "ordered"
    """Sum of the gradients of several processes: `ordered` adds micro-batches in their order, which gives the same bits
    for any number of processes. `sum` uses one all-reduce, which gives the same result within rounding and sends less
    if a process has several micro-batches."""

    quiet: bool = False
    """Print errors only."""

    debug: bool = False
    """Show a traceback with an error."""

    def _check_together(self) -> None:
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


@dataclass(frozen=True)
class TrainConfig(Options):
    """Options of one training run, for the command line, `run.toml` and `backhand.train`.

    Attributes:
        model: the base model and how it is computed.
        data: rows, template, lengths.
        adapter: rank, alpha, targets.
        optimization: steps, rates, batches.
        run: directory, evaluation, checkpoints.
        objective: the loss.
        rewards: rewards of sampled answers, and how they are sampled.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: LoRAConfig = field(default_factory=LoRAConfig)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    rewards: RewardOptions = field(default_factory=RewardOptions)

    def epochs_of(self, rows: int) -> int:
        """Return the number of passes over this number of training rows."""
        optimization = self.optimization
        if optimization.epochs is not None:
            return optimization.epochs
        steps_per_epoch = -(-rows // optimization.batch_rows)
        traits: Traits = self.objective.traits
        return min(max(_EPOCHS, -(-traits.fewest_steps // max(1, steps_per_epoch))), _MOST_EPOCHS)

    def average_share_of(self, steps: int) -> float | None:
        """Return the share of the steps over which values are averaged in a run of this number of steps."""
        given = self.optimization.average_share
        usual = self.objective.traits.average_share
        return usual if given is None and usual and steps >= _AVERAGED_FROM else given

    @property
    def run_config(self) -> TrainConfig:
        """The run's options only, for a command with further options."""
        return TrainConfig(**{part.name: getattr(self, part.name) for part in fields(TrainConfig)})

    def _check_together(self) -> None:
        for part in (self.model, self.data, self.adapter, self.optimization, self.run, self.objective, self.rewards):
            _check_utf8(part)
        check_options(
            self.data, row_kind(self.objective.traits.rows), self.objective.objective, "give --objective {}".format
        )
        self._check_sections()
        self.objective.spec.check(self)

    def _check_sections(self) -> None:
        """Raise UsageError for options of rewards and of sampling that the objective does not read."""
        spec, traits = self.objective.spec, self.objective.traits
        read = SAMPLING if traits.samples else ()
        unused = [] if spec.has_rewards else [name for name in self.rewards.given() if name not in read]
        if unused and not self.run.resume:
            without = "no rewards" if traits.samples else "no rewards and samples no answers"
            others = " or ".join(one.name for one in objectives() if one.has_rewards)
            raise UsageError(
                f"{unused[0]} is given, and {spec.name} has {without}",
                where=unused[0],
                next_step=f"leave it out, or give --objective {others}",
            )

    def check_states(self, also: str = "") -> None:
        """Raise UsageError for options that a loss of hidden states does not use.

        Args:
            also: what can be done instead, after "leave it out".
        """
        objective = self.objective.objective
        unused = {
            "system": self.data.system,
            "chat_template": self.data.chat_template,
            "template_args": self.data.template_args,
            "max_forgetting": self.run.max_forgetting,
        }
        for name, value in unused.items():
            if value:
                raise UsageError(
                    f"{name} {shown(value)} is given, but {objective} does not use it",
                    where=name,
                    why="texts are encoded without a chat template, and the model predicts no tokens",
                    next_step=f"leave it out{also}",
                )
        if self.model.engine == "transformers":
            raise UsageError(
                f"{objective} is trained by the backhand engine alone",
                where="engine",
                why="the transformers engine does not give hidden states",
                next_step="leave out --engine",
            )


def _check_utf8(part: Any) -> None:
    """Raise UsageError for a name that is not UTF-8, since config.toml cannot contain it."""
    for option in fields(part):
        value = getattr(part, option.name)
        for text in value if isinstance(value, tuple | list) else (value,):
            try:
                str(text).encode("utf-8")
            except UnicodeEncodeError:
                raise not_utf8(
                    str(text),
                    where=option.name,
                    why="a run writes its options into config.toml, which is",
                    next_step="rename it, or give a link to it that has another name",
                ) from None
