"""What the terminal shows of a run: a bar that moves, or plain lines where the output is not a terminal."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from backhand.train.closing import closing_lines, duration
from backhand.train.memory_plan import in_words
from backhand.train.observer import Observer, RunStart
from backhand.train.summary import RunSummary

_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 16
_PLAIN_LINES = 20


class TerminalObserver(Observer):
    """Progress on standard error, the closing summary on standard output; nothing at all when quiet.

    rich takes care of NO_COLOR and of terminals that cannot move the cursor.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._losses: deque[float] = deque(maxlen=_SPARK_WIDTH)
        self._plain_every = 1
        self._total = 0
        self._eval_loss: float | None = None

    def started(self, start: RunStart) -> None:
        """Say what is about to happen, and begin the bar."""
        for fact in start.facts:
            self._console.print(fact)
        self._total = start.total_steps
        self._plain_every = max(1, start.total_steps // _PLAIN_LINES)
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[spark]} {task.fields[facts]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=start.total_steps, completed=start.step, spark="", facts="")
            self._bar.start()

    def stepped(self, record: Mapping[str, Any]) -> None:
        """Move the bar; or print a line now and then."""
        if record["loss"] is not None:
            self._losses.append(record["loss"])
        facts = _facts(record, self._eval_loss)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], spark=sparkline(self._losses), facts=facts)
        elif record["step"] % self._plain_every == 0 or record["step"] in (1, self._total):
            self._console.print(f"step {record['step']}/{self._total}  {facts}{self._left(record)}")

    def _left(self, record: Mapping[str, Any]) -> str:
        """Time for the steps that remain, from the mean of those done; the bar has its own."""
        steps = self._total - record["step"]
        return f"  {duration(record['time_s'] / record['step'] * steps)} left" if steps > 0 else ""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Show the held-out loss."""
        self._eval_loss = record.get("eval_loss", self._eval_loss)
        parts = [f"held-out loss {_number(record['eval_loss'])}"] if "eval_loss" in record else []
        if "forgetting_nats" in record:
            rise, divergence = record["forgetting_nats"], record["forgetting_kl_nats"]
            change = "not finite" if rise is None else f"{rise:+.3f} nats"
            parts.append(f"neutral texts {change}, KL {_number(divergence)}")
        self._console.print(f"step {record['step']}/{self._total}  {'  '.join(parts)}")

    def noted(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text)

    def ended(self, summary: RunSummary) -> None:
        """Stop the bar and print the closing summary."""
        self.closed()
        if not self._quiet:
            print("\n".join(closing_lines(summary)), file=sys.stdout, flush=True)

    def closed(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def sparkline(losses: deque[float]) -> str:
    """The last losses as a line of bars, highest and lowest of them filling the height."""
    if not losses:
        return ""
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    return "".join(_BARS[round((loss - low) / span * (len(_BARS) - 1))] for loss in losses)


def _facts(record: Mapping[str, Any], eval_loss: float | None) -> str:
    parts = [
        f"loss {_number(record['loss'])}",
        f"lr {record['learning_rate']:.1e}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        in_words(record["rss_bytes"]),
    ]
    if eval_loss is not None:
        parts.insert(1, f"held-out {_number(eval_loss)}")
    return "  ".join(parts)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
