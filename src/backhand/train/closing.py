"""The last lines of a run: what was trained, how much it improved, where the adapter is, what to type next."""

from __future__ import annotations

import math
import shlex

from backhand.train.memory_plan import in_words
from backhand.train.summary import RunSummary


def closing_lines(summary: RunSummary) -> list[str]:
    """The closing summary, a line a fact."""
    what = (
        f"Trained {summary.trained_parameters:,} parameters in {summary.adapted_modules} modules of {summary.model} "
        f"on {summary.rows:,} rows: {summary.steps:,} steps, {summary.tokens:,} tokens "
        f"({summary.supervised_tokens:,} supervised) in {duration(summary.train_s)}, "
        f"{summary.tokens_per_s:,.0f} tokens/s ({summary.dtype}, {summary.engine} engine)."
    )
    lines = [what, _improvement(summary), _memory(summary)]
    if summary.skipped_steps:
        lines.append(f"{summary.skipped_steps} steps were skipped: their loss or gradient was not finite.")
    if summary.malformed_rows:
        lines.append(f"{summary.malformed_rows:,} malformed rows were left out.")
    if summary.stopped_because:
        lines.append(f"Stopped early: {summary.stopped_because}.")
    model, adapter = shlex.quote(summary.model), shlex.quote(summary.adapter)
    return [
        *lines,
        f"Adapter: {summary.adapter}",
        f"Next: backhand generate --model {model} --adapter {adapter} --compare --prompt '…'",
        f"      backhand evaluate --model {model} --adapter {adapter} --data FILE",
    ]


def _improvement(summary: RunSummary) -> str:
    base, best = summary.base_eval_loss, summary.best_eval_loss
    if base is None or best is None:
        if summary.first_loss is None or summary.last_loss is None:
            return "No step could be taken."
        return (
            f"Training loss from {summary.first_loss:.4f} to {summary.last_loss:.4f}; nothing was held out "
            "(--eval-fraction 0.05 would tell what it is worth on other rows)."
        )
    change = "better" if best < base else "not better"
    return (
        f"Held-out loss {base:.4f} → {best:.4f} nats per token (perplexity {_exp(base)} → {_exp(best)}, {change}) "
        f"on {summary.held_out_rows:,} rows, best after step {summary.best_step}."
    )


def _memory(summary: RunSummary) -> str:
    text = f"Peak memory {in_words(summary.peak_rss_bytes)}"
    if summary.predicted_rss_bytes:
        text += f", {in_words(summary.predicted_rss_bytes)} predicted"
    return text + "."


def _exp(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):,.2f}"


def duration(seconds: float) -> str:
    """A time for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
