"""An objective of another package, which the core does not know: it registers itself through an entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_run import TinyRun

TOY = Path(__file__).parent / "toy"
SCRIPT = """
import contextlib, io, json, sys
from pathlib import Path
import backhand
from backhand.cli.main import main
from backhand.report.headline import headline
from backhand.report.run_record import read_run
from backhand.studio.draft import Draft, pages
from backhand.studio.first_rows import first_rows

place, model, rows = map(Path, sys.argv[1:])
given = dict(model=str(model), data=str(rows), objective="mean", shortest=2, dtype="float32", threads=1, quiet=True)
given |= dict(max_steps=4, save_every=1, batch_rows=4, micro_batch_rows=2, learning_rate=1e-2, seed=3)
given |= dict(eval_fraction=0.25, answers=0)

def bits(name):
    return (place / name / "adapter" / "adapter_model.safetensors").read_bytes().hex()

def printed(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue() + err.getvalue()

def stop(record):
    if record.get("step") == 2 and "loss" in record:
        raise RuntimeError("pulled the plug")

summary = backhand.train(**given, output=place / "whole")
with contextlib.suppress(RuntimeError, backhand.BackhandError):
    backhand.train(**given, output=place / "parts", callbacks=[stop])
backhand.train(**given, output=place / "parts", resume=True)
backhand.train(**given, output=place / "two", workers=2)
options = [f"--model={model}", "--dtype=float32", "--threads=1"]
bad = place / "bad.jsonl"
bad.write_text(rows.read_text() + json.dumps({"prompt": 1, "completion": "a"}) + "\\n")
labelled = place / "labelled.jsonl"
labelled.write_text("".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\\n" for n in range(12)))
classes = dict(model=str(model), data=str(labelled), objective="classify", max_steps=1, eval_fraction=0.0, quiet=True)
backhand.train(**classes, output=place / "classes")
print(json.dumps({
    "losses": [summary.base_eval_loss, summary.best_eval_loss],
    "equal": [bits("whole") == bits(name) for name in ("parts", "two")],
    "record": json.loads((place / "whole/adapter/backhand.json").read_text())["config"]["objective.shortest"],
    "help": printed("train", "--help")[1],
    "lint": printed("lint", *options[:1], f"--data={bad}"),
    "plan": printed("plan", *options, f"--data={rows}", "--objective=mean", "--shortest=2"),
    "unread": printed("train", *options, f"--data={rows}", "--shortest=2", f"--output={place / 'unread'}"),
    "refused": printed("train", *options, f"--data={rows}", "--objective=mean", "--max-steps=1",
                       f"--from-adapter={place / 'classes/adapter'}", f"--output={place / 'refused'}"),
    "headline": headline(read_run(place / "whole")),
    "compared": printed("report", str(place / "whole"), str(place / "two"), f"--output={place / 'both.html'}"),
    "page": [pages()["mean"].title, Draft({"objective": "mean", "prompt": "q", "completion": "a"}).learns],
    "suggested": next(iter(first_rows(str(rows))["suggested"])),
}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a process that has the package says."""
    place = tmp_path_factory.mktemp("toy")
    tiny = TinyRun(place)
    rows = place / "sums.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": str(n + 1)}) + "\n" for n in range(32)))
    paths = os.pathsep.join((str(TOY), *filter(None, [os.environ.get("PYTHONPATH")])))
    script = place / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(place), str(tiny.model), str(rows)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_a_foreign_objective_is_in_the_help_with_its_options(told: dict[str, Any]) -> None:
    assert "--shortest" in told["help"] and "mean" in told["help"]
    code, text = told["unread"]
    assert code == 2 and "sft does not use it" in text and "--objective mean" in text


def test_it_learns_and_ends_in_the_same_bits_after_a_stop_and_on_two_processes(told: dict[str, Any]) -> None:
    before, after = told["losses"]
    assert after < before and told["equal"] == [True, True] and told["record"] == 2


def test_its_rows_are_checked_with_their_line(told: dict[str, Any]) -> None:
    code, text = told["lint"]
    assert code == 3 and "bad.jsonl:33" in text
    assert told["plan"][0] == 0, told["plan"]


def test_its_result_is_said_and_compared(told: dict[str, Any]) -> None:
    assert "the loss on" in told["headline"] and told["compared"][0] == 0


def test_it_is_offered_on_the_page(told: dict[str, Any]) -> None:
    assert told["page"] == ["Means: each answer counts the same, whatever its length", "Means (q, a)"]
    assert told["suggested"] == "sft"


def test_it_refuses_the_adapter_of_another_objective(told: dict[str, Any]) -> None:
    code, text = told["refused"]
    assert code in (2, 4) and "head" in text, text
