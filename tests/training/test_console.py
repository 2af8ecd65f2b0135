"""What the terminal shows: plain lines in a pipe, a bar with a sparkline on a terminal, nothing when quiet."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from backhand.loop.forecast import Forecast
from backhand.loop.observers import RunStart
from backhand.training.console import TerminalObserver, sparkline
from backhand.training.run import train
from tests.support.tiny_run import TinyRun

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def record(step: int) -> dict[str, Any]:
    times = {"tokens_per_s": 900.0, "time_s": 40.0 * step}
    return {"step": step, "loss": 2.0 / step, "learning_rate": 1e-4, "rss_bytes": 3 << 29, **times}


def shown(capsys: pytest.CaptureFixture[str], *, quiet: bool = False) -> str:
    """What six steps and an evaluation print on standard error."""
    observer = TerminalObserver(quiet=quiet)
    forecast = Forecast([40.0] * 6, {}, 0.0)
    observer.started(RunStart(6, 0, ("model: tiny",), Path("run"), forecast=forecast))
    observer.evaluated({"step": 0, "eval_loss": 2.5})
    for step in range(1, 7):
        observer.stepped(record(step))
    observer.closed()
    return capsys.readouterr().err


def test_in_a_pipe_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys).splitlines()
    assert lines[0] == "model: tiny" and "\x1b" not in "".join(lines)
    assert lines[-3].endswith("900 tokens/s  1.5 GiB  eval 2.5000 @ step 0  1 min 20 s left")
    assert lines[-1] == "step 6/6  loss 0.3333  lr 1.0e-04  900 tokens/s  1.5 GiB  eval 2.5000 @ step 0  0 s left"
    assert len([line for line in lines if line.startswith("step")]) == 7


@pytest.mark.parametrize(("gap", "words"), [(0.3, "sampler off by 0.3 nats (rounding explains up to 2)"), (0.1, "")])
def test_the_gap_of_the_sampler_is_shown_only_near_its_bound(
    gap: float, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    observer = TerminalObserver(quiet=False)
    observer.started(RunStart(1, 0, (), Path("run"), {"model.dtype": "bfloat16"}))
    rewarded = {"reward": 0.5, "clipped_answers": 0.0, "no_gradient_groups": 0.0, "completion_tokens": 9.0}
    observer.stepped(record(1) | rewarded | {"sampling_gap": gap})
    observer.closed()
    shown = capsys.readouterr().err
    assert words in shown and ("sampler" in shown) == bool(words)


def test_on_a_terminal_there_is_a_bar_with_a_sparkline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(capsys)
    assert (
        "6/6" in text
        and "█" in text
        and "loss 0.3333" in text
        and "the last evaluation" in text
        and _COLOUR.search(text)
    )
    monkeypatch.setenv("NO_COLOR", "1")
    colours = {code for code in _COLOUR.findall(shown(capsys)) if re.search(r"\[(3|4|9|10)\d", code)}
    assert colours == set()


def test_one_step_is_not_called_steps(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny.config(tmp_path / "run", max_steps=1, batch_rows=1, quiet=False))
    captured = capsys.readouterr()
    assert "plan: 1 step of 1 row, " in captured.err and " rows: 1 step, " in captured.out


def test_the_card_names_base_data_and_licence(tiny: TinyRun, tmp_path: Path) -> None:
    uploaded = tmp_path / "rows-1.csv"
    uploaded.write_text("question,answer\na?,a\nb?,b\n")
    uploaded.with_name("rows-1.csv.name").write_text("my rows.csv")
    named = {"data": (str(uploaded),), "eval_data": (), "prompt": "{question}", "completion": "answer"}
    train(tiny.config(tmp_path / "run", **named, max_steps=1))
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| text | {question} |" in card and "| answers | answer |" in card and "| data | my rows.csv |" in card
    assert re.search(r"\| base as trained \| .*, dense, computed in float32 \|", card)
    assert "| licence | not said" in card and "license: unknown" in card


def test_quiet_prints_nothing(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, quiet=True) == ""
    train(tiny.config(tmp_path / "run", max_steps=1))
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_the_sparkline_fills_its_height() -> None:
    assert sparkline(deque([3.0, 2.0, 1.0])) == "█▅▁" and sparkline(deque()) == "" and sparkline(deque([1.0])) == "▁"
