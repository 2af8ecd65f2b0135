"""A search on SmolLM2 that is killed, then continued by two processes at once: no trial is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
TRIALS = 12


@pytest.mark.smollm2
@pytest.mark.slow
def test_twelve_trials_survive_a_kill_and_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "search"
    search = [sys.executable, "-m", "backhand", "search"]
    rows = ["--data", RECIPES / "tickets.jsonl", "--eval-data", RECIPES / "tickets_held_out.jsonl", "--quiet"]
    options = ["--model", "smollm2-135m", "--max-steps", "8", "--batch-rows", "2", "--max-rows", "16", "--answers", "0"]
    begin = [*search, *rows, *options, "--trials", str(TRIALS), "--output", output]
    with subprocess.Popen([*map(str, begin)], stdout=subprocess.DEVNULL) as first:
        while not (output / "trials" / "004").exists():
            assert first.poll() is None, "it ended before it could be killed"
            time.sleep(0.2)
        first.kill()
    started = {path.name for path in (output / "trials").iterdir() if path.is_dir()}
    assert 4 < len(started) < TRIALS
    again = [*search, "--resume", "--output", str(output), "--quiet"]
    both = [subprocess.Popen(again, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1]
    found = json.loads((output / "search.json").read_text())["all"]
    assert [trial["number"] for trial in found] == list(range(TRIALS)) and all(trial["losses"] for trial in found)
    assert started <= {path.name for path in (output / "trials").iterdir()}
    assert (output / "adapter" / "adapter_model.safetensors").exists()
