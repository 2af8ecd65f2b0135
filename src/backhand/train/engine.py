"""Which way a model is computed: the decoder engine where it knows the model exactly, transformers otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from backhand.adapters.adapter_record import AdapterRecord
from backhand.adapters.config import LoRAConfig
from backhand.adapters.peft_files import adapter_files
from backhand.adapters.targets import resolve_slots
from backhand.errors import UsageError
from backhand.nn.config_fields import UnsupportedModel
from backhand.nn.decoder import Decoder
from backhand.nn.decoder_weights import module_shapes
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.train.config import ModelOptions
from backhand.train.interface import Trainable
from backhand.train.memory_plan import ModelSize, decoder_size, transformers_size

AdapterFiles = Callable[[AdapterRecord, Mapping[str, object]], dict[str, bytes]]


@dataclass(frozen=True)
class EngineChoice:
    """The way a model is computed.

    Attributes:
        name: `backhand` or `transformers`.
        decoder: what the decoder engine needs to know; None under transformers.
        note: why not the decoder engine, and what that costs; None where it is taken.
    """

    name: str
    decoder: DecoderConfig | None
    note: str | None = None


def choose_engine(options: ModelOptions, source: ModelSource) -> EngineChoice:
    """As asked, or the decoder engine where it computes the model exactly.

    Raises:
        UnsupportedModel: the decoder engine is asked for, or alone can read the file, and does not know the model.
        UsageError: transformers is asked for with a file that only the decoder engine reads.
    """
    if options.engine == "transformers":
        if isinstance(source, GGUFModel):
            raise UsageError(
                "a GGUF file is read by the backhand engine only",
                where="engine",
                next_step="give a Hugging Face directory or hub id, or --engine backhand",
            )
        return EngineChoice("transformers", None, None)
    try:
        return EngineChoice("backhand", decoder_config(source.config))
    except UnsupportedModel as error:
        if options.engine == "backhand" or isinstance(source, GGUFModel):
            raise
        if options.recompute in ("mlp", "block"):
            raise UsageError(
                f"recompute {options.recompute!r} needs the backhand engine, which does not know this model",
                where="recompute",
                why="; ".join(error.problems),
                next_step="leave out --recompute",
            ) from None
        return EngineChoice(
            "transformers",
            None,
            f"{error.what} ({'; '.join(error.problems[:3])}): "
            "training through transformers and autograd instead, which takes more time and several times the memory",
        )


class BoundModel:
    """A loaded model with its adapter.

    Attributes:
        model: what the loop trains.
        lora: the adapter's buffers, attached.
        config: the adapter's configuration.
    """

    def __init__(self, model: Trainable, lora: LoRAParameters, config: LoRAConfig, files: AdapterFiles) -> None:
        self.model = model
        self.lora = lora
        self.config = config
        self._files = files

    def adapter_files(self, record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        """The adapter as PEFT reads it: files by name."""
        return self._files(record, card)


def planned_slots(choice: EngineChoice, config: LoRAConfig) -> list[LoRASlot] | None:
    """What the adapter will consist of, before any weight is read; None under transformers.

    Raises:
        UsageError: a target matches nothing.
    """
    return None if choice.decoder is None else resolve_slots(config, module_shapes(choice.decoder))


def load_bound_model(
    choice: EngineChoice,
    source: ModelSource,
    config: LoRAConfig,
    *,
    base_model: str | None,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str = "none",
) -> BoundModel:
    """Read the weights, and attach an adapter whose values are still zero.

    Raises:
        UsageError: a target matches nothing, or cannot be adapted.
        ArtifactError: the weights do not fit the configuration, or cannot be read.
    """
    if choice.decoder is not None:
        slots = resolve_slots(config, module_shapes(choice.decoder))
        decoder = Decoder.from_source(source, dtype=dtype, device=device, recompute=recompute)
        lora = LoRAParameters(slots, device=device)
        decoder.attach(lora)
        names = list(decoder.module_shapes())

        def files(record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
            return adapter_files(config, lora, base_model=base_model, record=record, card=card, module_names=names)

        return BoundModel(decoder, lora, config, files)

    from backhand.train.transformers_engine import load_transformers_model

    model = load_transformers_model(source, dtype, device)
    lora = LoRAParameters(model.inject(config), device=device)
    model.attach(lora)
    injected = model.injected
    assert injected is not None

    def injected_files(record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        return injected.files(base_model=base_model, record=record, card=card)

    return BoundModel(model, lora, config, injected_files)


def model_size(choice: EngineChoice, source: ModelSource, slots: list[LoRASlot], dtype: torch.dtype) -> ModelSize:
    """What the memory plan needs to know."""
    if choice.decoder is not None:
        return decoder_size(choice.decoder, slots, dtype.itemsize)
    elements = sum(_elements(source.shape(name)) for name in source.tensor_names())
    return transformers_size(source.config, elements, slots, dtype.itemsize)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
