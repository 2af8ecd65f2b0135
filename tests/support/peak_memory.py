"""A training run in a process of its own, and the peak of its memory as it was predicted and as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WITHIN = 0.15


def peak_of(model: str | Path, rows: Path, options: str, output: Path) -> tuple[int, int]:
    """Predicted and measured peak in bytes of a run on one thread.

    Args:
        model, rows, output: of the run.
        options: what else is typed.
    """
    _backhand("train", model, rows, f"--output {output} --quiet {options}")
    summary = json.loads((output / "summary.json").read_text())
    return summary["predicted_rss_bytes"], summary["peak_rss_bytes"]


def planned(model: str | Path, rows: Path, options: str) -> dict[str, Any]:
    """What `backhand plan` says of such a run, without its speed."""
    plan: dict[str, Any] = json.loads(_backhand("plan", model, rows, f"--no-calibrate --json {options}"))
    return plan


def _backhand(command: str, model: str | Path, rows: Path, options: str) -> str:
    words = [sys.executable, "-m", "backhand", command, "--model", str(model), "--data", str(rows), "--threads", "1"]
    done = subprocess.run(
        [*words, *options.split()],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
