"""What `backhand merge` and `backhand export` can be told. This file imports no torch: the command line reads it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from backhand.bounds import BaseModel, Check, Count, NotNegative, Options, Text
from backhand.errors import UsageError, short_reason
from backhand.nn.model_options import AdapterReading

Format = Literal["peft", "gguf", "mlx", "ollama", "kohya"]
FORMATS: tuple[Format, ...] = get_args(Format)
MergedType = Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FLOATING: tuple[MergedType, ...] = ("float32", "float16", "bfloat16")
FLOAT32_TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 0.1


def _check_repository(where: str, value: object) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(str(value))
        if "/" in str(value):
            return
        why = None
    except HFValidationError as error:
        why = short_reason(error)
    raise UsageError(f"{value!r} is no repository of the hub", where=where, why=why, next_step="give OWNER/NAME")


@dataclass(frozen=True)
class AdaptedModelOptions:
    """A base model, an adapter, and what is written of both."""

    adapter: Path | None = None
    """Adapter to merge or export: the directory that training or PEFT wrote, or a GGUF file."""

    output: Path | None = None
    """Where it goes; it must not exist. A merged model: a directory in Hugging Face's format, or a GGUF file if the
    name ends in .gguf. An export: a directory, or a file for `gguf` and `kohya`."""

    model: BaseModel = "smollm2-135m"
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`; `kohya` reads none."""

    dtype: MergedType = "auto"
    """How a merged model's weights are stored: `float32`, `float16`, `bfloat16`, or, in a GGUF file, `q8_0`, `q5_1`,
    `q5_0`, `q4_1`, `q4_0`. `auto` keeps what the base has; where that is quantized, merged weights are float32, and in
    a GGUF file all others stay as they are."""

    tolerance: NotNegative | None = None
    """How far a merged model's logits may be from those of base and adapter, as a share of what the adapter changes
    in them; beyond that the command fails and leaves nothing. Not given: 0.001 in float32, 0.1 in other types."""

    max_shard_bytes: Count = 5_000_000_000
    """Most bytes of one safetensors file; a larger merged model is written as several."""

    force_base: bool = False
    """Use a base model other than the one the adapter was trained on."""

    quiet: bool = False
    """Print errors only."""

    reading: AdapterReading = field(default_factory=AdapterReading)


@dataclass(frozen=True)
class MergeOptions(AdaptedModelOptions, Options):
    """A merged model."""

    def _check_together(self) -> None:
        given("adapter", self.adapter)
        output = new_output(self.output)
        if self.dtype not in ("auto", *FLOATING) and output.suffix != ".gguf":
            raise UsageError(
                f"dtype {self.dtype} is a type of GGUF files",
                where="dtype",
                next_step=f"give --output {shlex.quote(str(output))}.gguf, or one of {', '.join(FLOATING)}",
            )


@dataclass(frozen=True)
class ExportOptions(AdaptedModelOptions, Options):
    """An adapter, or a model with the adapter merged into it, in another program's format."""

    to: Format | None = None
    """For which program: `peft` (and vLLM), `gguf` (llama.cpp), `ollama`, `mlx`, or `kohya` (diffusion models)."""

    uniform: bool = False
    """With `peft`: one rank and one scaling for all modules, as vLLM needs it: smaller ranks are filled up with zeros,
    alphas of single modules and rank-stabilised scaling go into lora_B."""

    text_model: bool = False
    """With `peft`, where the base is the text model inside an image model: name the modules as in the text model alone,
    for programs that load no other part."""

    merge: bool = False
    """Merge the adapter into the model, and export that."""

    push: Annotated[Text, Check(_check_repository)] | None = None
    """Upload what was written to this repository of the Hugging Face hub, OWNER/NAME, with the token of
    `hf auth login`; a new one is private."""

    def _check_together(self) -> None:
        given("adapter", self.adapter)
        new_output(self.output)
        if self.to is None:
            raise UsageError("no format is given", where="to", next_step=f"give one of {', '.join(FORMATS)}")
        for name in ("uniform", "text_model"):
            if getattr(self, name) and (self.to != "peft" or self.merge):
                raise UsageError(f"{name} is of adapters in PEFT's format", where=name, next_step="give --to peft")
        if not self.merge:
            for name, value, off in (("dtype", self.dtype, "auto"), ("tolerance", self.tolerance, None)):
                if value != off:
                    raise UsageError(f"{name} is of merged models", where=name, next_step="give --merge as well")


def given(name: str, path: Path | None) -> Path:
    """The path. Raises UsageError if there is none."""
    if path is None:
        raise UsageError(f"no {name} is given", where=name, next_step=f"give --{name} PATH")
    return path


def new_output(output: Path | None) -> Path:
    """The output. Raises UsageError if there is none, or if it is there already."""
    output = given("output", output)
    if output.is_symlink() or output.exists():
        raise UsageError(f"{output} exists", where="output", next_step="give another name, or remove it first")
    return output
