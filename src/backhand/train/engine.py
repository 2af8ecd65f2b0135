"""Which way a model is computed: the decoder engine where it knows the model exactly, transformers otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from backhand.adapters.adapter_record import AdapterRecord
from backhand.adapters.checked_base import read_adapter
from backhand.adapters.config import LoRAConfig
from backhand.adapters.peft_loading import match_linear_adapter
from backhand.adapters.peft_saving import adapter_files
from backhand.adapters.saved_modules import tied_notes
from backhand.adapters.targets import resolve_adapter
from backhand.errors import UsageError
from backhand.nn.config_fields import UnsupportedModel
from backhand.nn.decoder import Decoder
from backhand.nn.decoder_weights import module_shapes
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.train.config import ModelOptions
from backhand.train.interface import Trainable
from backhand.train.memory_model import ModelSize, decoder_size, transformers_size

AdapterFiles = Callable[[AdapterRecord, Mapping[str, object]], dict[str, bytes]]


@dataclass(frozen=True)
class EngineChoice:
    """The way a model is computed.

    Attributes:
        name: `backhand` or `transformers`.
        decoder: what the decoder engine needs to know; None under transformers.
        note: why not the decoder engine, and what that costs; None where it is taken.
    """

    name: Literal["backhand", "transformers"]
    decoder: DecoderConfig | None
    note: str | None = None


def choose_engine(options: ModelOptions, source: ModelSource) -> EngineChoice:
    """As asked, or the decoder engine where it computes the model exactly.

    Raises:
        UnsupportedModel: the decoder engine is asked for and does not know the model.
        UsageError: recomputation is asked for, which the decoder engine alone can do, and it does not know the model.
    """
    if options.engine == "transformers":
        return EngineChoice("transformers", None)
    try:
        return EngineChoice("backhand", decoder_config(source.config))
    except UnsupportedModel as error:
        if options.engine == "backhand":
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
        notes: what may interest a person, such as weights that training unties.
    """

    def __init__(
        self,
        model: Trainable,
        lora: LoRAParameters,
        config: LoRAConfig,
        files: AdapterFiles,
        fill: Callable[[str, bool], None],
        start_beside: Callable[[], None],
        notes: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.lora = lora
        self.config = config
        self._files = files
        self._fill = fill
        self._start_beside = start_beside
        self.notes = tuple(notes)

    def adapter_files(self, record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        """The adapter as PEFT reads it: files by name."""
        return self._files(record, card)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh factors; whatever else is trained starts from the base model, which nothing changes yet."""
        self.lora.initialise(generator)
        self._start_beside()
        self.lora.refresh_compute(self.model.dtype)

    def fill(self, directory: str, allow_pickle: bool = False) -> None:
        """Copy the values of an adapter of the same modules and ranks.

        Args:
            directory: of the adapter, or a GGUF file.
            allow_pickle: whether it may be a pickle.

        Raises:
            UnusableAdapterError: an ArtifactError that lists every problem.
        """
        self._fill(directory, allow_pickle)
        self.lora.refresh_compute(self.model.dtype)


def planned_layout(choice: EngineChoice, config: LoRAConfig) -> AdapterLayout | None:
    """What the adapter will consist of, before any weight is read; None under transformers.

    Raises:
        UsageError: a target matches nothing, or what is trained does not go together.
    """
    return None if choice.decoder is None else resolve_adapter(config, module_shapes(choice.decoder))


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
        slots, trained = resolve_adapter(config, module_shapes(choice.decoder))
        decoder = Decoder.from_source(source, dtype=dtype, device=device, recompute=recompute)
        lora = LoRAParameters(slots, trained=trained, device=device)
        decoder.attach(lora)
        names = list(decoder.module_shapes())

        def files(record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
            return adapter_files(config, lora, base_model=base_model, record=record, card=card, module_names=names)

        def fill(directory: str, allow_pickle: bool) -> None:
            contents = read_adapter(directory, source, allow_pickle=allow_pickle)
            factors = match_linear_adapter(contents, decoder.module_shapes()).factors
            for name, view in lora.named_tensors():
                view.copy_(factors[name])

        notes = tied_notes(trained, decoder.module_shapes().tied)
        return BoundModel(decoder, lora, config, files, fill, lambda: decoder.start_values(lora), notes)

    from backhand.nn.loading.transformers_model import load_transformers_model
    from backhand.train.transformers_engine import TransformersModel

    model = TransformersModel(load_transformers_model(source, dtype=dtype, device=device))
    slots, trained = model.inject(config)
    lora = LoRAParameters(slots, trained=trained, device=device)
    model.attach(lora)
    injected = model.injected
    assert injected is not None

    def injected_files(record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        return injected.files(base_model=base_model, record=record, card=card)

    def fill_injected(directory: str, allow_pickle: bool) -> None:
        injected.load_contents(read_adapter(directory, source, allow_pickle=allow_pickle))

    return BoundModel(model, lora, config, injected_files, fill_injected, injected.reset_beside, injected.notes)


def model_size(choice: EngineChoice, source: ModelSource, layout: AdapterLayout, dtype: torch.dtype) -> ModelSize:
    """What the memory plan needs to know."""
    if choice.decoder is not None:
        return decoder_size(choice.decoder, layout, dtype.itemsize)
    elements = sum(_elements(source.shape(name)) for name in source.tensor_names())
    return transformers_size(source.config, elements, layout, dtype.itemsize)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
