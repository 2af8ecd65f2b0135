"""The decoder engine for training: hand-written gradients without an autograd graph, and the choice of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from backhand.adapters.classifier_config import classifier_config_bytes
from backhand.adapters.config import LoRAConfig
from backhand.adapters.loading import match_linear_adapter, read_adapter
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_saving import CLASS_TASK, CLASSIFIERS, HEADLESS_TASK, AdapterParts, adapter_files
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import resolve_adapter
from backhand.adapters.trained_tensors import tied_notes
from backhand.engines.engine import BoundModel, Engine, RunCache, ShortModel
from backhand.engines.memory.hidden_states import FrozenLayers
from backhand.engines.memory.parts import ModelSize, decoder_size
from backhand.engines.memory.plan import HeldBase
from backhand.engines.short_decoder import short_decoder
from backhand.errors import UsageError
from backhand.generation.completer import EngineCompleter
from backhand.kernels.builds import kernels_available
from backhand.nn.decoder.adapted_group import backward_end
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.frozen_prefix import FrozenPrefix
from backhand.nn.decoder.weights import DecoderWeights, load_weights, module_shapes
from backhand.nn.families.config_fields import UNREAD, UnsupportedModel
from backhand.nn.families.family import ATTENTION_AND_SSM, EXPERT_GROUPS, GATED_DELTA, SSM, DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.wrappers import EncoderWrapper
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.options.config import ModelOptions


class DecoderEngine(Engine):
    """The decoder engine for one model.

    Args:
        source: the model's files.
        dtype: the compute dtype.
        labels: number of outputs of a classification head, which is trained with the adapter; 0 for no head.

    Raises:
        UnsupportedModel: the engine does not compute models of this configuration exactly.
    """

    name = "backhand"
    bases = ("dense", "quantized")

    def __init__(self, source: ModelSource, dtype: torch.dtype, labels: int = 0) -> None:
        super().__init__(source, dtype)
        self.labels = labels
        self.config = config = decoder_config(source.config)
        self.notes = (*self.notes, *config.notes)
        self.layers = len(config.layers)
        self.shares_prefixes = config.shares_prefixes

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def layout(self, config: LoRAConfig) -> AdapterLayout:
        return resolve_adapter(self._with_head(config), module_shapes(self.config, self.labels))

    def _with_head(self, config: LoRAConfig) -> LoRAConfig:
        """Return the configuration of an adapter with the classification head, if there are labels."""
        if not self.labels:
            return config
        others = [name for name in config.modules_to_save if name not in CLASSIFIERS]
        return replace(config, modules_to_save=(*others, *self.config.class_head.modules))

    def module_shapes(self) -> Mapping[str, tuple[int, int]]:
        return module_shapes(self.config)

    def frozen_layers(self, layout: AdapterLayout, longest: int) -> FrozenLayers:
        """Describe the layers below the lowest adapted one, and why their hidden states may depend on the batch.

        The compiled kernels compute each document separately, and its sums in a fixed order. There are exceptions, in
        which the order of a sum depends on the batch:

        - Torch's own operations choose the order by the rows that are computed together and by the end of a vector.
        - With a sliding window, the order depends on the block of queries. A shared prefix shifts the blocks.
        - The delta rule and Mamba-2 count their chunks from the end of a shared prefix.
        """
        lowest = backward_end(layout, self.config).layer
        layer, batch_dependent = self.config.start_layer(min(lowest, self.layers - 1)), None
        windows = [one.window for one in self.config.layers[:layer] if one.window is not None]
        if not kernels_available():
            batch_dependent = "without the compiled kernels a row's last bits depend on the other rows of its batch"
        elif not self.config.causal:
            batch_dependent = (
                "with attention in both directions a row's last bits depend on the other rows of its batch"
            )
        elif self.config.attention_cap is not None:
            batch_dependent = "with capped attention scores a row's last bits depend on the other rows of its batch"
        elif any(one.experts for one in self.config.layers[:layer]):
            batch_dependent = "an expert computes all its rows together, and their last bits depend on one another"
        elif any(one.mixer in (GATED_DELTA, SSM, ATTENTION_AND_SSM) for one in self.config.layers[:layer]):
            batch_dependent = "the chunks of a layer with a state begin where a prefix that rows share ends"
        elif longest > min(windows, default=longest):
            batch_dependent = (
                f"rows are longer than a window of {min(windows)} tokens, and other rows of a batch share their prefix"
            )
        width = self.config.hidden_size
        return FrozenLayers(layer, width, width * self._dtype.itemsize, batch_dependent)

    def size(self, layout: AdapterLayout, base: HeldBase = "dense") -> ModelSize:
        source, quantized = self._source, None
        if base == "quantized":
            names = (name for name in source.tensor_names() if len(source.shape(name)) == 2)
            quantized = sum(map(source.stored_bytes, names))
        return decoder_size(self.config, layout, self._dtype, quantized)

    def load(
        self,
        config: LoRAConfig,
        device: torch.device,
        recompute: str,
        base: HeldBase,
        run_cache: RunCache,
        *,
        examine: Callable[[Sequence[str]], None] | None = None,
    ) -> BoundModel:
        slots, trained = self.layout(config)

        def read() -> DecoderWeights:
            quantized = base == "quantized"
            return load_weights(self._source, self.config, self._dtype, device, quantized=quantized, examine=examine)

        key = (self._source.path, self._dtype, device, base)
        weights = run_cache.get_or_create("weights", key, read, only_newest=True)
        decoder = Decoder(self.config, weights, recompute=recompute)
        lora = LoRAParameters(slots, full_tensors=trained, device=device)
        decoder.attach(lora)
        return _BoundDecoder(decoder, lora, self._with_head(config), self._source)

    def short(self, config: LoRAConfig, device: torch.device, recompute: str, base: HeldBase) -> ShortModel:
        """Return a model of a few blocks. Dense blocks are random and need no file; quantized ones are the file's."""

        def load(first: DecoderConfig) -> DecoderWeights:
            return load_weights(self._source, first, self._dtype, device, quantized=True)

        layout = self.layout(config)
        return short_decoder(self.config, layout, self._dtype, device, recompute, load if base == "quantized" else None)


class _BoundDecoder(BoundModel):
    def __init__(self, decoder: Decoder, lora: LoRAParameters, config: LoRAConfig, source: ModelSource) -> None:
        notes = [*tied_notes(list(lora.full_tensors.values()), decoder.module_shapes().tied)]
        if decoder.config.mixture is not None and not any(slot.experts for slot in lora.slots.values()):
            parts = ",".join(part for (part,) in EXPERT_GROUPS)
            adapting = "" if decoder.config.mixture.with_mlp else f"; {parts} as target_parameters adapts them"
            notes.append(f"the experts stay as they are{adapting}")
        super().__init__(decoder, lora, config, source, notes)
        self._decoder = decoder

    def adapter_files(self, record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        decoder = self._decoder
        task_type = "CAUSAL_LM" if decoder.config.has_head else HEADLESS_TASK
        shapes, wrapper = decoder.module_shapes(), self.source.wrapper
        head, classification = decoder.config.class_head, record.classification
        if classification:
            task_type = CLASS_TASK
            wrapper = EncoderWrapper("", head.prefix) if head.prefix else wrapper
        parts = AdapterParts.of(PEFTConfig(self.config, self.base_name, task_type), self.lora)
        names = [*shapes, *shapes.outside]
        config = classifier_config_bytes(self.source, classification) if classification else None
        return adapter_files(
            parts, record=record, card=card, module_names=names, wrapper=wrapper, classifier_config=config
        )

    def completer(self) -> EngineCompleter:
        return EngineCompleter(self._decoder)

    @property
    def frozen_prefix(self) -> FrozenPrefix:
        return FrozenPrefix(self._decoder)

    def _start_other_values(self, generator: torch.Generator) -> None:
        self._decoder.start_values(self.lora, generator)

    def _fill(self, directory: str, allow_pickle: bool) -> None:
        contents = read_adapter(directory, self.source, allow_pickle=allow_pickle)
        factors = match_linear_adapter(contents, self._decoder.module_shapes()).factors
        for name, view in self.lora.named_tensors():
            view.copy_(factors[name])


def with_hidden_states(engine: Engine, need: str) -> DecoderEngine:
    """Return the engine if it gives the hidden states of a model. Raises UsageError with the objective's `need`."""
    if not isinstance(engine, DecoderEngine):
        raise UsageError(
            f"{need}, which the transformers engine does not give",
            where="objective",
            why=engine.note,
            next_step="choose a model that the backhand engine supports (backhand models)",
        )
    return engine


def choose_engine(options: ModelOptions, source: ModelSource, dtype: torch.dtype) -> Engine:
    """Return the requested engine, or by default the decoder engine if it computes the model exactly.

    Raises:
        UnsupportedModel: the decoder engine is requested but does not support the model, or transformers would have to
            guess the meaning of a GGUF file.
        UsageError: an option requires the decoder engine, which does not support the model.
    """
    if options.engine == "transformers":
        return _transformers(source, dtype, None)
    try:
        return DecoderEngine(source, dtype)
    except UnsupportedModel as error:
        if options.engine == "backhand" or UNREAD in source.config:
            raise
        for option, value, needs in (
            ("recompute", options.recompute, options.recompute in ("mlp", "block")),
            ("cache_frozen", options.cache_frozen, options.cache_frozen in ("memory", "disk")),
            ("base", options.base, options.base == "quantized"),
            ("quantize", options.quantize, options.quantize is not None),
        ):
            if needs:
                raise UsageError(
                    f"{option} {value!r} needs the backhand engine, which does not know this model",
                    where=option,
                    why="; ".join(error.problems),
                    next_step=f"leave out --{option.replace('_', '-')}",
                ) from None
        problems = "; ".join(error.problems[:_SHOWN_PROBLEMS])
        if (more := len(error.problems) - _SHOWN_PROBLEMS) > 0:
            problems += f"; and {more} more"
        what = f"transformers and autograd compute this {error.model_type} model, not the decoder engine"
        return _transformers(source, dtype, f"{what} ({problems}). {COST}. {error.remedy}.")


_SHOWN_PROBLEMS = 3


COST = "That takes 1.3 to 2.2 times the time and up to twice the memory (measured on SmolLM2-135M)"
"""Measured by benchmarks/train_step.py (long rows) and finetune.py (short rows with a common prefix)."""


def _transformers(source: ModelSource, dtype: torch.dtype, note: str | None) -> Engine:
    from backhand.engines.transformers_engine import TransformersEngine

    return TransformersEngine(source, dtype, note)
