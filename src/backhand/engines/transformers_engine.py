"""The transformers engine: any causal language model of transformers, with injected adapters and autograd.

It takes more time and several times the memory of the decoder engine. The training loop, the data, the flat buffers,
the files and the hand-written backward of every adapted layer are the same.

Documents never attend to each other. The rows of a micro-batch are one pass of shape (documents, longest), padded on
the right without a mask, if the model's logits show that no position depends on later ones (`nn.right_padding`). The
output head computes the supervised positions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import InjectedAdapter, inject
from backhand.adapters.injection_plan import plan_injection
from backhand.adapters.loading import read_adapter
from backhand.adapters.record import AdapterRecord
from backhand.engines.engine import BoundModel, Engine, RunCache, ShortModel
from backhand.engines.memory.parts import ModelSize, transformers_size
from backhand.engines.memory.plan import HeldBase
from backhand.errors import UsageError, not_none
from backhand.generation.transformers_completer import TransformersCompleter
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.transformers_model import load_transformers_model, transformers_skeleton
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.nn.right_padding import concat_losses, padding_obstacle, reset_dynamic_rope, supervised_losses


class TransformersModel:
    """A transformers causal language model and at most one adapter.

    Args:
        model: the model. It is put into evaluation mode, so its own dropout is off.

    Attributes:
        lora: the attached adapter's flat buffers, or None.
        injected: the adapter inside the model, after `inject`.
        shares_prefixes: False, because transformers computes each document as a whole.
    """

    shares_prefixes = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.lora: LoRAParameters | None = None
        self.injected: InjectedAdapter | None = None

    @cached_property
    def padding_obstacle(self) -> str | None:
        """Why rows of different lengths are not computed together, or None if they are."""
        with nullcontext() if self.injected is None else self.injected.disabled():
            return padding_obstacle(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(parameter.dtype for _, parameter in self._base_parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(parameter.device for _, parameter in self._base_parameters())

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        adapter = set() if self.injected is None else {id(parameter) for parameter in self.injected.parameters()}
        return ((name, parameter) for name, parameter in self.model.named_parameters() if id(parameter) not in adapter)

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of every base parameter. A tied parameter occurs once."""
        return ((name, parameter.detach()) for name, parameter in self._base_parameters())

    def inject(self, config: LoRAConfig) -> AdapterLayout:
        """Insert the adapter's modules into the model and return its layout. `attach` connects them to flat buffers.

        Raises:
            UsageError: a value is out of range, a target matches nothing or cannot be adapted, or whole modules are to
                be trained in a model whose dtype is not float32.
        """
        _check_saved_modules(config, self.dtype)
        self.injected = inject(self.model, config)
        return self.injected.layout

    def attach(self, lora: LoRAParameters) -> None:
        """Use and train this adapter. The parameters of the injected modules become views of its buffers.

        Raises:
            ValueError: its slots differ from the injected modules.
        """
        injected = self._injected()
        if list(lora.slots) != list(injected.modules):
            raise ValueError("the adapter is for other modules than those injected")
        if lora is not self.lora:
            for name, parameter in injected.named_parameters():
                parameter.data = lora.tensor(name).view(parameter.shape)
                parameter.grad = lora.gradient(name).view(parameter.shape)
        self.lora = lora
        injected.enable()

    def detach(self) -> None:
        """Compute the base model without an adapter. The injected modules remain but are disabled."""
        self.lora = None
        self._injected().enable(False)

    def _injected(self) -> InjectedAdapter:
        if self.injected is None:
            raise ValueError("there is no adapter in the model: inject one first")
        return self.injected

    def loss_and_gradients(
        self,
        batch: PackedBatch,
        loss_scaling: float,
        dropout_seed: int | None = None,
        token_loss: TokenLoss | None = None,
    ) -> Tensor:
        """Add the gradients and return the loss, see `Trainable`. With `token_loss`, the whole graph exists at once.

        Raises:
            ValueError: no adapter is attached.
        """
        if self.lora is None:
            raise ValueError("there is no adapter to train: attach one first")
        total = torch.zeros((), dtype=torch.float64)
        with _dropout(self._injected(), dropout_seed, self.device), torch.enable_grad():
            if token_loss is not None:
                log_p = -batch.per_document(concat_losses(self._losses(batch), self.device))
                loss, d_log_p = token_loss(log_p.detach())
                if log_p.requires_grad:
                    log_p.backward((loss_scaling * d_log_p).to(log_p.dtype))
                return loss
            for losses in self._losses(batch):
                nats = losses.sum()
                (nats * loss_scaling).backward()
                total += nats.detach().double().cpu()
        return total

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch, *, exact: bool = False) -> Tensor:  # noqa: ARG002
        return batch.per_document(concat_losses(self._losses(batch), self.device))

    def _losses(self, batch: PackedBatch) -> Iterator[Tensor]:
        return supervised_losses(self.model, batch, lambda: self.padding_obstacle is None)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        reset_dynamic_rope(self.model)
        logits: Tensor = self.model(input_ids=input_ids[None], use_cache=False).logits
        return logits[0]


def _check_saved_modules(config: LoRAConfig, dtype: torch.dtype) -> None:
    if config.modules_to_save and dtype != torch.float32:
        raise UsageError(
            f"modules_to_save cannot be trained by transformers in {dtype}",
            where="modules_to_save",
            why="the trained values are float32, and the modules compute with them directly",
            next_step="give --dtype float32",
        )


@contextmanager
def _dropout(injected: InjectedAdapter, seed: int | None, device: torch.device) -> Iterator[None]:
    """Use dropout with this seed inside the context; None for no dropout.

    The modules draw from torch's global generator, whose state is restored afterwards.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for module in injected.modules.values():
            module.training = True
        try:
            yield
        finally:
            for module in injected.modules.values():
                module.training = False


class TransformersEngine(Engine):
    """transformers and autograd for one model. Its memory is estimated as a whole, because its blocks are unknown.

    Args:
        source: the model's files.
        dtype: the compute dtype.
        note: why the decoder engine was not chosen; None if transformers was requested.
    """

    name = "transformers"

    def __init__(self, source: ModelSource, dtype: torch.dtype, note: str | None) -> None:
        super().__init__(source, dtype)
        self.note = note

    @property
    def vocab_size(self) -> int:
        model: Any = transformers_skeleton(self._source, dtype=self._dtype)
        return int(model.get_input_embeddings().weight.shape[0])

    def layout(self, config: LoRAConfig) -> AdapterLayout:
        """Return the layout from the model's modules without their weights."""
        _check_saved_modules(config, self._dtype)
        skeleton = transformers_skeleton(self._source, dtype=self._dtype)
        return plan_injection(skeleton, config, None, skeleton=True).layout

    def size(
        self,
        layout: AdapterLayout,
        base: HeldBase = "dense",  # noqa: ARG002 - the only form
    ) -> ModelSize:
        source = self._source
        elements = sum(math.prod(source.shape(name)) for name in source.tensor_names())
        return transformers_size(source.config, elements, layout, self._dtype.itemsize)

    def load(
        self,
        config: LoRAConfig,
        device: torch.device,
        recompute: str,  # noqa: ARG002 - autograd saves all activations
        base: HeldBase,  # noqa: ARG002 - the only form
        run_cache: RunCache,  # noqa: ARG002 - runs cannot share a model with injected modules
        *,
        examine: Callable[[Sequence[str]], None] | None = None,  # noqa: ARG002 - transformers reads the files itself
    ) -> BoundModel:
        """Read the weights and attach an adapter whose values are zero."""
        model = TransformersModel(load_transformers_model(self._source, dtype=self._dtype, device=device))
        slots, trained = model.inject(config)
        lora = LoRAParameters(slots, full_tensors=trained, device=device)
        model.attach(lora)
        return _BoundTransformers(model, not_none(model.injected), lora, config, self._source)

    def short(self, config: LoRAConfig, device: torch.device, recompute: str, base: HeldBase) -> ShortModel:
        """Return the whole model, because its blocks are unknown."""
        bound = self.load(config, device, recompute, base, RunCache())
        bound.lora.refresh_compute(self._dtype)
        return ShortModel(bound.model)


class _BoundTransformers(BoundModel):
    def __init__(
        self,
        model: TransformersModel,
        injected: InjectedAdapter,
        lora: LoRAParameters,
        config: LoRAConfig,
        source: ModelSource,
    ) -> None:
        why = model.padding_obstacle
        notes = [] if why is None else [f"only rows of equal length are computed together: {why}"]
        super().__init__(model, lora, config, source, (*injected.notes, *notes))
        self._model, self._injected = model, injected

    def adapter_files(self, record: AdapterRecord, card: Mapping[str, object]) -> dict[str, bytes]:
        wrapper = self.source.wrapper
        return self._injected.files(base_model=self.base_name, record=record, card=card, wrapper=wrapper)

    def completer(self) -> TransformersCompleter:
        return TransformersCompleter(self._model.model, self._injected)

    def _start_other_values(self, generator: torch.Generator) -> None:  # noqa: ARG002 - it has no classification head
        self._injected.reset_bias_and_magnitude()

    def _fill(self, directory: str, allow_pickle: bool) -> None:
        self._injected.load_contents(read_adapter(directory, self.source, allow_pickle=allow_pickle))
