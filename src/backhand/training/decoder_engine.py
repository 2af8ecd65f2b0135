"""The decoder engine as a way to train: every gradient by hand, no autograd graph at all; and when it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch

from backhand.adapters.checked_base import load_adapter_for, read_adapter
from backhand.adapters.config import LoRAConfig
from backhand.adapters.loading import match_linear_adapter
from backhand.adapters.peft_saving import adapter_files
from backhand.adapters.record import AdapterRecord
from backhand.adapters.saved_modules import tied_notes
from backhand.adapters.targets import resolve_adapter
from backhand.errors import UsageError
from backhand.generate.engine_completer import EngineCompleter
from backhand.kernels.dense_product import is_taken
from backhand.kernels.library import loops_are_there
from backhand.nn.decoder.adapted_group import lowest_trained_group
from backhand.nn.decoder.config_fields import UNREAD, UnsupportedModel
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import EXPERT_GROUPS, GATED_DELTA, DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.lower_layers import LowerLayers
from backhand.nn.decoder.weights import DecoderWeights, dense_views, empty_weights, load_weights, module_shapes
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters, LoRASlot
from backhand.training.config import ModelOptions
from backhand.training.engine import BoundModel, Engine, Trainable, wrapper_notes
from backhand.training.memory.decoder_size import decoder_size
from backhand.training.memory.model import ModelSize
from backhand.training.memory.plan import HeldBase
from backhand.training.memory.states import Below

_FEW, _MORE = 1, 4
_BLOCKS = "model.layers."
_DRAWN = 1 << 20


class DecoderEngine:
    """The decoder engine for one model; see `engine.Engine`.

    Raises:
        UnsupportedModel: for a configuration that the engine does not compute exactly.
    """

    name: Literal["backhand", "transformers"] = "backhand"
    note: str | None = None
    bases: tuple[HeldBase, ...] = ("dense", "quantized")

    def __init__(self, source: ModelSource, dtype: torch.dtype) -> None:
        self.config = decoder_config(source.config)
        self._source = source
        self._dtype = dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What the configuration says without effect."""
        return (*wrapper_notes(self._source), *self.config.notes)

    @property
    def shares_prefixes(self) -> bool:
        """Whether batches may have a shared prefix: not where its angles depend on how long the document is."""
        return not self.config.length_limits

    @property
    def vocab_size(self) -> int:
        """Tokens that documents may hold: ids below this."""
        return self.config.vocab_size

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        return len(self.config.layers)

    def layout(self, config: LoRAConfig) -> AdapterLayout:
        """What the adapter will consist of."""
        return resolve_adapter(config, module_shapes(self.config))

    def below(self, layout: AdapterLayout, longest: int) -> Below:
        """What lies below the lowest adapted layer.

        Compiled loops compute each document by itself, its sums in an order of its own. Torch's forms do not: what is
        attended together, and where a vector's end falls, decides their order. Within a window the order of a sum
        follows the block of queries, whose bounds a shared prefix moves. Behind a shared prefix the delta rule counts
        its chunks anew, and their bounds decide the order of its sums.
        """
        lowest, _ = lowest_trained_group(layout, self.layers)
        layer, dependent = self.config.enterable(min(lowest, self.layers - 1)), None
        windows = [one.window for one in self.config.layers[:layer] if one.window is not None]
        if not loops_are_there():
            dependent = "without the compiled loops a row's last bits depend on the rows beside it"
        elif self.config.attention_cap is not None:
            dependent = "with capped attention scores a row's last bits depend on the rows beside it"
        elif any(one.experts for one in self.config.layers[:layer]):
            dependent = "an expert takes the rows that chose it together, and their last bits depend on one another"
        elif longest > min(windows, default=longest):
            dependent = (
                f"rows are longer than a window of {min(windows)} tokens, and rows beside them share its beginning"
            )
        width = self.config.hidden_size
        chunked = any(one.mixer == GATED_DELTA for one in self.config.layers[:layer])
        whole = "the delta rule's chunks begin where a beginning that rows share ends" if chunked else None
        return Below(layer, width, width * self._dtype.itemsize, dependent, whole)

    def size(self, layout: AdapterLayout, base: HeldBase = "dense") -> ModelSize:
        """What the memory plan needs to know."""
        return decoder_size(
            self.config,
            layout,
            self._dtype.itemsize,
            self._quantized_bytes if base == "quantized" else None,
            unpacked_within=is_taken(self._dtype) and not self._source.unpacked_slowly and not self._reorders_columns,
        )

    @property
    def _reorders_columns(self) -> bool:
        """Whether some matrices may have to be unpacked before a product: the delta rule's outputs in a GGUF file."""
        return any(layer.mixer == GATED_DELTA for layer in self.config.layers)

    @cached_property
    def _quantized_bytes(self) -> int:
        source = self._source
        return sum(source.stored_bytes(name) for name in source.tensor_names() if len(source.shape(name)) == 2)

    def start_notes(
        self,
        directory: str,
        layout: AdapterLayout,  # noqa: ARG002 - the adapter's own modules are held against the model's
        *,
        chat_template: str | None,
        template_args: Mapping[str, Any],
        force_base: bool,
        allow_pickle: bool,
    ) -> tuple[str, ...]:
        """Read the adapter to start from completely, and hold the model against its record."""
        return load_adapter_for(
            self._source,
            directory,
            module_shapes(self.config),
            chat_template=chat_template,
            template_args=template_args,
            force_base=force_base,
            allow_pickle=allow_pickle,
        ).notes

    def load(
        self,
        config: LoRAConfig,
        *,
        base_model: str | None,
        device: torch.device,
        recompute: str = "none",
        base: HeldBase = "dense",
    ) -> BoundModel:
        """Read the weights, and attach an adapter whose values are still zero."""
        slots, trained = self.layout(config)
        decoder = Decoder.from_source(
            self._source, dtype=self._dtype, device=device, recompute=recompute, quantized=base == "quantized"
        )
        lora = LoRAParameters(slots, trained=trained, device=device)
        decoder.attach(lora)
        return _BoundDecoder(decoder, lora, config, self._source, base_model)

    def probes(
        self, config: LoRAConfig, device: torch.device, recompute: str, base: HeldBase = "dense"
    ) -> list[tuple[Trainable, int]]:
        """Decoders of few and of more of the model's blocks.

        Dense ones are filled with small random numbers, so that no weight is read; quantized ones are the file's own.
        """
        more = min(_MORE, self.layers)
        shortened = replace(self.config, layers=self.config.layers[:more])
        if base == "quantized":
            weights = load_weights(self._source, shortened, self._dtype, device, quantized=True)
        else:
            weights = empty_weights(shortened, self._dtype, device)
            _fill(weights, shortened)
        return [
            (self._shortened(config, weights, count, recompute), count) for count in sorted({min(_FEW, more), more})
        ]

    def _shortened(self, config: LoRAConfig, weights: DecoderWeights, layers: int, recompute: str) -> Decoder:
        """The first blocks of the model with these weights, and on them a random adapter as the lowest adapted have."""
        cut = replace(self.config, layers=self.config.layers[:layers])
        decoder = Decoder(cut, replace(weights, blocks=weights.blocks[:layers]), recompute=recompute)
        there, device, slots = decoder.module_shapes(), decoder.device, self._on_first_layers(config, layers)
        lora = LoRAParameters(
            (slot for slot in slots if there.get(slot.name) == (slot.out_features, slot.in_features)),
            device=device,
        )
        lora.initialise(torch.Generator(device=device).manual_seed(0))
        decoder.attach(lora)
        decoder.start_values(lora)
        lora.refresh_compute(self._dtype)
        return decoder

    def _on_first_layers(self, config: LoRAConfig, count: int) -> list[LoRASlot]:
        """The adapter as the lowest adapted layers have it, on as many of the model's first ones.

        Where there are fewer adapted layers, or one has another mixer than the layer that it would stand for, another
        adapted one of this layer's kind takes its place: what is measured stands for all blocks with an adapter.
        """
        layout, kinds = self.layout(config), [(one.mixer, one.sizes, one.experts) for one in self.config.layers]
        lowest, _ = lowest_trained_group(layout, self.layers)
        slots = [slot for slot in layout.slots if not slot.name.startswith(_BLOCKS)]
        in_layer: dict[int, list[LoRASlot]] = {}
        for slot in layout.slots:
            if slot.name.startswith(_BLOCKS):
                in_layer.setdefault(int(slot.name.split(".")[2]), []).append(slot)
        for layer in range(count):
            there = lowest + layer
            if there >= self.layers or kinds[there] != kinds[layer]:
                alike = [other for other in sorted(in_layer) if kinds[other] == kinds[layer]]
                there = alike[layer % len(alike)] if alike else self.layers
            slots += [
                replace(slot, name=f"{_BLOCKS}{layer}.{slot.name.split('.', 3)[3]}") for slot in in_layer.get(there, ())
            ]
        return slots


def _fill(weights: DecoderWeights, config: DecoderConfig) -> None:
    """Small numbers everywhere; with zeros or denormals a processor may be faster or slower than with weights."""
    parts = [tensor for _, tensor in dense_views(weights, config)]
    # Drawn once and repeated: a large vocabulary would take seconds to draw.
    drawn = torch.empty(_DRAWN, dtype=parts[0].dtype, device=parts[0].device).normal_(std=0.02)
    for tensor in parts:
        for piece in tensor.view(-1).split(_DRAWN):
            piece.copy_(drawn[: piece.numel()])


def _expert_notes(decoder: Decoder, lora: LoRAParameters) -> list[str]:
    """A sentence where there are experts, and none of them is adapted."""
    if decoder.config.mixture is None or any(slot.experts for slot in lora.slots.values()):
        return []
    return [
        f"the experts stay as they are; {','.join(part for (part,) in EXPERT_GROUPS)} as target_parameters adapts them"
    ]


class _BoundDecoder(BoundModel):
    def __init__(
        self, decoder: Decoder, lora: LoRAParameters, config: LoRAConfig, source: ModelSource, base_model: str | None
    ) -> None:
        tied = tied_notes(list(lora.trained.values()), decoder.module_shapes().tied)
        super().__init__(decoder, lora, config, [*tied, *_expert_notes(decoder, lora)])
        self._decoder = decoder
        self._source = source
        self._base_model = base_model

    def adapter_files(self, record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        """The adapter as PEFT reads it."""
        return adapter_files(
            self.config,
            self.lora,
            base_model=self._base_model,
            record=record,
            card=card,
            module_names=list(self._decoder.module_shapes()),
            wrapper=self._source.wrapper,
        )

    def completer(self) -> EngineCompleter:
        """The decoder, answering."""
        return EngineCompleter(self._decoder)

    @property
    def lower(self) -> LowerLayers:
        """The decoder's layers below the lowest adapted one."""
        return LowerLayers(self._decoder)

    def _start_beside_factors(self) -> None:
        self._decoder.start_values(self.lora)

    def _fill(self, directory: str, allow_pickle: bool) -> None:
        contents = read_adapter(directory, self._source, allow_pickle=allow_pickle)
        factors = match_linear_adapter(contents, self._decoder.module_shapes()).factors
        for name, view in self.lora.named_tensors():
            view.copy_(factors[name])


def choose_engine(options: ModelOptions, source: ModelSource, dtype: torch.dtype) -> Engine:
    """As asked, or the decoder engine where it computes the model exactly.

    Raises:
        UnsupportedModel: the decoder engine is asked for and does not know the model, or transformers could only guess
            what a GGUF file means.
        UsageError: recomputation is asked for, which the decoder engine alone can do, and it does not know the model.
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
        return _transformers(source, dtype, fallback_note(error))


def fallback_note(error: UnsupportedModel) -> str:
    """Why not the decoder engine, what that costs, and what would change it; one line."""
    problems = "; ".join(error.problems[:_SHOWN_PROBLEMS])
    more = f"; and {len(error.problems) - _SHOWN_PROBLEMS} more" if len(error.problems) > _SHOWN_PROBLEMS else ""
    return (
        f"transformers and autograd compute this {error.model_type} model, not the decoder engine ({problems}{more}). "
        f"{COST}. {error.remedy}."
    )


_SHOWN_PROBLEMS = 3


COST = "That takes 1.3 to 2.2 times the time and up to twice the memory (measured on SmolLM2-135M)"
"""As benchmarks/train_step.py and finetune.py have it: long rows, and short ones that begin alike."""


def _transformers(source: ModelSource, dtype: torch.dtype, note: str | None) -> Engine:
    from backhand.training.transformers_engine import TransformersEngine

    return TransformersEngine(source, dtype, note)
