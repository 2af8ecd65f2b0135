"""`backhand plan`: predict the memory and the duration of a run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from backhand.data.row_kind import row_kind
from backhand.data.row_sample import RowSample, sampled
from backhand.data.stored_examples import StoredExamples, tokens_of_documents
from backhand.distributed.communicator import Communicator
from backhand.engines.machine import Machine, resolve_machine
from backhand.engines.memory.plan import LIVE_VIEW, HeldBase
from backhand.errors import BackhandError, not_none
from backhand.loop.forecast import BUSY, FULL_LENGTH, between
from backhand.nn.compute import compute_settings
from backhand.options.command_options import PlanOptions
from backhand.printing import duration, reworded
from backhand.terminal import console, table_of, working
from backhand.training.calibration import Speed, calibrate
from backhand.training.hooks import training_of
from backhand.training.plan import RunPlan, plan_run
from backhand.words import count_of, in_words

_ASSUMED = "no --data: rows of {length:,} tokens (--max-length) are assumed, every token of them a target"

_HELD_OUT = "held out: "

_ESTIMATED = "kept activations and workspace are estimated from the model's sizes, not measured"


@dataclass(frozen=True)
class PlanReport:
    """Result of `backhand plan`."""

    plan: RunPlan  # model, adapter, rows, steps and memory
    machine: Machine  # where the run computes
    speed: Speed | None  # predicted durations; None if not measured
    rows: int  # training rows
    held_out_rows: int
    steps: int
    notes: tuple[str, ...]  # sentences for people
    # the longest training documents for `--show`, the longest first: location, tokens and supervised tokens
    longest: tuple[tuple[str, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, with sizes in bytes and durations in seconds."""
        plan, memory = self.plan, self.plan.memory
        return {
            "model": plan.inputs.config.model.model,
            "engine": plan.inputs.engine.name,
            "dtype": str(self.machine.dtype).removeprefix("torch."),
            "threads": self.machine.threads,
            "processes": self.machine.local_world_size,
            "rows": self.rows,
            "held_out_rows": self.held_out_rows,
            "steps": self.steps,
            "trained_parameters": plan.size.adapter_elements,
            "micro_batch_rows": memory.micro_batch_rows,
            "recompute": memory.recompute,
            "base": memory.base,
            "bases": {
                base: {
                    "peak_bytes": one.peak_bytes,
                    "micro_batch_rows": one.micro_batch_rows,
                    "recompute": one.recompute,
                    "fits": base in plan.bases.fitting,
                }
                for base, one in plan.bases.plans.items()
            },
            "parts": dict(memory.parts),
            "peak_bytes": memory.peak_bytes,
            "live_view_bytes": memory.second_model_bytes,
            "budget_bytes": plan.budget_bytes,
            "kept_states": {
                "where": plan.hidden_states.where,
                "layer": plan.hidden_states.frozen.layer,
                "bytes": plan.hidden_states.bytes,
            },
            **(asdict(self.speed) if self.speed else dict.fromkeys(Speed.__dataclass_fields__)),
            "notes": list(map(reworded, self.notes)),
            "longest": [
                {"where": reworded(source), "tokens": tokens, "supervised_tokens": supervised}
                for source, tokens, supervised in self.longest
            ],
        }


def plan(options: PlanOptions) -> PlanReport:
    """Plan a run without writing files or reading weights.

    Raises:
        UsageError, DataError, ArtifactError: for the same reasons as `train`.
        ResourceError: the run does not fit into memory. Names options that would fit.
    """
    config = options.validate().run_config
    sample = None
    if options.plan.sample is not None and config.data.data:
        most = max(options.plan.sample, 2 * config.optimization.batch_rows)  # the memory is that of whole steps
        sample = sampled(config.data, most, splits=row_kind(config.objective.traits.rows).has_answers)
        config = config if sample is None else replace(config, data=sample.options)
    machine, training = resolve_machine(config), training_of(config)
    with (
        _naming_files(sample),
        training.resources(config, Communicator()),
        compute_settings(config.model, machine.threads, machine.dtype, machine.device),
    ):
        factor = 1.0 if sample is None else sample.factor
        watched = options.plan.watch
        run_plan = plan_run(config, machine, assumed_rows=True, watched=watched, row_factor=factor, training=training)
        speed = calibrate(run_plan, machine) if options.plan.calibrate else None
    notes = [*([run_plan.inputs.engine.note] if run_plan.inputs.engine.note else []), *run_plan.inputs.engine.notes]
    if not config.data.data:
        assumed = _ASSUMED.format(length=config.data.max_length)
        notes.append("; ".join([assumed, *run_plan.inputs.train.report.notes]))
    else:
        notes += run_plan.inputs.train.report.lines(config.objective.traits.unit)
        if run_plan.inputs.held_out is not None:
            held_out = run_plan.inputs.held_out.report.lines(config.objective.traits.unit)
            notes.append(_HELD_OUT + "; ".join(held_out))
    if not run_plan.size.measured:
        notes.append(_ESTIMATED)
    inputs = run_plan.inputs
    held_out_rows = 0 if inputs.held_out is None else len(inputs.held_out.examples)
    rows, steps = len(inputs.train.examples), inputs.total_steps
    if sample is not None:
        notes = [sample.with_files(note) for note in notes]
        split = not run_plan.inputs.config.data.eval_data
        read = f"{rows + held_out_rows * split:,} documents of {count_of(sample.rows, 'row')}"
        notes.append(f"{read} were encoded, evenly spaced and with the longest; figures of all rows are estimated")
        rows = round(rows * sample.factor)
        steps = _steps_of_all(run_plan, sample)
        if speed is not None:
            ratio = steps / inputs.total_steps
            speed = replace(speed, train_s=speed.train_s * ratio, kept_s=speed.kept_s * ratio)
        if split and held_out_rows:
            held_out_rows = round(held_out_rows * sample.factor)
            if speed is not None:
                speed = replace(speed, evaluate_s=speed.evaluate_s * sample.factor)
    examples = inputs.train.examples
    places = np.argsort(-examples.column("tokens"), kind="stable")[: options.plan.show]
    longest = tuple(_shown(examples.take(places[number : number + 1])) for number in range(len(places)))
    return PlanReport(run_plan, machine, speed, rows, held_out_rows, steps, (*notes, *run_plan.notes), longest)


def _shown(example: StoredExamples) -> tuple[str, int, int]:
    """Return location, tokens and supervised tokens of an example's first document, without a placeholder."""
    placeholder = example[0].facts is not None and not example[0].facts.has_targets
    supervised = 0 if placeholder else int(example[0].supervised.sum())
    return example[0].source, int(tokens_of_documents(example)[0]), supervised


@contextmanager
def _naming_files(sample: RowSample | None) -> Iterator[None]:
    """Name the files in errors about a sample of their rows."""
    try:
        yield
    except BackhandError as error:
        if sample is not None:
            error.reword(sample.with_files)
        raise


def _steps_of_all(plan: RunPlan, sample: RowSample) -> int:
    """Return the number of steps with all rows of a file, of which the plan has a sample."""
    options = plan.inputs.config.optimization
    per_epoch = math.ceil(plan.inputs.sampler.records * sample.factor / options.batch_rows)
    return options.max_steps or not_none(options.epochs) * per_epoch


def plan_command(options: PlanOptions) -> PlanReport:
    """Run `plan` and print tables, or one JSON object with `json`."""
    with nullcontext() if options.plan.json else working("planning"):
        report = plan(options)
    if options.plan.json:
        sys.stdout.write(json.dumps(report.to_json(), indent=2) + "\n")
    else:
        _print(console(), report)
    return report


def _print(console: Console, report: PlanReport) -> None:
    plan, memory, machine = report.plan, report.plan.memory, report.machine
    config, dtype = plan.inputs.config, str(machine.dtype).removeprefix("torch.")
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    cut = f"{memory.micro_batch_rows} at a time, recompute {memory.recompute}"
    facts = (
        f"model: {config.model.model}, {dtype}, {plan.inputs.engine.name} engine, {threads} on {machine.device}",
        *(note if note.startswith(_HELD_OUT) else f"data: {note}" for note in report.notes),
        f"adapter: {plan.size.adapter_elements:,} parameters in {len(plan.inputs.layout.slots)} modules",
        f"base: {_bases(plan)}",
        f"step: {config.optimization.batch_rows} rows, {cut}",
        *(f"cached: {line}" for line in (plan.hidden_states.line(),) if line is not None),
    )
    for fact in facts:
        console.print(fact, soft_wrap=True)
    if machine.local_world_size > 1:
        each = "each with the memory below; a mapped base is in memory once"
        console.print(f"processes: {machine.local_world_size} on this machine, {each}", soft_wrap=True)
    shown = table_of("memory", "size", right=("size",))
    for name, size in memory.parts.items():
        shown.add_row(name, in_words(size))
    shown.add_section()
    shown.add_row("predicted peak", in_words(memory.peak_bytes), style="bold")
    if memory.second_model_bytes:
        shown.add_row(f"{LIVE_VIEW}, a second model", in_words(memory.second_model_bytes))
    if plan.budget_bytes is not None:
        shown.add_row("may be used", in_words(plan.budget_bytes))
    console.print(shown)
    if report.longest:
        rows = table_of("longest documents", "tokens", "supervised", right=("tokens", "supervised"))
        for source, *counts in report.longest:
            rows.add_row(source, *(f"{count:,}" for count in counts))
        console.print(rows)
    if report.speed is not None:
        _print_speed(console, report, report.speed)


def _bases(plan: RunPlan) -> str:
    """Describe the chosen form of the base and the other form."""
    taken = plan.memory.base
    cached_bytes = plan.memory.peak_bytes - plan.bases.plans[taken].peak_bytes  # hidden states of frozen layers

    def described(base: HeldBase) -> str:
        one = plan.bases.plans[base]
        fits = "" if base in plan.bases.fitting else ", which is not free"
        size = in_words(one.peak_bytes + cached_bytes)
        return f"{size}, {one.micro_batch_rows} at a time, recompute {one.recompute}{fits}"

    others = [f"{base} would take {described(base)}" for base in plan.bases.plans if base != taken]
    return "; ".join([f"{taken} takes {described(taken)}", *others])


def _print_speed(console: Console, report: PlanReport, speed: Speed) -> None:
    plan = report.plan
    of_all = "" if report.machine.local_world_size == 1 else f" of {report.machine.local_world_size} processes"
    text = (
        f"{speed.tokens_per_s:,.0f} tokens/s{of_all} (measured for {speed.measured_s:.0f} s): "
        f"{report.steps:,} steps take about {between(speed.train_s, speed.train_s, speed.busy)}"
        + FULL_LENGTH * plan.inputs.config.objective.traits.trains_on_samples
        + BUSY * (speed.busy is not None)
    )
    if speed.evaluate_s:
        text += f", evaluations {duration(speed.evaluate_s)} more"
    if speed.teacher_s:
        text += f", the teacher's answers and states before them about {duration(speed.teacher_s)}"
    text += f", checkpoints, answers and report {duration(speed.finish_s)}"
    if speed.kept_s:
        text += f"; cached hidden states save {duration(speed.kept_s)}"
    console.print(text, soft_wrap=True)
