"""`backhand models`: list the models on this machine with the memory and time of training each of them.

Only headers and configurations are read. Memory and time are those of one step of 4 × 256 tokens, all supervised, with
`train`'s default adapter:

    memory   estimated (`memory.parts`) with the recomputation that fits into the free memory; a quantized file stays
             quantized unless the kernels do not support its types
    time     multiplications · s, plus the recomputation,
             multiplications = vocabulary · d + Σ_blocks out · in of every matrix

s is the time per multiplication in a step of a small model with random weights, whose matrices are as large as those of
a real block. Unpacking of quantized matrices, the shapes of the model and the attention of longer rows are not
included, so the time is accurate within a factor of about 1.5. `backhand plan` measures the model itself.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property

import torch
from rich.table import Table
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.engines.decoder_engine import DecoderEngine, choose_engine
from backhand.engines.memory.parts import estimated_step, parts_of
from backhand.engines.memory.plan import HeldBase, MemoryPlan, choose, choose_base, preferred_bases
from backhand.engines.memory.shapes import StepShape
from backhand.errors import BackhandError, ResourceError
from backhand.kernels.dequantize import type_name
from backhand.loop.process_memory import settled_rss_bytes
from backhand.nn.batch import PackedBatch
from backhand.nn.compute import available_cores, default_dtype, limit_kernel_caches
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import dense_views, empty_weights, expert_fields, module_shapes
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.stores import StoredModel, models_on_this_machine, packaged_models
from backhand.nn.lora_parameters import LoRAParameters
from backhand.options.command_options import ModelsOptions
from backhand.options.config import ModelOptions, Recompute
from backhand.system import available_bytes
from backhand.terminal import console_for_tables, table_of, working
from backhand.training.calibration import fastest
from backhand.words import in_words, name_list

ROWS, ROW_TOKENS = 4, 256
_SMALL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": ROW_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
_MEASURED_S = 1.0


@dataclass
class TokenSeconds:
    """Estimates training times. The machine is measured once, at the first call."""

    dtype: torch.dtype  # the compute dtype

    def of(self, config: DecoderConfig) -> float:
        """Return the seconds of training per token, in a micro-batch of 4 × 256 supervised tokens."""
        return multiplications(config) * self._multiplication_s

    @cached_property
    def _multiplication_s(self) -> float:
        config, tokens = decoder_config(dict(_SMALL)), ROWS * ROW_TOKENS
        weights, generator = empty_weights(config, self.dtype), torch.Generator().manual_seed(0)
        for _, view in dense_views(weights, config):
            view.normal_(std=0.02, generator=generator)
        decoder = Decoder(config, weights)
        lora = LoRAParameters(resolve_adapter(LoRAConfig(), module_shapes(config)).slots)
        lora.initialise(generator)
        decoder.attach(lora)
        lora.refresh_compute(self.dtype)
        ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
        batch = PackedBatch(ids, ids.roll(-1), (ROW_TOKENS,) * ROWS)
        (taken_s,) = fastest([decoder], batch, time.perf_counter() + _MEASURED_S)
        return taken_s / tokens / multiplications(config)


def multiplications(config: DecoderConfig) -> int:
    """Return the number of multiplications per token in all matrices, including the head and the chosen experts."""
    total = config.vocab_size * config.hidden_size
    for layer, block in zip(config.layers, empty_weights(config, torch.float32, "meta").blocks, strict=True):
        for field in fields(block):
            matrix = getattr(block, field.name)
            if isinstance(matrix, Tensor) and matrix.dim() == 2:
                of_experts = layer.experts and field.name in expert_fields(config) and config.mixture is not None
                share = config.mixture.chosen / config.mixture.experts if of_experts and config.mixture else 1
                total += round(matrix.numel() * share)
    return total


_SHOWN_TYPES = 3


@dataclass(frozen=True)
class ListedModel:
    """One model on this machine."""

    name: str  # value for `--model`
    path: str  # path of the file or directory
    store: str  # program whose store contains the model
    family: str | None = None  # architecture in the model's configuration; None if the model cannot be opened
    parameters: int | None = None  # number of elements of all weights
    file_bytes: int | None = None  # bytes of the stored weights
    types: tuple[str, ...] = ()  # types of the stored weights, most frequent first
    engine: str | None = None  # `backhand`, `transformers`, or None if the model cannot be trained
    answers: bool | None = None  # False for an encoder, which predicts no tokens; None if unknown
    note: str | None = None  # why the decoder engine was not chosen, or why the model cannot be opened
    base: HeldBase | None = None  # form of the frozen weights in training; None if not the decoder engine
    memory_bytes: int | None = None  # peak memory of a step of 4 × 256 tokens; None if unknown
    fits: bool | None = None  # True if this memory is free
    seconds_per_1000_tokens: float | None = None  # duration of training; None if unknown


def models(options: ModelsOptions) -> list[ListedModel]:
    """Return every model on this machine. A file that cannot be opened is listed with the reason."""
    limit_kernel_caches()  # as a run does, so that its memory is predicted
    dtype = default_dtype(torch.device("cpu"))
    process, seconds = settled_rss_bytes(dtype), TokenSeconds(dtype)
    packaged = [] if options.places else packaged_models()
    every = [*packaged, *models_on_this_machine(tuple(options.places))]
    return [_listed(stored, dtype, process, seconds) for stored in every]


def _listed(stored: StoredModel, dtype: torch.dtype, process_bytes: int, seconds: TokenSeconds) -> ListedModel:
    one = ListedModel(stored.name, str(stored.path), stored.store)
    try:
        source = open_model(stored.path)
        family, parameters, file_bytes, types = _known(source)
        engine = choose_engine(ModelOptions(model=stored.name), source, dtype)
        one = replace(one, family=family, parameters=parameters, file_bytes=file_bytes, types=types)
        one = replace(one, engine=engine.name, note=engine.note)
        if not isinstance(engine, DecoderEngine):
            return one
        one = replace(one, answers=engine.config.has_head)
        plan, fits = _memory(engine, source, process_bytes)
        taken_s = 1000 * seconds.of(engine.config) * plan.recompute_cost
        return replace(one, base=plan.base, memory_bytes=plan.peak_bytes, fits=fits, seconds_per_1000_tokens=taken_s)
    except BackhandError as error:
        return ListedModel(stored.name, str(stored.path), stored.store, note=error.what)


def _known(source: ModelSource) -> tuple[str, int, int, tuple[str, ...]]:
    """Return family, parameters, bytes, and storage types of the weights."""
    family = str(source.config.get("model_type"))
    parameters = sum(math.prod(source.shape(name)) for name in source.tensor_names())
    if isinstance(source, GGUFModel):
        tensors = [tensor for name in source.tensor_names() for tensor, _ in source.stored_tensors(name)]
        types: Counter[str] = Counter()
        for tensor in tensors:
            types[type_name(tensor.type_id)] += math.prod(tensor.shape)
        kinds = tuple(kind for kind, _ in types.most_common())
        return family, parameters, sum(tensor.byte_count for tensor in tensors), kinds
    files = sorted(source.path.glob("*.safetensors"))
    stored = str(source.config.get("dtype") or source.config.get("torch_dtype") or "")
    kinds = tuple(filter(None, ("MXFP4" if source.quantized else "", stored.upper())))
    return family, parameters, sum(file.stat().st_size for file in files), kinds


def _memory(engine: DecoderEngine, source: ModelSource, process_bytes: int) -> tuple[MemoryPlan, bool]:
    """Return the plan of a step that `train` would choose, and True if its memory is free."""
    layout, tokens, free = engine.layout(LoRAConfig()), ROWS * ROW_TOKENS, available_bytes()
    shapes = {ROWS: StepShape(tokens, tokens, (ROW_TOKENS,) * ROWS, mean_tokens=tokens)}

    def plan(base: HeldBase, limited: bool) -> MemoryPlan:
        size = engine.size(layout, base)

        def parts(shape: StepShape, mode: Recompute) -> dict[str, int]:
            return parts_of(size, shape, estimated_step(size, shape, mode), process_bytes)

        budget = free + process_bytes if limited and free is not None else None
        mode: Recompute = "auto" if limited else "block"
        chosen = choose(size, parts, shapes, budget_bytes=budget, micro_batch_rows=ROWS, recompute=mode)
        return replace(chosen, base=base)

    try:
        return choose_base(preferred_bases("auto", source, torch.device("cpu"), shapes), plan).chosen, True
    except ResourceError:
        return plan("quantized" if source.quantized else "dense", False), False


def models_command(options: ModelsOptions) -> list[ListedModel]:
    """Run `models` and print a table, or one JSON list with `json`."""
    with nullcontext() if options.json else working("looking for models"):
        listed = models(options)
    if options.json:
        sys.stdout.write(json.dumps([asdict(one) for one in listed], indent=2) + "\n")
        return listed
    console = console_for_tables()
    if not listed:
        places = name_list(map(str, options.places)) or "the stores of Ollama, LM Studio, llama.cpp and Hugging Face"
        console.print(f"no models in {places}; `backhand models FOLDER` looks elsewhere", soft_wrap=True)
        return listed
    console.print(_table(listed))
    for one in listed:
        if one.note:
            console.print(f"{one.name}: {one.note}", soft_wrap=True)
    return listed


def _table(listed: Sequence[ListedModel]) -> Table:
    threads = available_cores()
    title = f"memory and time: a step of {ROWS} × {ROW_TOKENS} tokens, {threads} threads"
    figures = ("memory", "s per 1,000 tokens")
    shown = table_of("--model", "family", "size", "types", "engine", *figures, right=figures, title=title)
    for one in listed:
        size = ""
        if one.parameters is not None and one.file_bytes is not None:
            size = f"{_short(one.parameters)}, {in_words(one.file_bytes)}"
        memory = "" if one.memory_bytes is None else in_words(one.memory_bytes) + ("" if one.fits else ", not free")
        seconds = "" if one.seconds_per_1000_tokens is None else f"{one.seconds_per_1000_tokens:.3g}"
        kinds = ", ".join(one.types[:_SHOWN_TYPES]) + (" …" if len(one.types) > _SHOWN_TYPES else "")
        shown.add_row(one.name, one.family or "?", size, kinds, one.engine or "none", memory, seconds)
    return shown


def _short(count: int) -> str:
    """Return a number of parameters in the style of model names: 135M, 1.5B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
