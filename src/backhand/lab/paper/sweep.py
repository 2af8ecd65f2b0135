"""Compare target modules at a fixed budget, and ranks [arXiv:2106.09685, tables 5 and 6].

Every point of the sweep is a training run in `sweep/`, with the same rows, steps and seed. A finished run is not
repeated, and an interrupted run is continued, so that a sweep can be stopped at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

from backhand.adapters.config import LoRAConfig, parse_modules
from backhand.adapters.targets import resolve_adapter
from backhand.data.demo_task import write_demo_data
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare, prepare_prompts
from backhand.data.sources import neighbouring_held_out
from backhand.errors import ArtifactError, UsageError
from backhand.files import make_directory, write_atomically
from backhand.generation.loading import loaded_model
from backhand.lab.paper.options import PaperOptions
from backhand.loop.evaluate import EvaluationRows, score
from backhand.loop.measuring import HeldOut
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.options.command_options import EvaluateRunOptions
from backhand.options.config import RunOptions, TrainConfig
from backhand.options.config_file import dump_config
from backhand.reading import read_json
from backhand.runs.directory import CONFIG
from backhand.training.run import train

RESULT_FILE = "result.json"
MEASURED = ("base_eval_loss", "eval_loss", "exact_match", "train_s")


@dataclass(frozen=True)
class SweepPoint:
    """One run of the sweep."""

    targets: str  # as given, such as `q_proj,v_proj`
    rank: int
    trained_parameters: int
    ranks: bool = True  # the run belongs to the comparison of ranks
    budget: bool = False  # the run belongs to the comparison at a fixed budget

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        plain = re.fullmatch(r"[\w,.-]+", self.targets) is not None
        names = self.targets.replace(",", "+") if plain else hashlib.sha256(self.targets.encode()).hexdigest()[:12]
        return f"{names}-rank-{self.rank}"


@dataclass(frozen=True)
class SweepRow:
    """Results of a finished run."""

    point: SweepPoint
    base_eval_loss: float | None  # held-out loss of the base
    eval_loss: float  # held-out loss with the adapter
    exact_match: float | None  # share of exactly right replies, None if no row has a reply
    train_s: float


@dataclass(frozen=True)
class SweepResult:
    """Results of all runs."""

    rows: tuple[SweepRow, ...]
    budget: int  # number of trained parameters in the comparison at a fixed budget


def plan_sweep(options: PaperOptions, shapes: Mapping[str, tuple[int, int]]) -> tuple[tuple[SweepPoint, ...], int]:
    """Return the runs, those of the rank comparison first, and the budget in trained parameters.

    Args:
        shapes: (out, in) of every linear module of the model.

    Raises:
        UsageError: if the model does not have a target, or no target set fits into the budget at rank 1.
    """
    sweep = options.sweep
    per_rank = {targets: _per_rank(targets, shapes) for targets in sweep.sweep_targets}
    reference = sweep.sweep_targets[min(1, len(sweep.sweep_targets) - 1)]
    budget = sweep.sweep_budget or per_rank[reference] * max(sweep.sweep_ranks)
    points: dict[tuple[str, int], SweepPoint] = {}
    for targets, rank in product(per_rank, sorted(set(sweep.sweep_ranks))):
        points[targets, rank] = SweepPoint(targets, rank, rank * per_rank[targets])
    for targets, count in per_rank.items():
        rank = budget // count
        if rank:
            known = points.get((targets, rank), SweepPoint(targets, rank, rank * count, ranks=False))
            points[targets, rank] = replace(known, budget=True)
    if not any(point.budget for point in points.values()):
        raise UsageError(
            f"sweep_budget {budget:,} is less than the size of a rank 1 adapter on any target set",
            where="sweep_budget",
            why=", ".join(f"{targets}: {count:,}" for targets, count in per_rank.items()),
        )
    return tuple(points.values()), budget


def _per_rank(targets: str, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the number of trained parameters at rank 1."""
    slots = resolve_adapter(LoRAConfig(rank=1, target_modules=parse_modules((targets,))), shapes).slots
    return sum(slot.in_features + slot.out_features for slot in slots)


def run_sweep(
    options: PaperOptions, source: ModelSource, directory: Path, progress: Callable[[str], None] = lambda _: None
) -> SweepResult:
    """Train and evaluate every point that is not finished.

    Args:
        directory: `sweep/`, the directory of the runs.

    Raises:
        UsageError: if the model does not have a target set, no rows are held out, or a run with other settings exists.
        BackhandError: raised by training and evaluation.
    """
    points, budget = plan_sweep(options, module_shapes(decoder_config(source.config)))
    make_directory(directory)
    data = options.data if options.data.data else _demo_data(options, directory)
    held_out = _held_out(data, source, options.run.seed)
    rows = []
    for number, point in enumerate(points, 1):
        progress(f"sweep {number} of {len(points)}: {point.targets}, rank {point.rank}")
        rows.append(_row(options, data, held_out, point, directory / point.name))
    return SweepResult(tuple(rows), budget)


def _demo_data(options: PaperOptions, directory: Path) -> DataOptions:
    train_file, held_out_file = write_demo_data(directory / "data", seed=options.run.seed)
    return replace(options.data, data=(str(train_file),), eval_data=(str(held_out_file),), eval_fraction=0.0)


def _held_out(data: DataOptions, source: ModelSource, seed: int) -> EvaluationRows:
    """Return the rows that every run holds out, as documents and as prompts."""
    tokenizer = source.tokenizer()
    _, held_out = prepare(data, tokenizer, seed=seed)
    if held_out is None:
        raise UsageError(
            "a sweep compares held-out losses, and no rows are held out",
            where="eval_fraction",
            next_step="give --eval-data, or --eval-fraction 0.1",
        )
    names = data.eval_data or (() if data.eval_fraction else neighbouring_held_out(data.data)) or data.data
    chosen = {example.source for example in held_out.examples}
    prompts, _ = prepare_prompts(replace(data, data=names), data, tokenizer)
    with_reply = tuple(prompt for prompt in prompts if prompt.reply is not None and prompt.source in chosen)
    return EvaluationRows(HeldOut(held_out.examples, EvaluateRunOptions().micro_batch_rows), len(chosen), with_reply)


def _row(
    options: PaperOptions, data: DataOptions, held_out: EvaluationRows, point: SweepPoint, directory: Path
) -> SweepRow:
    adapter = LoRAConfig(
        rank=point.rank, alpha=options.sweep.sweep_alpha, target_modules=parse_modules((point.targets,))
    )
    run = RunOptions(seed=options.run.seed, quiet=True)
    config = TrainConfig(options.model, options.data, adapter, options.optimization, run)
    settings = dump_config(config) + f"\nmax_new_tokens = {options.sweep.max_new_tokens}\n"
    done = _read_result(directory / RESULT_FILE, settings)
    if done is None:
        output = directory / "run"
        started = (output / CONFIG).exists()
        run = replace(run, output=output, resume=started, overwrite=output.exists() and not started)
        done = _train_and_evaluate(options, replace(config, data=data, run=run), held_out)
        text = json.dumps({"settings": settings, "point": asdict(point), **done}, indent=2) + "\n"
        write_atomically(directory / RESULT_FILE, text.encode())
    return SweepRow(point, **done)


def _train_and_evaluate(options: PaperOptions, config: TrainConfig, held_out: EvaluationRows) -> dict[str, Any]:
    summary, data = train(config), config.data
    with loaded_model(options.model, summary.adapter, template=data) as loaded:
        scores = score(loaded, held_out, EvaluateRunOptions(max_new_tokens=options.sweep.max_new_tokens), adapter=True)
    return {
        "base_eval_loss": summary.base_eval_loss,
        "eval_loss": scores.loss,
        "exact_match": scores.exact_match,
        "train_s": summary.train_s,
    }


class _Result(TypedDict):
    """The contents of result.json, but for the point."""

    settings: str
    base_eval_loss: float | None
    eval_loss: float
    exact_match: float | None
    train_s: float


def _read_result(path: Path, settings: str) -> dict[str, Any] | None:
    """Return the results of a finished point, or None if there are none.

    Raises:
        UsageError: if the run was trained with other settings.
        ArtifactError: if the file is damaged.
    """
    try:
        stored: Mapping[str, Any] = read_json(path, _Result)
        if stored["settings"] == settings:
            return {name: stored[name] for name in MEASURED}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        next_step = "remove its directory, so that the run is repeated"
        raise ArtifactError("the result file is damaged", where=str(path), next_step=next_step) from None
    raise UsageError(
        "a run of this sweep was trained with other settings",
        where=str(path.parent),
        next_step="give another --output, or remove this directory",
    )
