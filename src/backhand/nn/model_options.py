"""Which base model, and how it is computed: what every command that loads one can be told.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from backhand.errors import UsageError

Engine = Literal["auto", "backhand", "transformers"]
DType = Literal["auto", "float32", "bfloat16"]

# OpenMP crashes the process where the system gives it no more threads, and more than a machine's cores gain nothing.
MOST_THREADS = 1024


@dataclass(frozen=True)
class AdapterReading:
    """Files of adapters."""

    allow_pickle: bool = False
    """Also read an adapter that is a pickle, adapter_model.bin, with torch's restricted unpickler."""


@dataclass(frozen=True)
class _BaseModel:
    """The base model itself."""

    model: str = "smollm2-135m"
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`."""

    engine: Engine = "auto"
    """`backhand` computes without autograd, `transformers` runs any causal language model through its own code; `auto`
    takes the first where it knows the model and says so where it does not."""

    dtype: DType = "auto"
    """Compute dtype of the frozen weights and activations; `auto` is bfloat16 where the processor multiplies it
    natively, else float32. An adapter's values, gradients and moments are float32 in any case."""

    device: str = "auto"
    """Where to compute: `cpu`, `cuda`, `cuda:1`; `auto` is `cuda` where there is one, else `cpu`."""

    threads: int | None = None
    """Threads for matrix products on the processor; not given: the cores this process may use. 1 to
    1,024."""

    tune_allocator: bool = True
    """Keep large freed buffers for later instead of giving them back to the system (glibc mallopt)."""

    force_base: bool = False
    """Use an adapter on a base model other than the one it was trained on."""


@dataclass(frozen=True)
class BaseModelOptions(AdapterReading, _BaseModel):  # in this order the pickle comes last
    """The base model and how it is computed."""

    def check_base_model(self) -> None:
        """Raise UsageError naming field, value and range for the first field that is out of range."""
        if not self.model:
            raise UsageError("no base model is given", where="model", next_step="give a directory, a file or a hub id")
        for name, value, choices in (
            ("engine", self.engine, ("auto", "backhand", "transformers")),
            ("dtype", self.dtype, ("auto", "float32", "bfloat16")),
        ):
            if value not in choices:
                raise UsageError(f"{name} {value!r} is not one of {', '.join(choices)}", where=name)
        if not self.device:
            raise UsageError("device is empty", where="device", next_step="give auto, cpu or cuda")
        threads: object = self.threads
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise UsageError(f"threads {threads!r} is not an integer of at least 1", where="threads")
        if threads is not None and threads > MOST_THREADS:
            raise UsageError(
                f"threads {threads} is above {MOST_THREADS:,}",
                where="threads",
                why="more threads than the machine has cores make nothing faster",
                next_step="leave it out to use the cores that there are",
            )
