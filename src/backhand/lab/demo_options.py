"""What `backhand demo` can be told. This file imports no torch: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backhand.errors import UsageError


@dataclass(frozen=True)
class DemoOptions:
    """The demo: the sine experiment, then SmolLM2 learns to turn sentences into strict JSON."""

    output: Path = Path("runs/demo")
    """Directory for everything the demo leaves: `sine/`, `data/`, the run directory `run/`, pictures."""

    model: str = "smollm2-135m"
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`."""

    seed: int = 0
    """Draws the rows, the adapter's first numbers and the order. 0 or above."""

    train_rows: int = 400
    """Sentences to train on. At least 1."""

    held_out_rows: int = 200
    """Sentences to be asked before and after; none of their patterns and values occurs in training. At least 1."""

    sine: bool = True
    """Begin with the sine experiment."""

    peft: bool = True
    """End by loading the adapter in PEFT and comparing logits; needs PEFT installed."""

    overwrite: bool = False
    """Replace what an earlier demo left in `output`."""

    def validate(self) -> DemoOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        for name, lowest in (("seed", 0), ("train_rows", 1), ("held_out_rows", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise UsageError(f"{name} {value!r} is not an integer of at least {lowest}", where=name)
        return self
