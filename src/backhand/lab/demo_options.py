"""What `backhand demo` can be told. This file imports no torch: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backhand.bounds import Count, Options, Seed


@dataclass(frozen=True)
class DemoOptions(Options):
    """The demo: the sine experiment, then SmolLM2 learns to turn sentences into strict JSON."""

    output: Path = Path("runs/demo")
    """Directory for everything the demo leaves: `sine/`, `data/`, the run directory `run/`, pictures."""

    model: str = "smollm2-135m"
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`."""

    seed: Seed = 0
    """Draws the rows, the adapter's first numbers and the order."""

    train_rows: Count = 400
    """Sentences to train on."""

    held_out_rows: Count = 200
    """Sentences to be asked before and after; none of their patterns and values occurs in training."""

    sine: bool = True
    """Begin with the sine experiment."""

    peft: bool = True
    """End by loading the adapter in PEFT and comparing logits; needs PEFT installed."""

    overwrite: bool = False
    """Replace what an earlier demo left in `output`."""
