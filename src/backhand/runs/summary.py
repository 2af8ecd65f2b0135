"""summary.json: what a run came to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from backhand.reading import read_json


class LabelRow(TypedDict):
    """Scores of one label; `support` is the number of rows that have it."""

    precision: float
    recall: float
    f1: float
    support: int


class LabelFigures(TypedDict):
    """Scores of rows whose answers are labels, as `evaluate --json` has them."""

    accuracy: float
    f1_macro: float
    per_label: dict[str, LabelRow]
    confusion: dict[str, dict[str, int]]
    invented: int


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. `summary.json` holds these fields; the demo adds its own."""

    output: str  # the run directory
    adapter: str  # the adapter's directory
    model: str  # the base model as it was named
    engine: str  # `backhand` or `transformers`
    dtype: str  # the compute dtype
    train_s: float  # seconds spent in training steps
    steps: int  # optimizer steps done
    skipped_steps: int  # those of them skipped for a non-finite loss or gradient
    tokens: int  # trained on
    supervised_tokens: int
    tokens_per_s: float  # tokens / train_s
    # peak_rss_bytes, predicted_rss_bytes: highest memory of the process, and what was predicted before the first step
    peak_rss_bytes: int
    predicted_rss_bytes: int | None
    # first_loss, last_loss: of the first and last step: mean nats per supervised token, or the objective's of a row
    first_loss: float | None
    last_loss: float | None
    # base_eval_loss, best_eval_loss, best_step: held-out loss of the base and the lowest; None without held-out rows
    base_eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    # trained_parameters, adapted_modules: size of the adapter
    trained_parameters: int
    adapted_modules: int
    # rows, held_out_rows: documents trained on and held out
    rows: int
    held_out_rows: int
    malformed_rows: int  # left out under `skip_bad`
    stopped_because: str | None  # why the run ended before its last step, or None
    # why not the decoder engine, what that costs and what would change it; None where it was taken, or transformers was
    # asked for
    engine_note: str | None = None
    base: str = "dense"  # or `quantized`, in its file's own blocks
    world_size: int = 1  # processes that ended the run; each has such a peak of memory
    objective: str = "sft"  # what was minimised, as `--objective` has it
    # base_exact_match, adapted_exact_match: share of so many held-out rows, `exact_match_rows`, that the base model and
    # the adapter answer exactly right; None where answers are long, or nothing was held out
    base_exact_match: float | None = None
    adapted_exact_match: float | None = None
    exact_match_rows: int | None = None
    # base_labels, adapted_labels: of these rows, as `evaluate --json` has them; None where they have no labels
    base_labels: LabelFigures | None = None
    adapted_labels: LabelFigures | None = None
    # of the best evaluation of pairs, `rewards/accuracies` and `rewards/margins`; None elsewhere
    held_out_pairs: dict[str, float] | None = None
    # rise of the loss on neutral texts with the adapter that is kept; None where it was not measured
    forgotten_nats: float | None = None
    # reading, asking: options with which `evaluate` reads rows of the same columns, and `generate` is asked alike
    reading: str = ""
    asking: str = " --prompt '…'"
    system: str | None = None  # the system message that all rows trained on have
    # advice, try_next: what the run's curves say of it, and the command to try next; None where there is nothing
    advice: str | None = None
    try_next: str | None = None

    def to_json(self) -> str:
        """The text of summary.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


FORGOTTEN_NATS = 0.5
"""A token of neutral texts: a rise of the loss that is said in words."""


def forgotten_nats(records: Iterable[Mapping[str, Any]], best_step: int | None) -> float | None:
    """How far the loss on neutral texts had risen, in nats a token, with the adapter that a run keeps.

    Args:
        records: lines of metrics.jsonl.
        best_step: whose adapter is kept; None where it is the newest.
    """
    measured = (one.get("forgetting_nats") for one in records if best_step in (None, one["step"]))
    return next(reversed([nats for nats in measured if nats is not None]), None)


def forgetting(nats: float | None) -> str:
    """A clause about such a rise; nothing where it is small or not known."""
    if nats is None or nats <= FORGOTTEN_NATS:
        return ""
    return f"it forgot: on neutral texts the loss rose by {nats:.2f} nats a token"


def read_summary(path: Path) -> RunSummary | None:
    """The summary in a file, without what others added to it; None where there is none to read."""
    try:
        return read_json(path, RunSummary)
    except (OSError, ValueError):
        return None


def add_to_summary(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of an existing summary.json with more of them, as the demo adds its exact matches."""
    return {**read_json(path, dict[str, Any]), **values}
