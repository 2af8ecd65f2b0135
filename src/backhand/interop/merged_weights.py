"""Compute W' = W + scaling · lora_B lora_A, one tensor at a time, and the share of the update that rounding W' loses.

    stored = type(W'),   share lost = ‖stored − W'‖ / ‖W' − W‖

With DoRA every row of the sum is rescaled to its trained length m. A tensor trained in full replaces W.

The sum is computed in float64 a few rows at a time, rounded to float32, and then to the stored type. If W is exact in
the stored type, the number nearest to W' is at least as near as W, so that the share is at most 1: the whole update is
lost. If W is not exact, as after dequantization, the rounding of W counts too, and the share may be above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.adapters.module_factors import Factors, ModuleFactors
from backhand.adapters.record import base_digest
from backhand.interop.proving import BlockWalk, layer_of
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.tied_head import EMBEDDING_WEIGHT, HEAD_WEIGHT
from backhand.ops.weight_tiles import FrozenMatrix
from backhand.printing import counting

_ROWS = 512
Rounding = Callable[[Tensor], Tensor]
"""Rounds a tensor in Hugging Face's layout, of any floating dtype, to the stored type, as it will be read back."""


@dataclass(frozen=True)
class ModuleLoss:
    """Rounding loss of one merged module."""

    name: str
    lost: float  # ‖stored − W'‖ / ‖update‖
    update: float  # ‖update‖ / ‖W‖


class MergedHead(NamedTuple):
    """The head of a model of transformers' class for sequence classification."""

    parameters: Mapping[str, Tensor]  # by name
    prefix: str  # path of the base in the class; empty if the class has the names of the base
    fields: Mapping[str, Any]  # of config.json


@dataclass
class MergedWeights:
    """The tensors of the merged model, computed one by one from base and adapter."""

    source: ModelSource
    factors: Factors
    trained: Mapping[str, Tensor] = field(default_factory=dict)  # tensors that replace the base's, by name
    keeps_head_tied: bool = False  # True if a tied head follows the changed embedding
    # names in the written model of tensors with other names there; several have equal shares of the tensor's rows
    written_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # digests of the values that each tensor must have when it is read back, for tensors computed so far
    digests: dict[str, str] = field(default_factory=dict)
    losses: list[ModuleLoss] = field(default_factory=list)  # of the modules merged so far
    head: MergedHead | None = None  # the head of an adapter that has one
    # tensors of the base that are written unchanged, and that no state depends on: BERT's pooler, by name
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    # pass through the base's blocks that also computes the probes' logits; its tensors are not read a second time
    walk: BlockWalk | None = None

    @property
    def unties_head(self) -> bool:
        """Return True if the head is tied in the base and a matrix of its own in the merged model."""
        if not decoder_config(self.source.config).has_head or HEAD_WEIGHT in self.source.tensor_names():
            return False
        return self.is_merged(HEAD_WEIGHT) or (self.is_merged(EMBEDDING_WEIGHT) and not self.keeps_head_tied)

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors: the blocks in order, the others in the order of the base.

        The tensors of a head come last.
        """
        of_head = self._of_heads
        stated = [name for name in self.source.tensor_names() if name not in of_head]
        stated += [*([HEAD_WEIGHT] if self.unties_head else []), *of_head]
        layers = [layer_of(name) for name in stated]
        first = next((place for place, layer in enumerate(layers) if layer is not None), len(stated))
        places = {
            name: ((-1 if place < first else len(stated)) if layer is None else layer, place)
            for place, (name, layer) in enumerate(zip(stated, layers, strict=True))
        }
        return sorted(stated, key=lambda name: places[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in Hugging Face layout."""
        if (tensor := self._of_head(name)) is not None:
            return tuple(tensor.shape)
        return self.source.shape(self._base_name(name))

    def is_merged(self, name: str) -> bool:
        """Return True if the adapter changes this tensor."""
        return name in self.trained or (name.removesuffix(".weight") in self.factors and name.endswith(".weight"))

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor in the base, or float32 if it is quantized; of the head that of training."""
        if (tensor := self._of_head(name)) is not None:
            return tensor.dtype
        return self.source.dtype(self._base_name(name))

    def make(self, name: str, rounded: Rounding) -> Tensor:
        """Return the merged tensor as it will be read back, or the base's if it is unchanged.

        It is rounded from float32 (from float64 if the base is). Its digest and its loss are recorded.
        """
        of_head, module = self._of_head(name), name.removesuffix(".weight")
        weight = self._load(self._base_name(name)) if of_head is None else of_head
        if of_head is not None or not self.is_merged(name):
            stored = rounded(weight)
        else:
            change = self._change(name)
            stored = rounded(merged_weight(weight, change))
            self.losses.append(_module_loss(module, weight, change, stored))
        names = self.written_names.get(name, (name,))
        parts = dict(zip(names, stored.chunk(len(names)), strict=True))
        self.digests |= {written: base_digest([written], parts.__getitem__) for written in parts}
        return stored

    def keep(self, name: str) -> None:
        """Record the digest of a tensor whose stored bytes are copied; it is never dense as a whole."""
        self.digests[name] = base_digest([name], self.source.load_in_pieces)

    def head_rows(self, token_ids: Sequence[int]) -> Tensor:
        """Return the rows of some tokens in the merged head, (tokens, hidden) float32 or wider."""
        names = self.source.tensor_names()
        name = HEAD_WEIGHT if self.unties_head or HEAD_WEIGHT in names else EMBEDDING_WEIGHT
        weight = self.source.load(self._base_name(name))
        if self.is_merged(name):
            weight = merged_weight(weight, self._change(name))
        return weight[list(token_ids)]

    def _of_head(self, name: str) -> Tensor | None:
        """Return a parameter of the head or a tensor of `outside`, or None for the base's other tensors."""
        return self._of_heads.get(name)

    @property
    def _of_heads(self) -> Mapping[str, Tensor]:
        return self.outside if self.head is None else self.head.parameters

    def _change(self, name: str) -> ModuleFactors | Tensor:
        return self.trained[name] if name in self.trained else self.factors[name.removesuffix(".weight")]

    def _load(self, name: str) -> Tensor:
        if self.walk is None or self.source.dtype(name) == torch.float64:  # the walk computes in float32
            return self.source.load(name)
        walked = self.walk.tensor(name)
        return self.source.load(name) if walked is None else walked

    def _base_name(self, name: str) -> str:
        return EMBEDDING_WEIGHT if name == HEAD_WEIGHT and self.unties_head else name

    def wrong_tensors(self, written: ModelSource, walk: BlockWalk) -> list[str]:
        """Return the names of tensors that are missing in `written`, unexpected, or differ in a bit.

        Args:
            walk: pass through the blocks of `written`, from which the tensors are taken.
        """

        def read(name: str) -> FrozenMatrix:
            if name in heads:
                return heads[name]
            walked = walk.tensor(name)
            return written.load_in_pieces(name) if walked is None else walked

        heads = {name: tensor for name in self._of_heads if (tensor := written.head_tensor(name)) is not None}
        there = {*written.tensor_names(), *heads}
        both = [name for name in self.digests if name in there]
        wrong = []
        with counting("reading the merged model back", len(both), "tensors") as done:
            for name in both:
                if base_digest([name], read) != self.digests[name]:
                    wrong.append(name)
                done()
        return sorted(there ^ set(self.digests)) + wrong


def wider_dtype(widest: bool) -> str:
    """Return the next step for a merged value out of the dtype's range."""
    if widest:
        return "the adapter's update is too large for any dtype: `backhand inspect` shows it, or scale it by `combine`"
    return "give --dtype float32"


def merged_weight(weight: Tensor, change: ModuleFactors | Tensor) -> Tensor:
    """Return the merged or replaced weight: computed in float64, then float32 unless the weight is wider."""
    merged = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    for rows, exact in _exact_rows(weight, change):
        merged[rows] = exact.to(merged.dtype)
    return merged


def _module_loss(name: str, weight: Tensor, change: ModuleFactors | Tensor, stored: Tensor) -> ModuleLoss:
    lost = update = base = 0.0
    for rows, exact in _exact_rows(weight, change):
        lost += float((stored[rows].double() - exact).square().sum())
        update += float((exact - weight[rows].double()).square().sum())
        base += float(weight[rows].double().square().sum())
    return ModuleLoss(
        name,
        (lost / update) ** 0.5 if update > 0 else 0.0,
        (update / base) ** 0.5 if base > 0 else float("inf"),
    )


def _exact_rows(weight: Tensor, change: ModuleFactors | Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, W' of these rows) in float64, a few hundred rows at a time."""
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        if isinstance(change, Tensor):
            yield rows, change[rows].double()
            continue
        lora_A, lora_B = change.lora_A.double(), change.lora_B.double()
        product = (lora_B @ lora_A[:, rows]).T if change.embedding else lora_B[rows] @ lora_A
        exact = weight[rows].double() + change.scaling * product
        if change.magnitude is not None:
            exact *= (change.magnitude[rows].double() / exact.norm(dim=1)).unsqueeze(1)
        yield rows, exact
