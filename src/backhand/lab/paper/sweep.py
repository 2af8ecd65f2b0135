"""Which weights to adapt at a fixed budget, and how small a rank suffices [arXiv:2106.09685, tables 5 and 6].

Every point of the sweep is a training run of its own in `sweep/`, with the same rows, steps and seed. A run that is
there and finished is not repeated, one that was cut off is continued: a sweep can be stopped at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from backhand.adapters.config import LoRAConfig, parse_modules
from backhand.adapters.targets import resolve_adapter
from backhand.data.demo_task import write_demo_data
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare, prepare_prompts
from backhand.data.sources import held_out_beside
from backhand.errors import ArtifactError, UsageError
from backhand.files import make_directory, write_atomically
from backhand.generate.loading import loaded_model
from backhand.lab.paper.options import PaperOptions
from backhand.loop.evaluate import EvaluationRows, score
from backhand.loop.measuring import HeldOut
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.loading.source import ModelSource
from backhand.options.command_options import EvaluateRunOptions
from backhand.options.config import RunOptions, TrainConfig
from backhand.options.config_file import dump_config
from backhand.reading import read_settings
from backhand.runs.directory import CONFIG
from backhand.training.run import train

RESULT_FILE = "result.json"
MEASURED = ("base_eval_loss", "eval_loss", "exact_match", "train_s")


@dataclass(frozen=True)
class SweepPoint:
    """One run to do."""

    targets: str  # as given, such as `q_proj,v_proj`
    rank: int
    trained_parameters: int  # what that makes on this model
    ranks: bool = True  # whether it belongs to the comparison of ranks
    budget: bool = False  # whether it belongs to the comparison at a fixed budget

    @property
    def name(self) -> str:
        """Its directory's name."""
        plain = re.fullmatch(r"[\w,.-]+", self.targets) is not None
        names = self.targets.replace(",", "+") if plain else hashlib.sha256(self.targets.encode()).hexdigest()[:12]
        return f"{names}-rank-{self.rank}"


@dataclass(frozen=True)
class SweepRow:
    """A run that is done: held-out loss of the base and of the adapter, and exact match where rows have a reply."""

    point: SweepPoint
    base_eval_loss: float | None
    eval_loss: float
    exact_match: float | None
    train_s: float


@dataclass(frozen=True)
class SweepResult:
    """All rows, and the budget of the comparison at a fixed one."""

    rows: tuple[SweepRow, ...]
    budget: int


def plan_sweep(options: PaperOptions, shapes: Mapping[str, tuple[int, int]]) -> tuple[tuple[SweepPoint, ...], int]:
    """The runs, ranks first, and the budget in trained numbers.

    Args:
        shapes: (out, in) of every linear module of the model.

    Raises:
        UsageError: a target that the model does not have, or a budget that no rank of any target set keeps to.
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
            f"sweep_budget {budget:,} is less than rank 1 takes on any target set",
            where="sweep_budget",
            why=", ".join(f"{targets}: {count:,}" for targets, count in per_rank.items()),
        )
    return tuple(points.values()), budget


def _per_rank(targets: str, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Trained numbers of an adapter of rank 1."""
    slots = resolve_adapter(LoRAConfig(rank=1, target_modules=parse_modules((targets,))), shapes).slots
    return sum(slot.in_features + slot.out_features for slot in slots)


def run_sweep(
    options: PaperOptions, source: ModelSource, directory: Path, progress: Callable[[str], None] = lambda _: None
) -> SweepResult:
    """Train and evaluate every point that is not done yet.

    Args:
        directory: `sweep/`, where the runs are.

    Raises:
        UsageError: a target set that the model does not have, no held-out rows, or a run of other settings in the way.
        BackhandError: whatever training and evaluation raise.
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
    """The rows that every run holds out, as documents and as prompts."""
    tokenizer = source.tokenizer()
    _, held_out = prepare(data, tokenizer, seed=seed)
    if held_out is None:
        raise UsageError(
            "a sweep compares held-out losses, and no rows are held out",
            where="eval_fraction",
            next_step="give --eval-data, or --eval-fraction 0.1",
        )
    names = data.eval_data or (() if data.eval_fraction else held_out_beside(data.data)) or data.data
    chosen = {example.source for example in held_out.examples}
    prompts, _ = prepare_prompts(replace(data, data=names), data, tokenizer)
    asked = tuple(prompt for prompt in prompts if prompt.reply is not None and prompt.source in chosen)
    return EvaluationRows(HeldOut(held_out.examples, EvaluateRunOptions().micro_batch_rows), len(chosen), asked)


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
        begun = (output / CONFIG).exists()
        run = replace(run, output=output, resume=begun, overwrite=output.exists() and not begun)
        done = _train_and_evaluate(options, replace(config, data=data, run=run), held_out)
        text = json.dumps({"settings": settings, "point": asdict(point), **done}, indent=2) + "\n"
        write_atomically(directory / RESULT_FILE, text.encode())
    return SweepRow(point, **done)


def _train_and_evaluate(options: PaperOptions, config: TrainConfig, held_out: EvaluationRows) -> dict[str, Any]:
    summary, data = train(config), config.data
    with loaded_model(options.model, summary.adapter, template=data) as loaded:
        found = score(loaded, held_out, EvaluateRunOptions(max_new_tokens=options.sweep.max_new_tokens), adapter=True)
    return {
        "base_eval_loss": summary.base_eval_loss,
        "eval_loss": found.loss,
        "exact_match": found.exact_match,
        "train_s": summary.train_s,
    }


def _read_result(path: Path, settings: str) -> dict[str, Any] | None:
    """What a finished point came to; None where there is none.

    Raises:
        UsageError: it was trained with other settings.
        ArtifactError: the file is damaged.
    """
    try:
        found = json.loads(read_settings(path))
        done = {name: found[name] for name in MEASURED}
        if found["settings"] == settings:
            return done
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        next_step = "remove its directory; the run is done again"
        raise ArtifactError("is damaged", where=str(path), next_step=next_step) from None
    raise UsageError(
        "a run of this sweep was trained with other settings",
        where=str(path.parent),
        next_step="give another --output, or remove this directory",
    )
