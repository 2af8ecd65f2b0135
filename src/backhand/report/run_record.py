"""What a run left in its directory, read for the report: nothing is loaded, nothing is written, no lock is taken.

Files that are missing, as an interrupted run or one of an older version leaves them, are empty here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from backhand.errors import ArtifactError, UsageError
from backhand.files import FileLayer
from backhand.json_shape import fitting, parse
from backhand.options.config_file import parse_toml
from backhand.reading import read_settings
from backhand.runs.directory import ADAPTER, ANSWERS, CONFIG, FACTS, METRICS, PROOFS, SUMMARY, RunDirectory
from backhand.runs.records import RowFacts, RunFacts
from backhand.runs.status import RunStatus, read_status
from backhand.runs.summary import RunSummary


class _Model(TypedDict, total=False):
    model: str


class _Data(TypedDict, total=False):
    data: list[str]


class _Objective(TypedDict, total=False):
    objective: str


class _Configuration(TypedDict, total=False):
    """The options in config.toml that the report names."""

    model: _Model
    data: _Data
    objective: _Objective


@dataclass(frozen=True)
class RunRecord:
    """One run as its files tell it."""

    path: Path
    config: dict[str, Any]
    config_text: str
    # metrics, proofs, answers: lines of the files of these names
    metrics: Sequence[dict[str, Any]]
    proofs: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    facts: RunFacts  # facts.json, empty where there is none
    summary: dict[str, Any]  # summary.json, empty until the run is over
    status: RunStatus | None  # status.json, None where there is none

    @property
    def adapter(self) -> Path:
        """The published adapter, or where it will be."""
        return self.path / ADAPTER

    @property
    def rows(self) -> RowFacts:
        """The training rows in facts.json."""
        return self.facts.get("data", {}).get("train") or {}

    @property
    def objective(self) -> str:
        """What was minimised, as `--objective` has it."""
        return str(self.config.get("objective", {}).get("objective", "sft"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl about training steps."""
        return [line for line in self.metrics if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl about evaluations."""
        return [line for line in self.metrics if "loss" not in line]

    def held_out_losses(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of each evaluation with a finite one, the one before the first step included."""
        return [(line["step"], line["eval_loss"]) for line in self.evaluations if is_number(line.get("eval_loss"))]


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UsageError: there is no run.
        ArtifactError: its config.toml cannot be read.
    """
    try:
        text = read_settings(path / CONFIG)
        config = fitting(fitting(parse_toml(text), dict[str, dict[str, Any]]), _Configuration)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"there is no run in {path}", next_step="give a directory that `backhand train` made"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError("the configuration cannot be read", where=str(path / CONFIG), why=str(error)) from None
    lines = RunDirectory(path, FileLayer()).lines
    return RunRecord(
        path=path,
        config=config,
        config_text=text,
        metrics=lines(METRICS),
        proofs=lines(PROOFS),
        answers=lines(ANSWERS),
        facts=_parts(path / FACTS, RunFacts),
        summary=_parts(path / SUMMARY, RunSummary),
        status=read_status(path),
    )


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parts(path: Path, shape: type) -> Any:
    """Return the parts of a JSON file that have the right type, {} without such a file."""
    try:
        return fitting(parse(read_settings(path)), shape)
    except (OSError, ValueError):
        return {}
