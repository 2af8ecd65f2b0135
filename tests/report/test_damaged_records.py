"""Files of a run with JSON values of the wrong type: the report shows the rest, and `watch` answers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.status import read_status
from backhand.runs.summary import read_summary
from tests.fuzz.read_back import run_file
from tests.support.page import Page

WRONG: dict[str, Any] = {
    "null": None,
    "text": "x",
    "list": [],
    "object": {},
    "float": 1.5,
    "huge": -(10**400),
    "true": True,
}
wrong = pytest.mark.parametrize("value", WRONG.values(), ids=WRONG.keys())


def changed(run: Path, name: str, key: str, value: Any) -> None:
    """Give an entry of a JSON file, or of the last line of a JSON-lines file, another value."""
    *lines, last = (run / name).read_text().splitlines() if name.endswith("l") else [(run / name).read_text()]
    (run / name).write_text("\n".join([*lines, json.dumps({**json.loads(last), key: value}) + "\n"]))


KEYS = {
    "facts.json": ("total_steps", "model", "modules", "memory", "data", "packages", "machine"),
    "status.json": ("state", "step", "process", "began"),
    "summary.json": ("rows", "train_s", "base_eval_loss", "adapted_labels"),
    "metrics.jsonl": ("step", "eval_loss", "loss", "answers"),
    "proofs.jsonl": ("proof", "kind", "value"),
}


@wrong
def test_entries_of_the_wrong_type_leave_the_rest_of_the_page(value: Any, finished: Path) -> None:
    for name, keys in KEYS.items():
        for key in keys:
            changed(finished, name, key, value)
    page = Page(run_page(read_run(finished)))
    assert page.one("section", id="result").text and "loss" in page.charts


def test_any_value_in_any_file_of_a_run(finished: Path) -> None:
    for number in range(25):
        name, data = run_file(random.Random(number), finished)
        whole = (finished / name).read_bytes()
        (finished / name).write_bytes(data)
        if name != "config.toml":
            assert run_page(read_run(finished)), number
        (finished / name).write_bytes(whole)


def test_a_pipe_as_a_file_of_lines_is_an_error_of_ours(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "metrics.jsonl").unlink()
    os.mkfifo(finished / "metrics.jsonl")
    assert main(["report", str(finished)]) == 2
    assert "a pipe, not a plain file" in capsys.readouterr().err


@wrong
def test_status_and_summary_are_read_whole_or_not_at_all(value: Any, finished: Path) -> None:
    changed(finished, "status.json", "step", value)
    changed(finished, "summary.json", "steps", value)
    assert read_status(finished) is None
    assert read_summary(finished / "summary.json") is None
