"""Options of `backhand report`. This module does not import torch, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backhand.bounds import Options
from backhand.errors import UsageError


@dataclass(frozen=True)
class ReportOptions(Options):
    """Options of `backhand report`."""

    runs: tuple[Path, ...] = ()
    """Run directories. One run gives its report, several runs a page that compares them."""

    output: Path | None = None
    """HTML file to write or replace. Default: `report.html` in the run directory, or `comparison.html` in the current
    directory if several runs are compared."""

    def _check_together(self) -> None:
        if not self.runs:
            raise UsageError("no run is given", where="runs", next_step="give a run directory, such as runs/mine")
        resolved = [run.resolve() for run in self.runs]
        if len(set(resolved)) < len(resolved):
            raise UsageError("the same run is given twice", where="runs")
        if self.output is not None and self.output.is_dir():
            raise UsageError(f"{self.output} is a directory", where="output", next_step="name a file in it")
