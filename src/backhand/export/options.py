"""What `backhand merge` and `backhand export` can be told. This file imports no torch: the command line reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backhand.errors import UsageError
from backhand.nn.model_options import AdapterReading

Format = Literal["peft", "gguf", "mlx", "ollama", "kohya"]
FORMATS: tuple[Format, ...] = ("peft", "gguf", "mlx", "ollama", "kohya")

MergedType = Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FLOATING: tuple[MergedType, ...] = ("float32", "float16", "bfloat16")
MERGED_TYPES: tuple[MergedType, ...] = ("auto", *FLOATING, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

FLOAT32_TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 0.1


@dataclass(frozen=True)
class MergeOptions:
    """A merged model."""

    adapter: Path | None = None
    """Adapter to merge: the directory that training or PEFT wrote, or a GGUF file."""

    output: Path | None = None
    """Where the model goes: a directory in Hugging Face's format, or a GGUF file if the name ends in .gguf. It must not
    exist."""

    model: str = "smollm2-135m"
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`."""

    dtype: MergedType = "auto"
    """How weights are stored: `float32`, `float16`, `bfloat16`, or, in a GGUF file, `q8_0`, `q5_1`, `q5_0`, `q4_1`,
    `q4_0`. `auto` keeps what the base has; where that is quantized, merged weights are float32, and in a GGUF file all
    others stay as they are."""

    tolerance: float | None = None
    """How far the merged model's logits may be from those of base and adapter, as a share of what the adapter changes
    in them; beyond that the command fails and leaves nothing. Not given: 0.001 in float32, 0.1 in other types."""

    max_shard_bytes: int = 5_000_000_000
    """Most bytes of one safetensors file; a larger model is written as several."""

    force_base: bool = False
    """Merge into a base model other than the one the adapter was trained on."""

    quiet: bool = False
    """Print errors only."""

    reading: AdapterReading = field(default_factory=AdapterReading)

    def validate(self) -> MergeOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        given("adapter", self.adapter)
        output = check_common(self.model, self.output)
        check_merging(self.dtype, self.tolerance, self.max_shard_bytes)
        if self.dtype not in ("auto", *FLOATING) and output.suffix != ".gguf":
            raise UsageError(
                f"dtype {self.dtype} is a type of GGUF files",
                where="dtype",
                next_step=f"give --output {output}.gguf, or one of {', '.join(FLOATING)}",
            )
        return self


@dataclass(frozen=True)
class ExportOptions:
    """An adapter, or a model with the adapter merged into it, in another program's format."""

    adapter: Path | None = None
    """Adapter to export: the directory that training or PEFT wrote, or a GGUF file."""

    to: Format | None = None
    """For which program: `peft` (and vLLM), `gguf` (llama.cpp), `ollama`, `mlx`, or `kohya` (diffusion models)."""

    output: Path | None = None
    """Where it goes: a directory, or a file for `gguf` and `kohya`. It must not exist."""

    model: str = "smollm2-135m"
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`. `kohya` reads none."""

    uniform: bool = False
    """With `peft`: one rank and one scaling for all modules, as vLLM needs it: smaller ranks are filled up with zeros,
    alphas of single modules and rank-stabilised scaling go into lora_B."""

    merge: bool = False
    """Merge the adapter into the model, and export that."""

    dtype: MergedType = "auto"
    """With `merge`: how weights are stored, see `backhand merge --help`."""

    tolerance: float | None = None
    """With `merge`: how far the merged model's logits may be from those of base and adapter, as a share of what the
    adapter changes in them. Not given: 0.001 in float32, 0.1 in other types."""

    max_shard_bytes: int = 5_000_000_000
    """With `merge`: most bytes of one safetensors file; a larger model is written as several."""

    force_base: bool = False
    """Export for a base model other than the one the adapter was trained on."""

    quiet: bool = False
    """Print errors only."""

    reading: AdapterReading = field(default_factory=AdapterReading)

    def validate(self) -> ExportOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        given("adapter", self.adapter)
        check_common(self.model, self.output)
        if self.to is None:
            raise UsageError("no format is given", where="to", next_step=f"give one of {', '.join(FORMATS)}")
        if self.to not in FORMATS:
            raise UsageError(f"{self.to!r} is not one of {', '.join(FORMATS)}", where="to")
        check_merging(self.dtype, self.tolerance, self.max_shard_bytes)
        if self.uniform and (self.to != "peft" or self.merge):
            raise UsageError("uniform is of adapters in PEFT's format", where="uniform", next_step="give --to peft")
        if not self.merge:
            for name, value, off in (("dtype", self.dtype, "auto"), ("tolerance", self.tolerance, None)):
                if value != off:
                    raise UsageError(f"{name} is of merged models", where=name, next_step="give --merge as well")
        return self


def given(name: str, path: Path | None) -> Path:
    """The path. Raises UsageError if there is none."""
    if path is None:
        raise UsageError(f"no {name} is given", where=name, next_step=f"give --{name} PATH")
    return path


def check_common(model: str, output: Path | None) -> Path:
    """The output. Raises UsageError for a base without a name, or an output that is there already."""
    output = given("output", output)
    if not model:
        raise UsageError("no base model is given", where="model", next_step="give a directory, a file or a hub id")
    if output.is_symlink() or output.exists():
        raise UsageError(f"{output} exists", where="output", next_step="give another name, or remove it first")
    return output


def check_merging(dtype: str, tolerance: float | None, max_shard_bytes: int) -> None:
    """Raise UsageError naming field, value and range for what merging cannot be told."""
    if dtype not in MERGED_TYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(MERGED_TYPES)}", where="dtype")
    if tolerance is not None and (isinstance(tolerance, bool) or not math.isfinite(tolerance) or tolerance < 0):
        raise UsageError(f"tolerance {tolerance!r} is not a number of at least 0", where="tolerance")
    if isinstance(max_shard_bytes, bool) or max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes {max_shard_bytes!r} is not at least 1", where="max_shard_bytes")
