"""Any causal language model that transformers can load, as a Trainable: adapters by `inject`, autograd for the rest.

It costs what autograd costs: more time and several times the memory of the decoder engine. What is the same: the loop,
the data, the flat buffers, the files, and the hand-written backward of every adapted layer.

Documents never see each other: each group of neighbours of equal length is one forward pass of shape (documents,
length), so that no padding and no mask is needed, which some models would treat wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import inject
from backhand.adapters.injected import InjectedAdapter
from backhand.errors import UsageError
from backhand.nn.batch import IGNORE_INDEX, PackedBatch, document_runs
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters, LoRASlot


class TransformersModel:
    """A transformers causal language model and at most one adapter.

    Args:
        model: in evaluation mode; its own dropout stays off.

    Attributes:
        lora: the attached adapter's flat buffers, or None.
        injected: the adapter inside the model, after `inject`.
        shares_prefixes: no: each document goes through transformers whole.
    """

    shares_prefixes = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.lora: LoRAParameters | None = None
        self.injected: InjectedAdapter | None = None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(parameter.dtype for _, parameter in self._base_parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(parameter.device for _, parameter in self._base_parameters())

    @property
    def vocab_size(self) -> int:
        """Tokens that documents may hold: ids below this."""
        model: Any = self.model
        return int(model.get_input_embeddings().weight.shape[0])

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        adapter = set() if self.injected is None else {id(parameter) for parameter in self.injected.parameters()}
        return ((name, parameter) for name, parameter in self.model.named_parameters() if id(parameter) not in adapter)

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every base parameter; a tied one appears once."""
        return ((name, parameter.detach()) for name, parameter in self._base_parameters())

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear module by dotted path."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def inject(self, config: LoRAConfig) -> AdapterLayout:
        """Put the adapter's modules into the model; `attach` then ties them to flat buffers of this layout.

        Raises:
            UsageError: a value out of range, modules that match nothing or cannot be adapted, or whole modules to train
                in a model whose dtype is not the buffers'.
        """
        if config.modules_to_save and self.dtype != torch.float32:
            raise UsageError(
                f"modules_to_save cannot be trained by transformers in {self.dtype}",
                where="modules_to_save",
                why="the trained values are float32, and the modules compute with them as they are",
                next_step="give --dtype float32",
            )
        self.injected = inject(self.model, config)
        slots = [
            LoRASlot(
                target.name,
                in_features=int(adapted.lora_A[0].numel()),
                out_features=int(adapted.lora_B.shape[0]),
                rank=target.rank,
                scaling=target.scaling,
                dropout=config.dropout,
                use_dora=config.use_dora,
                lora_bias=config.lora_bias,
                embedding=adapted.embedding,
            )
            for target, adapted in zip(self.injected.targets, self.injected.modules.values(), strict=True)
        ]
        return AdapterLayout(tuple(slots), self.injected.trained)

    def attach(self, lora: LoRAParameters) -> None:
        """Use and train this adapter: the modules' parameters become views of its buffers.

        Raises:
            ValueError: its slots are not those that `inject` returned.
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
        """Back to the base model; the modules stay, and do nothing."""
        self.lora = None
        self._injected().enable(False)

    def _injected(self) -> InjectedAdapter:
        if self.injected is None:
            raise ValueError("there is no adapter in the model: inject one first")
        return self.injected

    def loss_and_gradients(self, batch: PackedBatch, loss_scaling: float, dropout_seed: int | None = None) -> Tensor:
        """Add ∂(loss_scaling · Σ nats)/∂(what is trained) to `lora.gradients`; return Σ nats, 0-d float64.

        Raises:
            ValueError: without an attached adapter.
        """
        if self.lora is None:
            raise ValueError("there is no adapter to train: attach one first")
        total = torch.zeros((), dtype=torch.float64)
        with _dropout(self._injected(), dropout_seed, self.device), torch.enable_grad():
            for input_ids, labels in _groups(batch):
                nats = self._nats(input_ids, labels)
                if nats is not None:
                    (nats * loss_scaling).backward()
                    total += nats.detach().double().cpu()
        return total

    @torch.no_grad()
    def loss(self, batch: PackedBatch) -> Tensor:
        """Σ nats over the supervised positions, 0-d float64."""
        total = torch.zeros((), dtype=torch.float64)
        for input_ids, labels in _groups(batch):
            nats = self._nats(input_ids, labels)
            if nats is not None:
                total += nats.double().cpu()
        return total

    def _nats(self, input_ids: Tensor, labels: Tensor) -> Tensor | None:
        """Σ nats of (documents, length) ids, in float32; None where nothing is supervised."""
        supervised = labels != IGNORE_INDEX
        kept = supervised.any(dim=0).nonzero().squeeze(1)
        if not kept.numel():
            return None
        if self._keeps_logits:
            logits = self._logits(input_ids, logits_to_keep=kept)
        else:
            logits = self._logits(input_ids)[:, kept]
        chosen = supervised[:, kept]
        return nn.functional.cross_entropy(logits[chosen].float(), labels[:, kept][chosen], reduction="sum")

    def _logits(self, input_ids: Tensor, **options: Any) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **options).logits
        return logits

    @torch.no_grad()
    def logits(self, input_ids: Tensor, document_lengths: Sequence[int] | None = None) -> Tensor:
        """(tokens, vocab) logits of every position, documents kept apart."""
        lengths = (input_ids.shape[0],) if document_lengths is None else tuple(document_lengths)
        return torch.cat(
            [
                self._logits(input_ids[start : start + count * length].view(count, length)).flatten(0, 1)
                for start, count, length in document_runs(lengths)
            ]
        )


def _groups(batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbouring documents of equal length as (documents, length) ids and labels."""
    if batch.shared_prefix:
        raise ValueError("transformers takes each document whole: the batch must not have a shared prefix")
    for start, count, length in batch.runs:
        stop = start + count * length
        yield batch.input_ids[start:stop].view(count, length), batch.labels[start:stop].view(count, length)


@contextmanager
def _dropout(injected: InjectedAdapter, seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, the adapter drops elements as the seed says; nothing is dropped without one.

    The modules draw from torch's global generator, whose state is put back afterwards.
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
