"""Everything a training run can be told: one dataclass per concern; it is the command line, the TOML file and the docs.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from backhand.adapters.config import LoRAConfig
from backhand.bounds import Bound, Check, Count, CountFromZero, NotNegative, Options, Positive, Seed, Share
from backhand.data.options import DataOptions
from backhand.errors import UsageError
from backhand.nn.model_options import BaseModelOptions
from backhand.options.objectives import ObjectiveOptions
from backhand.options.rewards import RewardOptions

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


def _check_memory(where: str, memory: Any) -> None:
    parse_bytes(str(memory), where=where)


@dataclass(frozen=True)
class ModelOptions(BaseModelOptions):
    """The base model and how it is computed, and in how much memory."""

    memory: Annotated[str, Check(_check_memory)] | None = None
    """Memory the run may use in all, such as `6GB`; not given: what is free. Decides micro-batch and recomputation."""

    recompute: Recompute = "auto"
    """What is computed again in the backward pass instead of being kept: `none`, `mlp` or `block`; less memory, more
    time. `auto` chooses the first that fits the memory."""

    cache_frozen: CacheFrozen = "auto"
    """Where the hidden states that enter the lowest adapted layer are kept, so that each row goes through the layers
    below once in a run: in `memory`, on the `disk` in the run directory, or not at all, `off`; the result is the same
    bits. `auto` takes memory while it lasts, else the disk."""

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


@dataclass(frozen=True)
class OptimizationOptions(Options):
    """How the adapter is trained: steps, rates and batches."""

    epochs: Count = 3
    """Passes over the training rows."""

    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever the epochs."""

    learning_rate: Positive | Literal["auto"] = "auto"
    """Highest learning rate of AdamW. `auto` chooses it by the size of the frozen weights, see docs/rates.md; what it
    chose stands in config.toml."""

    loraplus_lr_ratio: Positive = 1.0
    """LoRA+ [arXiv:2402.12354]: every lora_B that starts at zero has so many times the learning rate of the rest; 1 for
    plain LoRA, 2 to 16 is usual."""

    schedule: Schedule = "linear"
    """How the rate falls after warm-up: `linear` or `cosine` to zero, or `constant`."""

    warmup_steps: CountFromZero | None = None
    """Steps over which the rate rises to `learning_rate`, the first one above zero; not given: 3 % of all steps."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW."""

    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to at most this norm over the whole adapter; 0 turns clipping off."""

    adam_beta1: Share = 0.9
    """Decay of AdamW's mean of gradients."""

    adam_beta2: Share = 0.999
    """Decay of AdamW's mean of squared gradients."""

    adam_epsilon: Positive = 1e-8
    """Added to the root in AdamW's quotient."""

    batch_rows: Count = 16
    """Rows per optimizer step."""

    micro_batch_rows: Count | None = None
    """Rows per forward and backward pass; not given: as many as fit the memory, at most `batch_rows`. Changes time and
    memory, not the result: every supervised token of a step weighs the same."""

    def _check_together(self) -> None:
        if self.micro_batch_rows is not None and self.micro_batch_rows > self.batch_rows:
            raise UsageError(
                f"micro_batch_rows {self.micro_batch_rows} is larger than batch_rows {self.batch_rows}",
                where="micro_batch_rows",
                next_step="give at most batch_rows, or leave it out",
            )


@dataclass(frozen=True)
class RunOptions(Options):
    """The run as such: where it is kept, when it is measured and saved, how it starts and stops."""

    output: Path = Path("run")
    """Run directory: adapter, checkpoints, metrics. Must not exist yet, unless resumed or overwritten."""

    eval_every: Count | None = None
    """Held-out evaluation every so many steps; not given: five times a run. Always before the first step and at the
    end."""

    save_every: Count | None = None
    """Checkpoint every so many steps; not given: five times a run. Always after a better held-out loss, at the end and
    on interruption."""

    keep: Count = 2
    """Checkpoints to keep, besides the best one."""

    early_stopping: Count | None = None
    """Stop after this many evaluations in a row without a better held-out loss."""

    resume: bool = False
    """Continue the run in `output` from its newest valid checkpoint, to the same bits as an uninterrupted run."""

    overwrite: bool = False
    """Replace the run in `output`."""

    from_adapter: str | None = None
    """Start from this adapter's values instead of fresh ones, a directory or a GGUF file; its rank, alpha and targets
    are taken over, and other ones are refused."""

    seed: Seed = 0
    """Of the initial adapter, the order of rows, dropout, and the held-out split."""

    log_every: Count = 1
    """A line in metrics.jsonl every so many steps."""

    max_bad_steps: Count = 5
    """Stop after this many steps in a row with a non-finite loss or gradient; each one is skipped."""

    max_forgetting: Positive | None = None
    """Stop when the loss on neutral texts has risen by more than this many nats per token, as measured at each
    evaluation."""

    prove_resume: Count | None = None
    """At the end, repeat the last so many steps from a checkpoint and compare every bit."""

    answers: CountFromZero = 4
    """Held-out rows that base and adapter answer at the end, for the report to show side by side; 0 for none, and then
    none is counted as right or wrong either."""

    report_to: tuple[Logger, ...] = ()
    """Also log to `tensorboard`, `wandb` (offline unless WANDB_MODE is set), `mlflow` or `trackio`, each an extra to
    install; names are those of metrics.jsonl."""

    workers: Workers = 1
    """Processes on this machine to share each step out to, started by torch's own launcher; without effect under
    torchrun, which starts them itself. The rows of a step and the dropout masks do not depend on their number."""

    reduce: Reduce = "ordered"
    """How gradients of several processes add up: `ordered` adds micro-batches in their own order, to the same bits with
    any number of processes; `sum` in one all-reduce, to the same within rounding, with less to send where a process has
    several micro-batches."""

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
    """One training run. The command line, `run.toml` and `backhand.train` take exactly this.

    Attributes:
        model: the base model and how it is computed.
        data: rows, template, lengths.
        adapter: rank, alpha, targets.
        optimization: steps, rates, batches.
        run: directory, evaluation, checkpoints.
        objective: what is minimised.
        rewards: of answers that the model writes itself.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    adapter: LoRAConfig = field(default_factory=LoRAConfig)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    rewards: RewardOptions = field(default_factory=RewardOptions)

    @property
    def run_config(self) -> TrainConfig:
        """The run alone, of a command that can be told more."""
        return TrainConfig(**{part.name: getattr(self, part.name) for part in fields(TrainConfig)})

    def _check_together(self) -> None:
        for part in (self.model, self.data, self.adapter, self.optimization, self.run, self.objective, self.rewards):
            _check_utf8(part)
        self._check_rewards()
        if self.data.train_on == "all" and self.objective.objective != "sft":
            raise UsageError(
                f"train_on 'all' would compare prompts, and {self.objective.objective} compares answers",
                where="train_on",
                next_step="leave out --train-on, or give --objective sft",
            )

    def _check_rewards(self) -> None:
        rewarded, given = self.objective.objective == "grpo", self.rewards.given()
        if given and not rewarded and not self.run.resume:
            raise UsageError(
                f"{given[0]} is given, and {self.objective.objective} has no rewards",
                where=given[0],
                next_step="leave it out, or give --objective grpo",
            )
        if rewarded and not self.rewards.reward and not self.run.resume:
            raise UsageError("grpo rewards nothing", where="reward", next_step="give --reward, see docs/rewards.md")
        if rewarded and self.adapter.dropout:
            raise UsageError(
                f"dropout {self.adapter.dropout} would train another model than the one that samples",
                where="dropout",
                next_step="leave out --dropout",
            )
        if rewarded and self.model.engine == "transformers":
            raise UsageError(
                "answers are sampled and trained on by the backhand engine alone",
                where="engine",
                why="its sampler and its training pass are one computation, which every step proves",
                next_step="leave out --engine",
            )


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
