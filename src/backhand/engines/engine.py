"""The interfaces of the two engines: the decoder engine, and transformers with autograd.

    Engine      before the weights are read: adaptable modules, memory sizes, limitations
    BoundModel  the loaded model with an adapter: initialization, adapter files, completions
    Trainable   the training loop's view: takes a batch, returns the loss, adds gradients

`decoder_engine.choose_engine` chooses the engine. No other code of training depends on the choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.record import AdapterRecord
from backhand.engines.memory.hidden_states import FrozenLayers
from backhand.engines.memory.parts import ModelSize
from backhand.engines.memory.plan import HeldBase
from backhand.errors import not_none
from backhand.generation.completer import Completer, LanguageModel
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.decoder.frozen_prefix import FrozenPrefix
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.ops.weight_tiles import FrozenMatrix


class Trainable(LanguageModel, Protocol):
    """A frozen base model with at most one adapter."""

    @property
    def lora(self) -> LoRAParameters | None:
        """The attached adapter, or None."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""

    def attach(self, lora: LoRAParameters) -> None:
        """Use and train this adapter. Raises ValueError for a slot that does not fit the model."""

    def detach(self) -> None:
        """Compute the base model without an adapter."""

    def frozen_tensors(self) -> Iterator[tuple[str, FrozenMatrix]]:
        """Yield (name, tensor) of every tensor that must not change."""

    def loss_and_gradients(
        self,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None = None,
        token_loss: TokenLoss | None = None,
    ) -> Tensor:
        """Add ∂(loss_scaling · loss)/∂(lora_A, lora_B) to `lora.gradients` and return the loss, 0-d float64.

        Args:
            batch: the micro-batch.
            loss_scaling: factor of the gradients.
            dropout_seed: seed of the dropout masks; None for no dropout.
            token_loss: maps the log-probabilities of the supervised tokens to the loss and its gradient; None for
                cross-entropy, the sum of nats.
        """

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return the logits of every position of a document, (tokens, vocab), without dropout."""


class MoreBlocks(NamedTuple):
    """The short model with one more block of one kind."""

    model: Trainable  # the short model with that block
    blocks: int  # number of trained blocks of this kind in the whole model
    missing: int  # number of these blocks that the short model lacks


class ShortModel(NamedTuple):
    """A model of a few blocks. It is measured, and the result is extrapolated to the whole model."""

    model: Trainable  # the head and a few blocks, or the whole model
    more: Sequence[MoreBlocks] = ()  # one for each kind of block
    below: int = 0  # number of blocks of the whole model below the lowest adapted one


class BoundModel(ABC):
    """A loaded model with its adapter attached.

    Attributes:
        model: computes losses and gradients.
        lora: the adapter's flat buffers.
        config: the adapter's configuration.
        source: the model's files.
        notes: sentences for people, for example about weights that training unties.
        base_name: name of the base model for adapter_config.json.
    """

    def __init__(
        self, model: Trainable, lora: LoRAParameters, config: LoRAConfig, source: ModelSource, notes: Sequence[str]
    ) -> None:
        self.model, self.lora, self.config, self.source = model, lora, config, source
        self.notes = tuple(notes)
        self.base_name = source.hub_id or str(source.path.resolve())

    @property
    def frozen_prefix(self) -> FrozenPrefix | None:
        """The blocks below the lowest adapted one, which can be computed separately; None if that is impossible."""
        return None

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh factors, and set all other trained values so that the adapter does not change the base model."""
        self.lora.initialise(generator)
        self._start_other_values(generator)
        self.lora.refresh_compute(self.model.dtype)

    def fill(self, directory: str, allow_pickle: bool = False) -> None:
        """Load the values of an adapter with the same modules and ranks.

        Args:
            directory: the adapter's directory.
            allow_pickle: True if the file may be a pickle.

        Raises:
            UnusableAdapterError: the adapter does not fit. Lists every problem.
        """
        self._fill(directory, allow_pickle)
        self.lora.refresh_compute(self.model.dtype)

    @abstractmethod
    def adapter_files(self, record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        """Return the adapter in PEFT's format, as file contents by name."""

    @abstractmethod
    def completer(self) -> Completer:
        """Return the same model for completing prompts, with or without the adapter."""

    @abstractmethod
    def _start_other_values(self, generator: torch.Generator) -> None:
        """Set the trained values other than factors, such as DoRA's magnitudes, from the base model.

        Args:
            generator: draws the weights of a new classification head.
        """

    @abstractmethod
    def _fill(self, directory: str, allow_pickle: bool) -> None:
        """Copy the values of an adapter into the buffers."""


T = TypeVar("T")


class RunCache:
    """Objects that several runs of one process share: model file, rows, measured memory, weights, hidden states.

    A single run has a cache of its own. A search passes one cache to all trials. Each trial then starts quickly and
    needs no second base. The cache contains nothing that a run changes: the frozen weights are shared, but every run
    has its own decoder and adapter.
    """

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, Any]] = {}

    def get_or_create(
        self, kind: str, key: object, create: Callable[[], T], *, only_newest: bool = False, renew: bool = False
    ) -> T:
        """Return the object of this kind and key, and create it if necessary.

        Args:
            kind: name of the kind of object.
            key: everything that determines the object; its `repr` is compared.
            create: returns a new object.
            only_newest: drop other objects of this kind first, because they are large.
            renew: create a new object in any case.
        """
        objects = self._objects.setdefault(kind, {})
        name = repr(key)
        if renew or name not in objects:
            if only_newest:
                objects.clear()
            objects[name] = create()
        result: T = objects[name]
        return result

    @property
    def holds_weights(self) -> bool:
        """True if a base is in memory. Free memory and the process's memory have changed since then."""
        return "weights" in self._objects


class Engine(ABC):
    """An engine for one model, before the weights are read."""

    name: Literal["backhand", "transformers"]  # value of `--engine`
    # why the decoder engine was not chosen, the cost, and the remedy; None if it was chosen, or if transformers was
    # requested
    note: str | None = None
    notes: tuple[str, ...]  # sentences for people, for example about ignored fields of the model's configuration
    shares_prefixes: bool = False  # True if documents of a batch may share a prefix
    layers: int = 1  # number of blocks; 1 if unknown
    bases: tuple[HeldBase, ...] = ("dense",)  # the supported forms of the frozen weights

    def __init__(self, source: ModelSource, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self.notes = ()
        if (wrapper := source.wrapper) is not None:
            what = f"the text model inside a {wrapper.model_type} model"
            note = f"{what}: its other parts are neither loaded nor counted; the adapter is named as {wrapper.prefix}"
            self.notes = (note,)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Size of the vocabulary: token ids are below it."""

    @abstractmethod
    def layout(self, config: LoRAConfig) -> AdapterLayout:
        """Return the adapted modules and other trained tensors of an adapter.

        Raises:
            UsageError: a target matches nothing, or options contradict each other.
        """

    def module_shapes(self) -> Mapping[str, tuple[int, int]] | None:
        """Return (out, in) of every linear module by dotted path; None if that requires the weights."""
        return None

    def frozen_layers(self, layout: AdapterLayout, longest: int) -> FrozenLayers:  # noqa: ARG002 - the default ignores both
        """Describe the layers below the lowest adapted one, and why their hidden states may depend on the batch.

        Args:
            layout: the adapter.
            longest: number of tokens of the longest row.
        """
        return FrozenLayers()

    @abstractmethod
    def size(self, layout: AdapterLayout, base: HeldBase = "dense") -> ModelSize:
        """Return the sizes for the memory plan."""

    @abstractmethod
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
        """Read the weights, or take them from `run_cache`, and attach an adapter whose values are zero.

        Args:
            config: the adapter's configuration.
            device: where to compute.
            recompute: activations to recompute in the backward pass: `none`, `mlp` or `block`.
            base: form of the frozen weights.
            run_cache: objects that several runs of this process share.
            examine: called with the names of tensors just before these are copied into memory.

        Raises:
            UsageError: a target matches nothing, or cannot be adapted.
            ArtifactError: the weights do not fit the configuration, or cannot be read.
        """

    @abstractmethod
    def short(self, config: LoRAConfig, device: torch.device, recompute: str, base: HeldBase) -> ShortModel:
        """Return a model of a few blocks, which is measured instead of the whole model."""


@contextmanager
def computing_with(model: Trainable, values: Tensor | None) -> Iterator[None]:
    """Compute with other values of the attached adapter inside the context, or without the adapter for None."""
    lora = not_none(model.lora)
    own = None if values is None else lora.values.clone()
    try:
        if values is None:
            model.detach()
        else:
            lora.values.copy_(values)
            lora.refresh_compute(model.dtype)
        yield
    finally:
        if own is None:
            model.attach(lora)
        else:
            lora.values.copy_(own)
            lora.refresh_compute(model.dtype)
