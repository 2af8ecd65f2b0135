"""The two ways a model is computed, behind one protocol: the decoder engine, and transformers with autograd.

    Engine      before a weight is read: what can be adapted, how large the model is, what it cannot do
    BoundModel  loaded, with an adapter: its values, its files, its answers
    Trainable   what the training loop sees: a batch in, the loss and the adapter's gradients out

`decoder_engine.choose_engine` makes the choice. Nothing else in training asks which of the two it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.record import AdapterRecord
from backhand.engines.memory.hidden_states import FrozenLayers
from backhand.engines.memory.parts import ModelSize
from backhand.engines.memory.plan import HeldBase
from backhand.generate.completer import Completer, LanguageModel
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
        """Back to the base model."""

    def frozen_tensors(self) -> Iterator[tuple[str, FrozenMatrix]]:
        """(name, tensor) of everything that must not move."""

    def loss_and_gradients(
        self,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None = None,
        token_loss: TokenLoss | None = None,
    ) -> Tensor:
        """Add ∂(loss_scaling · loss)/∂(lora_A, lora_B) to `lora.gradients`; return the loss, 0-d float64.

        The loss is Σ nats, or what `token_loss` makes of the supervised tokens' log-probabilities.
        """

    def loss(self, batch: PackedBatch) -> Tensor:
        """Σ nats over the supervised positions, 0-d float64, without gradients and without dropout."""

    def logits(self, input_ids: Tensor) -> Tensor:
        """(tokens, vocab) logits of every position of a document, without dropout."""


class MoreBlocks(NamedTuple):
    """The short model and one more block of a kind."""

    model: Trainable  # that
    blocks: int  # of this kind, that an adapter keeps something of, in the whole model
    missing: int  # of these, how many the short model lacks


class ShortModel(NamedTuple):
    """What is measured in place of the whole model."""

    model: Trainable  # the head and a few blocks; or the whole
    more: Sequence[MoreBlocks] = ()  # for each kind of block
    below: int = 0  # blocks of the whole model under the lowest adapted one


class BoundModel(ABC):
    """A loaded model with its adapter attached.

    Attributes:
        notes: what may interest a person, such as weights that training unties.
    """

    def __init__(
        self, model: Trainable, lora: LoRAParameters, config: LoRAConfig, source: ModelSource, notes: Sequence[str]
    ) -> None:
        self.model, self.lora, self.config, self.source = model, lora, config, source
        self.notes = tuple(notes)
        self.base_name = source.hub_id or str(source.path.resolve())  # as adapter_config.json has it

    @property
    def frozen_prefix(self) -> FrozenPrefix | None:
        """The blocks below the lowest adapted one, which can be computed separately; None if that is impossible."""
        return None

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh factors; whatever else is trained starts from the base model, which nothing changes yet."""
        self.lora.initialise(generator)
        self._start_beside_factors()
        self.lora.refresh_compute(self.model.dtype)

    def fill(self, directory: str, allow_pickle: bool = False) -> None:
        """Copy the values of an adapter of the same modules and ranks.

        Args:
            allow_pickle: whether it may be a pickle.

        Raises:
            UnusableAdapterError: an ArtifactError that lists every problem.
        """
        self._fill(directory, allow_pickle)
        self.lora.refresh_compute(self.model.dtype)

    @abstractmethod
    def adapter_files(self, record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        """The adapter as PEFT reads it: files by name."""

    @abstractmethod
    def completer(self) -> Completer:
        """The same model as one that completes prompts, with the adapter and without it."""

    @abstractmethod
    def _start_beside_factors(self) -> None:
        """Set what in a fresh adapter starts from the base model."""

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
    """A way to compute a model, known before its weights are read."""

    name: Literal["backhand", "transformers"]  # as `--engine` has it
    # why not the decoder engine, what that costs and what would change it; None where it is taken, or transformers was
    # asked for
    note: str | None = None
    notes: tuple[str, ...]  # what a person should know of the model, such as fields of its configuration without effect
    shares_prefixes: bool = False  # whether documents of a batch may share what they begin with
    layers: int = 1  # blocks of the whole model; 1 where that is not known
    bases: tuple[HeldBase, ...] = ("dense",)  # how the frozen weights can be held

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
        """Tokens that documents may hold: ids below this."""

    @abstractmethod
    def layout(self, config: LoRAConfig) -> AdapterLayout:
        """What the adapter will consist of.

        Raises:
            UsageError: a target matches nothing, or what is trained does not go together.
        """

    def module_shapes(self) -> Mapping[str, tuple[int, int]] | None:
        """(out, in) of every linear module by dotted path; None where the weights have to be there."""
        return None

    def frozen_layers(self, layout: AdapterLayout, longest: int) -> FrozenLayers:  # noqa: ARG002 - nothing is known of either
        """What lies below the lowest adapted layer, and whether its hidden states are a row's own.

        Args:
            longest: tokens of the longest row.
        """
        return FrozenLayers()

    @abstractmethod
    def size(self, layout: AdapterLayout, base: HeldBase = "dense") -> ModelSize:
        """What the memory plan needs to know."""

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
        """Read the weights, or take those that `shared` holds, and attach an adapter whose values are still zero.

        Args:
            examine: called with the names of tensors just before they are copied into memory.

        Raises:
            UsageError: a target matches nothing, or cannot be adapted.
            ArtifactError: the weights do not fit the configuration, or cannot be read.
        """

    @abstractmethod
    def short(self, config: LoRAConfig, device: torch.device, recompute: str, base: HeldBase) -> ShortModel:
        """A few of the model's blocks, to measure in place of the whole."""
