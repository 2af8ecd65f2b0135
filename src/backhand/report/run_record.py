"""The files of a run directory, read for the report without loading the model, writing or locking.

A missing file, as in an interrupted run or one of an earlier version, counts as empty. Entries of a wrong type are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from backhand.errors import ArtifactError, UsageError, short_reason
from backhand.files import FileLayer
from backhand.json_shape import fitting, parse
from backhand.objective.registry import recorded_traits
from backhand.objective.spec import Traits
from backhand.options.config_file import parse_toml
from backhand.reading import read_settings
from backhand.runs.directory import (
    ADAPTER,
    ANSWERS,
    CONFIG,
    FACTS,
    METRICS,
    PROOFS,
    SUMMARY,
    TEACHER_ANSWERS,
    RunDirectory,
)
from backhand.runs.records import RowFacts, RunFacts
from backhand.runs.status import RunStatus, read_status, state_of
from backhand.runs.summary import RunSummary, has_fresh_head


class _Model(TypedDict, total=False):
    model: str


class _Data(TypedDict, total=False):
    data: list[str]


class _Objective(TypedDict, total=False):
    objective: str
    answers_from: str


class _Configuration(TypedDict, total=False):
    """The options in config.toml that the report names."""

    model: _Model
    data: _Data
    objective: _Objective


class _Question(TypedDict, total=False):
    instructions: str


class _Decisions(TypedDict, total=False):
    questions: dict[str, _Question]


class _AdapterRecord(TypedDict, total=False):
    """The part of the adapter's backhand.json that the report shows. `adapters.record` would import torch."""

    decisions: _Decisions


@dataclass(frozen=True)
class RunRecord:
    """The contents of one run's files."""

    path: Path
    config: dict[str, Any]
    config_text: str
    # metrics, proofs, answers: lines of the files of these names
    metrics: Sequence[dict[str, Any]]
    proofs: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    facts: RunFacts  # facts.json, {} without such a file
    summary: dict[str, Any]  # summary.json, {} until the run has finished
    status: RunStatus | None  # status.json, None without a readable one

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.path.resolve().name

    @property
    def adapter(self) -> Path:
        """Path of the published adapter, which may not exist yet."""
        return self.path / ADAPTER

    @property
    def questions(self) -> dict[str, str]:
        """Instructions of the questions that the adapter decides, by name; empty for other adapters."""
        record = _parts(self.adapter / "backhand.json", _AdapterRecord)
        questions = record.get("decisions", {}).get("questions", {})
        return {name: one["instructions"] for name, one in questions.items() if one.get("instructions")}

    @property
    def state(self) -> str:
        """The state of the run, see `runs.status.state_of`."""
        return state_of(self.path, self.status)

    @property
    def is_running(self) -> bool:
        """True while the run trains."""
        return self.state == "running"

    @property
    def rows(self) -> RowFacts:
        """The training rows in facts.json."""
        return self.facts.get("data", {}).get("train") or {}

    @property
    def objective(self) -> str:
        """Value of `--objective`."""
        return str(self.config.get("objective", {}).get("objective", "sft"))

    @property
    def traits(self) -> Traits:
        """Facts of the objective under the options of the run."""
        return recorded_traits(self.config.get("objective", {}))

    @property
    def has_teacher_answers(self) -> bool:
        """True if the run trains on answers that a teacher has sampled."""
        return (
            self.config.get("objective", {}).get("answers_from") != "student"
            and (self.path / TEACHER_ANSWERS).is_file()
        )

    @property
    def trains_head(self) -> bool:
        """True if the adapter has a head on hidden states; of rankings known at the end."""
        return self.objective == "classify" or bool(self.summary.get("trains_head"))

    @property
    def fresh_head(self) -> bool:
        """True if the adapter has a head that the model before the run does not have."""
        known = {"trains_head": self.trains_head, "compared_with_start": self.compared_with_start}
        return has_fresh_head(self.summary | known)

    @property
    def compared_with_start(self) -> bool:
        """True if the figures before the run are those of the adapter that it started from."""
        if self.summary:
            return bool(self.summary.get("compared_with_start"))
        return bool(self.config.get("run", {}).get("from_adapter"))  # the run has no end yet

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl about training steps."""
        return [line for line in self.metrics if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl about evaluations."""
        return [line for line in self.metrics if "loss" not in line]

    def held_out_losses(self) -> list[tuple[int, float]]:
        """Return (step, held-out loss) per evaluation with a finite loss, including the one before the first step."""
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
        inside = f", such as {path.parent}" if (path.parent / CONFIG).is_file() else ""
        raise UsageError(
            f"there is no run in {path}", next_step=f"give a directory that `backhand train` made{inside}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            "the configuration cannot be read", where=str(path / CONFIG), why=short_reason(error)
        ) from None
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
    """Return True if a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parts(path: Path, shape: type) -> Any:
    """Return the parts of a JSON file that have the right type, {} without such a file."""
    try:
        return fitting(parse(read_settings(path)), shape)
    except (OSError, ValueError):
        return {}
