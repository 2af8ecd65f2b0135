"""W' = W + scaling · lora_B lora_A, one tensor at a time, and what rounding W' to its stored type loses of the update.

    stored = type(W'),   share lost = ‖stored − W'‖ / ‖W' − W‖

With DoRA every row of the sum is brought to its trained length m; a tensor trained in full takes the place of W.

The sum is computed in float64 a few rows at a time, rounded to float32, and then to the stored type. Where W is a
number of the stored type, the nearest one to W' is at least as near as W, so that the share is at most 1: all of the
update is gone. Where W is not, as after dequantising, the rounding of W counts too, and the share may be above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backhand.adapters.module_factors import Factors, ModuleFactors
from backhand.adapters.record import base_digest
from backhand.export.proving import BlockWalk, layer_of
from backhand.nn.loading.source import EMBEDDING_WEIGHT, HEAD_WEIGHT, ModelSource
from backhand.ops.weight_tiles import FrozenMatrix

_ROWS = 512
Rounding = Callable[[Tensor], Tensor]
"""A tensor in Hugging Face's layout, of any floating dtype, as it will be read back: rounded to the stored type."""


@dataclass(frozen=True)
class ModuleLoss:
    """What one merged module's stored weight lost."""

    name: str
    lost: float  # ‖stored − W'‖ / ‖update‖
    update: float  # ‖update‖ / ‖W‖


@dataclass
class MergedWeights:
    """The tensors of the merged model, made one by one from base and adapter."""

    source: ModelSource
    factors: Factors
    trained: Mapping[str, Tensor] = field(default_factory=dict)  # tensors that take the place of the base's, by name
    keeps_head_tied: bool = False  # whether a head that is the embedding's matrix goes along with what becomes of that
    # of what each tensor must read back as, by name, for tensors made so far
    digests: dict[str, str] = field(default_factory=dict)
    losses: list[ModuleLoss] = field(default_factory=list)  # of the merged modules so far
    # through the base's blocks, which computes the probes' logits beside; what it has read is not read again
    walk: BlockWalk | None = None

    @property
    def unties_head(self) -> bool:
        """Whether the head is the embedding in the base and a matrix of its own in the merged model."""
        if HEAD_WEIGHT in self.source.tensor_names():
            return False
        return self.is_merged(HEAD_WEIGHT) or (self.is_merged(EMBEDDING_WEIGHT) and not self.keeps_head_tied)

    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in the order of the base, but for blocks, which follow one another."""
        stated = [*self.source.tensor_names(), *([HEAD_WEIGHT] if self.unties_head else [])]
        layers = [layer_of(name) for name in stated]
        first = next((place for place, layer in enumerate(layers) if layer is not None), len(stated))
        places = {
            name: ((-1 if place < first else len(stated)) if layer is None else layer, place)
            for place, (name, layer) in enumerate(zip(stated, layers, strict=True))
        }
        return sorted(stated, key=lambda name: places[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in Hugging Face layout."""
        return self.source.shape(self._base_name(name))

    def is_merged(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return name in self.trained or (name.removesuffix(".weight") in self.factors and name.endswith(".weight"))

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor in the base; float32 if it is quantized there."""
        return self.source.dtype(self._base_name(name))

    def make(self, name: str, rounded: Rounding) -> Tensor:
        """The merged tensor in Hugging Face layout: float32 (float64 if the base is), or the base's own if unchanged.

        What it must read back as, and what rounding it loses, is noted.
        """
        weight = self._load(self._base_name(name))
        if not self.is_merged(name):
            self._note_digest(name, rounded(weight))
            return weight
        change = self.trained[name] if name in self.trained else self.factors[name.removesuffix(".weight")]
        merged = merged_weight(weight, change)
        stored = rounded(merged)
        self._note_digest(name, stored)
        self.losses.append(_module_loss(name.removesuffix(".weight"), weight, change, stored))
        return merged

    def keep(self, name: str) -> None:
        """Note of a tensor whose stored bytes are copied what it must read back as; it is never dense as a whole."""
        self.digests[name] = base_digest([name], self.source.load_in_pieces)

    def _load(self, name: str) -> Tensor:
        if self.walk is None or self.source.dtype(name) == torch.float64:  # a walk is in float32
            return self.source.load(name)
        walked = self.walk.tensor(name)
        return self.source.load(name) if walked is None else walked

    def _base_name(self, name: str) -> str:
        return EMBEDDING_WEIGHT if name == HEAD_WEIGHT and self.unties_head else name

    def _note_digest(self, name: str, stored: Tensor) -> None:
        self.digests[name] = base_digest([name], lambda _: stored)

    def wrong_tensors(self, written: ModelSource, walk: BlockWalk) -> list[str]:
        """Names of tensors that are missing in `written`, too many, or do not read back bit by bit.

        Args:
            walk: through its blocks, which reads them for this as well.
        """
        there = set(written.tensor_names())

        def read(name: str) -> FrozenMatrix:
            walked = walk.tensor(name)
            return written.load_in_pieces(name) if walked is None else walked

        wrong = sorted(there ^ set(self.digests))
        both = [name for name in self.digests if name in there]
        return wrong + [name for name in both if base_digest([name], read) != self.digests[name]]


def wider_dtype(widest: bool) -> str:
    """What to do about a merged value that the dtype does not hold."""
    if widest:
        return "the adapter's update is too large for any dtype: `backhand inspect` shows it, or scale it by `combine`"
    return "give --dtype float32"


def merged_weight(weight: Tensor, change: ModuleFactors | Tensor) -> Tensor:
    """The weight with its update, or what takes its place: in float64, then float32 unless the weight is wider."""
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
    """(rows, W' of these rows) in float64, a few hundred rows at a time."""
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
