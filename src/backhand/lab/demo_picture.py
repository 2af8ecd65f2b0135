"""The picture of a run's losses, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path


def save_loss_picture(metrics: Path, picture: Path) -> None:
    """Training loss of every step and held-out loss of every evaluation, over steps; readable in black and white.

    Args:
        metrics: the run's metrics.jsonl.
        picture: the PNG file to write.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="0.6", linewidth=1, label="training rows, each step")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "ko--", linewidth=1.5, markersize=5, label="held-out rows")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", yscale="log")
    axes.set_title("What the model learned: loss over the run")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
