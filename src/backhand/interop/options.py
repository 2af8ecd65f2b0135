"""Options of `backhand merge` and `backhand export`. Imports no torch: the command line reads it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from backhand.bounds import BaseModel, Check, Count, NotNegative, Options, Text
from backhand.errors import UsageError, short_reason
from backhand.nn.model_options import AdapterReading

Format = Literal["peft", "gguf", "mlx", "ollama", "kohya", "sentence-transformers"]
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
    """Options for a base model, an adapter, and the output."""

    adapter: Path | None = None
    """Adapter to merge or export: the directory that training or PEFT wrote, or a GGUF file."""

    output: Path | None = None
    """Output path, which must not exist. A merged model is a directory in Hugging Face's format, or a GGUF file if the
    name ends in .gguf. An export is a directory, or a file for `gguf` and `kohya`."""

    model: BaseModel | None = None
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`. Not given: the model that the
    adapter was trained on, if it is on this machine. Not used for `kohya`."""

    dtype: MergedType = "auto"
    """Storage type of a merged model's weights: `float32`, `float16`, `bfloat16`, or, in a GGUF file, `q8_0`, `q5_1`,
    `q5_0`, `q4_1`, `q4_0`. `auto` keeps the base's types. If these are quantized, merged weights are float32, and in a
    GGUF file all other weights keep their bytes."""

    tolerance: NotNegative | None = None
    """Largest difference between a merged model's logits and those of base and adapter, as a share of the adapter's
    effect on them; above it the command fails and leaves nothing. Default: 0.001 in float32, 0.1 in other types."""

    max_shard_bytes: Count = 5_000_000_000
    """Largest safetensors file, in bytes; a larger merged model is split into several files."""

    force_base: bool = False
    """Use a base model other than the one the adapter was trained on."""

    quiet: bool = False
    """Print errors only."""

    reading: AdapterReading = field(default_factory=AdapterReading)


@dataclass(frozen=True)
class MergeOptions(AdaptedModelOptions, Options):
    """Options of `merge`."""

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
    """Options of `export`."""

    to: Format | None = None
    """Target format: `peft` (also for vLLM), `gguf` (llama.cpp), `ollama`, `mlx`, `kohya` (diffusion models), or
    `sentence-transformers` (a model for vectors or for rankings, merged or as an adapter of its base)."""

    uniform: bool = False
    """With `peft`: one rank and one scaling for all modules, as vLLM requires. Smaller ranks are padded with zeros, and
    alphas of single modules and rank-stabilised scaling are folded into lora_B."""

    text_model: bool = False
    """With `peft`, if the base is the text model inside an image model: name the modules as in the text model alone,
    for programs that load only this part."""

    merge: bool = False
    """Merge the adapter into the model, and export the merged model."""

    decision: bool = False
    """With `gguf`: merge an adapter that was trained with the objective `decide`, and write a decision model that
    llama.cpp serves at `/v1/systemone`, with the prompt and the temperatures of training."""

    push: Annotated[Text, Check(_check_repository)] | None = None
    """Upload the output to this repository of the Hugging Face hub, OWNER/NAME, with the token of `hf auth login`.
    A new repository is private."""

    @property
    def merged(self) -> bool:
        """True if the output is a merged model."""
        return self.merge or self.decision

    def _check_together(self) -> None:
        given("adapter", self.adapter)
        new_output(self.output)
        if self.to is None:
            raise UsageError("no format is given", where="to", next_step=f"give one of {', '.join(FORMATS)}")
        for name in ("uniform", "text_model"):
            if getattr(self, name) and (self.to != "peft" or self.merge):
                raise UsageError(f"{name} applies to adapters in PEFT's format", where=name, next_step="give --to peft")
        if self.decision and self.to != "gguf":
            raise UsageError("a decision model is a GGUF file", where="decision", next_step="give --to gguf")
        if self.merge and self.to == "kohya":
            what = "kohya's format supports adapters only"
            raise UsageError(what, where="merge", next_step="leave out --merge")
        if not self.merged:
            for name, value, off in (("dtype", self.dtype, "auto"), ("tolerance", self.tolerance, None)):
                if value != off:
                    raise UsageError(f"{name} applies to merged models", where=name, next_step="give --merge as well")


def given(name: str, path: Path | None) -> Path:
    """Return the path. Raises UsageError if it is None."""
    if path is None:
        raise UsageError(f"no {name} is given", where=name, next_step=f"give --{name} PATH")
    return path


def new_output(output: Path | None) -> Path:
    """Return the output path. Raises UsageError if it is None, or if it exists."""
    output = given("output", output)
    if output.is_symlink() or output.exists():
        raise UsageError(f"{output} exists", where="output", next_step="give another name, or remove it first")
    return output
