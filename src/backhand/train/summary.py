"""summary.json: what a run came to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backhand.train.job import Job
from backhand.train.memory import peak_rss_bytes
from backhand.train.run_directory import RunDirectory
from backhand.train.run_state import RunState


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. `summary.json` holds these fields; the demo adds its own.

    Attributes:
        output: the run directory.
        adapter: the adapter's directory.
        model: the base model as it was named.
        engine: `backhand` or `transformers`.
        dtype: the compute dtype.
        train_s: seconds spent in training steps.
        steps, skipped_steps: optimizer steps done; those of them skipped for a non-finite loss or gradient.
        tokens, supervised_tokens: trained on.
        tokens_per_s: tokens / train_s.
        peak_rss_bytes, predicted_rss_bytes: highest memory of the process, and what was predicted before the first
            step.
        first_loss, last_loss: mean nats per supervised token of the first and last step.
        base_eval_loss, best_eval_loss, best_step: held-out loss of the base and the lowest; None without held-out rows.
        trained_parameters, adapted_modules: size of the adapter.
        rows, held_out_rows: documents trained on and held out.
        malformed_rows: left out under `skip_bad`.
        stopped_because: why the run ended before its last step, or None.
    """

    output: str
    adapter: str
    model: str
    engine: str
    dtype: str
    train_s: float
    steps: int
    skipped_steps: int
    tokens: int
    supervised_tokens: int
    tokens_per_s: float
    peak_rss_bytes: int
    predicted_rss_bytes: int | None
    first_loss: float | None
    last_loss: float | None
    base_eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    trained_parameters: int
    adapted_modules: int
    rows: int
    held_out_rows: int
    malformed_rows: int
    stopped_because: str | None

    def to_json(self) -> str:
        """The text of summary.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def summarise(job: Job, state: RunState, directory: RunDirectory) -> RunSummary:
    """The summary of a run that is over."""
    progress = state.progress
    return RunSummary(
        output=str(directory.path),
        adapter=str(directory.adapter),
        model=job.config.model.model,
        engine=job.choice.name,
        dtype=job.config.model.dtype,
        train_s=round(progress.train_s, 3),
        steps=progress.step,
        skipped_steps=progress.skipped_steps,
        tokens=progress.tokens,
        supervised_tokens=progress.supervised_tokens,
        tokens_per_s=round(progress.tokens / progress.train_s, 1) if progress.train_s else 0.0,
        peak_rss_bytes=peak_rss_bytes(),
        predicted_rss_bytes=job.memory.peak_bytes,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        base_eval_loss=progress.base_eval_loss,
        best_eval_loss=progress.best_eval_loss,
        best_step=progress.best_step,
        trained_parameters=state.lora.element_count,
        adapted_modules=len(state.lora.slots),
        rows=len(job.train.examples),
        held_out_rows=0 if job.held_out is None else len(job.held_out.examples),
        malformed_rows=job.train.report.skipped_bad,
        stopped_because=progress.stopped_because,
    )


def read_summary(path: Path) -> RunSummary | None:
    """The summary in a file, without what others added to it; None where there is none to read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return RunSummary(**{field.name: values[field.name] for field in dataclasses.fields(RunSummary)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def add_to_summary(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of an existing summary.json with more of them, as the demo adds its exact matches."""
    return {**json.loads(path.read_text(encoding="utf-8")), **values}
