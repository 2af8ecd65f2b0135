"""Options for the base model and its computation, shared by all commands that load one.

This file does not import torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal

from backhand.bounds import BaseModel, Bound, Options, given
from backhand.errors import UsageError

Engine = Literal["auto", "backhand", "transformers"]
DType = Literal["auto", "float32", "bfloat16"]
Base = Literal["auto", "dense", "quantized"]
Quantize = Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
# OpenMP crashes the process if the system has no more threads, and more threads than cores are no faster.
MOST_THREADS = 1024
Threads = Annotated[
    int,
    Bound(
        at_least=1,
        at_most=MOST_THREADS,
        why="more threads than the machine has cores make nothing faster",
        next_step="leave it out to use the cores that there are",
    ),
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Return True if a name has the form `owner/model` or `model`, and is not that of a file."""
    is_file = ".." in name or name.endswith((".gguf", ".safetensors", ".json"))
    return _HUB_ID.fullmatch(name) is not None and not is_file


@dataclass(frozen=True)
class AdapterReading:
    """Files of adapters."""

    allow_pickle: bool = False
    """Also read an adapter that is a pickle, adapter_model.bin, with torch's restricted unpickler."""


@dataclass(frozen=True)
class _BaseModel:
    """The base model itself."""

    model: BaseModel | None = None
    """Base model: a Hugging Face directory, a GGUF file, a hub id, or `smollm2-135m`. Not given: the model that the
    adapter was trained on, if it is on this machine, and without an adapter `smollm2-135m`."""

    engine: Engine = "auto"
    """`backhand` computes without autograd, `transformers` runs any causal language model through its own code; `auto`
    takes the first where it knows the model and says so where it does not."""

    dtype: DType = "auto"
    """Compute dtype of the frozen weights and activations; `auto` is bfloat16 where the processor multiplies it
    natively, else float32. An adapter's values, gradients and moments are float32 in any case."""

    base: Base = "auto"
    """How the frozen weights are held: `dense` in the compute dtype, `quantized` in their file's own blocks, which stay
    mapped and are unpacked piece by piece, to the same bits; `auto` takes the second for a quantized file where that
    costs less than 10 % of the time, or where dense weights do not fit."""

    quantize: Quantize | None = None
    """Quantize a Hugging Face directory's matrices on reading, to this type; the base is then another one, and the
    change of its loss is printed."""

    device: Annotated[str, given("device is empty", "give auto, cpu or cuda")] = "auto"
    """Where to compute: `cpu`, `cuda`, `cuda:1`; `auto` is `cuda` where there is one, else `cpu`."""

    threads: Threads | None = None
    """Threads for matrix products on the processor; not given: the cores this process may use."""

    tune_allocator: bool = True
    """Keep large freed buffers for later instead of giving them back to the system, and hold all in large pages
    (glibc's mallopt, madvise)."""

    force_base: bool = False
    """Use an adapter on a base model other than the one it was trained on."""


@dataclass(frozen=True)
class BaseModelOptions(AdapterReading, _BaseModel, Options):  # in this order the pickle comes last
    """The base model and how it is computed."""

    def _check_together(self) -> None:
        check_base(self)


def check_base(options: _BaseModel) -> None:
    """Raise UsageError for options about the base's form that contradict each other."""
    if options.quantize is not None and options.base == "dense":
        raise UsageError(
            "quantize and a dense base contradict each other",
            where="quantize",
            why="a quantized matrix is kept in its blocks",
            next_step="leave out one of --quantize and --base",
        )
    quantized = options.base == "quantized" or options.quantize is not None
    if quantized and options.engine == "transformers":
        raise UsageError(
            "a quantized base works with the backhand engine only",
            where="base",
            next_step="leave out --base quantized and --quantize, or use --engine backhand",
        )


def pretrained_arguments(base: str, quoted: Callable[[str], str] = repr) -> str:
    """Return the arguments of transformers' `from_pretrained`: a name, or the directory and name of a GGUF file."""
    path = PurePath(base)
    if not re.fullmatch(r".+\.(?i:gguf)|sha256-\w+", path.name):  # the second form is used in Ollama's store
        return quoted(base)
    return f"{quoted(str(path.parent))}, gguf_file={quoted(path.name)}"


def peft_code(auto_class: str | None, base: str | None, adapter: str, quoted: Callable[[str], str] = repr) -> str:
    """Return Python code that loads an adapter with PEFT.

    Args:
        auto_class: transformers' class of the base. Sequence classification takes its labels from the adapter.
        base: id or path of the base; without it, or without a class, the code has no line for it.
        adapter: directory of the adapter.
        quoted: writes a text as Python code.
    """
    lines = ["from peft import PeftModel"]
    arguments, of_model = "" if base is None else pretrained_arguments(base, quoted), quoted(adapter)
    if auto_class is None or base is None:
        lines.append("")
    elif auto_class == "AutoModelForSequenceClassification":
        lines += [f"from transformers import AutoConfig, {auto_class}", "", f"adapter = {of_model}"]
        lines.append("config = AutoConfig.from_pretrained(adapter)  # with the names of the labels")
        arguments, of_model = f"{arguments}, config=config", "adapter"
    else:
        lines += [f"from transformers import {auto_class}", ""]
    if auto_class is not None and base is not None:
        lines.append(f"base = {auto_class}.from_pretrained({arguments})")
    return "\n".join((*lines, f"model = PeftModel.from_pretrained(base, {of_model})"))
