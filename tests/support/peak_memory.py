"""A training run in a process of its own, and the peak of its memory as it was predicted and as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

WITHIN = 0.15


def peak_of(model: str | Path, rows: Path, options: str, output: Path) -> tuple[int, int]:
    """Predicted and measured peak in bytes of a run on one thread.

    Args:
        model, rows, output: of the run.
        options: what else is typed.
    """
    command = [sys.executable, "-m", "backhand", "train", "--model", model, "--data", rows, "--output", output]
    done = subprocess.run(
        [*map(str, command), "--threads", "1", "--quiet", *options.split()],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "summary.json").read_text())
    return summary["predicted_rss_bytes"], summary["peak_rss_bytes"]
