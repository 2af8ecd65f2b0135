"""Options of `backhand demo`. This file imports no torch, because the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backhand.bounds import Count, Options, Seed


@dataclass(frozen=True)
class DemoOptions(Options):
    """The demo: the sine experiment, then SmolLM2 learns to turn sentences into strict JSON."""

    output: Path = Path("runs/demo")
    """Directory for all files of the demo: `sine/`, `data/`, the run directory `run/`, pictures."""

    model: str = "smollm2-135m"
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`."""

    seed: Seed = 0
    """Seed of the rows, the adapter's initial values and the order."""

    train_rows: Count = 400
    """Sentences to train on."""

    held_out_rows: Count = 200
    """Held-out sentences for the comparison. None of their patterns and values occurs in training."""

    sine: bool = True
    """Start with the sine experiment."""

    peft: bool = True
    """Load the adapter in PEFT at the end and compare logits. Requires PEFT."""

    overwrite: bool = False
    """Replace the files of an earlier demo in `output`."""
