"""Runs that train a head on hidden states together with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backhand.adapters.loading import match_linear_adapter
from backhand.data.packing import RowPacker
from backhand.data.rows import ProblemType
from backhand.engines.decoder_engine import DecoderEngine
from backhand.errors import UsageError
from backhand.loop.objectives.head import HeadObjective, HeldOutHead
from backhand.nn.loading.source import ModelSource
from backhand.training.hooks import KnownRows, Losses, RunContext

_WITHOUT_CLASS = ("bamba", "falcon_h1", "gemma4_text", "granite", "granitemoehybrid", "lfm2", "nemotron_h")
"""Model types for which transformers has no class for sequence classification."""


@dataclass(frozen=True)
class StartingHead:
    """The head of the adapter that a run starts from."""

    origin: str  # the adapter
    outputs: int
    problem: ProblemType | None = None  # None for an adapter that PEFT wrote
    labels: tuple[str, ...] = ()  # in the order of the outputs; empty for an adapter that PEFT wrote


def starting_head(rows: KnownRows) -> StartingHead | None:
    """Return the head of the adapter that a run starts from, or None without one. Raises UsageError if it has none."""
    start, engine = rows.start, rows.engine
    if start is None or not isinstance(engine, DecoderEngine):
        return None
    record = start.contents.record
    known = {} if record is None else record.classification
    loaded = match_linear_adapter(start.contents, engine.module_shapes())
    outputs = engine.config.class_head.labels_of({one.name: one.shape for one in loaded.trained})
    if not outputs:
        raise UsageError(
            f"{start.origin} has no classification head",
            where="from_adapter",
            why="training continues with the adapter's own modules and values",
            next_step=f"give one of --objective {rows.config.objective.objective} with a head, or leave it out for a "
            "fresh adapter",
        )
    return StartingHead(start.origin, outputs, known.get("problem_type"), tuple(known.get("labels", ())))


def class_notes(source: ModelSource) -> tuple[str, ...]:
    """Return a note if transformers cannot load the adapter."""
    kind = source.config.get("model_type")
    if kind not in _WITHOUT_CLASS:
        return ()
    return (f"transformers has no class for sequence classification of {kind} models; Backhand alone reads the head",)


def head_losses(run: RunContext, made: Callable[[RowPacker], HeadObjective]) -> Losses:
    """Return the losses of objectives of a head, which `made` makes of the packer of a set of rows."""
    train, packer = made(run.inputs.packer), run.inputs.held_out_packer
    if packer is None:
        return Losses(train)
    return Losses(train, HeldOutHead(made(packer), run.micro_batch_rows, run.caches.held_out))


def head_scores(run: RunContext, losses: Losses) -> dict[str, Any]:
    """Return fields of summary.json on the held-out rows."""
    assert isinstance(losses.held_out, HeldOutHead)
    return losses.held_out.objective.held_out_scores(run.bound, run.micro_batch_rows, run.start.values)
