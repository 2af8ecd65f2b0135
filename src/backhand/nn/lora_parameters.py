"""All trained factors of one adapter in one flat buffer, their gradients in a second.

One buffer means one fused optimizer call, one norm, one cast to the compute dtype, one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoRASlot:
    """One adapted module: where it is and how large its factors are.

    Attributes:
        name: dotted module path, e.g. `model.layers.0.self_attn.q_proj`.
        in_features, out_features: the frozen weight is (out_features, in_features).
        rank: rows of lora_A, columns of lora_B.
        scaling: the multiplier of the low-rank branch, alpha / rank or alpha / √rank.
        dropout: probability that an input element of the low-rank branch is dropped.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    dropout: float = 0.0


class LoRAParameters:
    """lora_A (rank, in) and lora_B (out, rank) of every slot as views of one flat fp32 buffer.

    The order in the buffer is that of the slots, lora_A before lora_B.

    Args:
        slots: the adapted modules; names must be unique.
        device: where the buffers live.
        dtype: float32 in training; float64 in proofs.
    """

    def __init__(
        self,
        slots: Iterable[LoRASlot],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.slots: dict[str, LoRASlot] = {}
        self._offsets: dict[str, tuple[int, int, int]] = {}
        offset = 0
        for slot in slots:
            if slot.name in self.slots:
                raise ValueError(f"two slots are named {slot.name}")
            middle = offset + slot.rank * slot.in_features
            end = middle + slot.out_features * slot.rank
            self.slots[slot.name] = slot
            self._offsets[slot.name] = (offset, middle, end)
            offset = end
        self.values = torch.zeros(offset, device=device, dtype=dtype)
        self.gradients = torch.zeros(offset, device=device, dtype=dtype)
        self._compute = self.values

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    @property
    def element_count(self) -> int:
        """Trained elements in all."""
        return self.values.numel()

    def initialise(self, generator: torch.Generator) -> None:
        """Fill as PEFT does: lora_A Kaiming-uniform with a = √5, i.e. U(-1/√in, 1/√in), and lora_B zero."""
        self.values.zero_()
        for name, slot in self.slots.items():
            bound = 1 / math.sqrt(slot.in_features)
            drawn = torch.rand(slot.rank, slot.in_features, generator=generator, device=generator.device)
            self.lora_A(name).copy_((2 * drawn - 1) * bound)
        self.refresh_compute(self._compute.dtype)

    def refresh_compute(self, dtype: torch.dtype) -> None:
        """Cast the factors to the compute dtype, once an optimizer step; in the same dtype it is the same buffer."""
        if dtype == self.values.dtype:
            self._compute = self.values
        elif self._compute.dtype == dtype and self._compute is not self.values:
            self._compute.copy_(self.values)
        else:
            self._compute = self.values.to(dtype)

    def _factor_A(self, buffer: Tensor, name: str) -> Tensor:
        start, middle, _ = self._offsets[name]
        return buffer[start:middle].view(self.slots[name].rank, self.slots[name].in_features)

    def _factor_B(self, buffer: Tensor, name: str) -> Tensor:
        _, middle, end = self._offsets[name]
        return buffer[middle:end].view(self.slots[name].out_features, self.slots[name].rank)

    def lora_A(self, name: str) -> Tensor:
        """(rank, in) view of the trained values."""
        return self._factor_A(self.values, name)

    def lora_B(self, name: str) -> Tensor:
        """(out, rank) view of the trained values."""
        return self._factor_B(self.values, name)

    def compute_A(self, name: str) -> Tensor:
        """(rank, in) view in the compute dtype, as of the last `refresh_compute`."""
        return self._factor_A(self._compute, name)

    def compute_B(self, name: str) -> Tensor:
        """(out, rank) view in the compute dtype, as of the last `refresh_compute`."""
        return self._factor_B(self._compute, name)

    def d_lora_A(self, name: str) -> Tensor:
        """(rank, in) view of the gradient buffer."""
        return self._factor_A(self.gradients, name)

    def d_lora_B(self, name: str) -> Tensor:
        """(out, rank) view of the gradient buffer."""
        return self._factor_B(self.gradients, name)

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(`<module>.lora_A` or `<module>.lora_B`, view) of every factor, in buffer order."""
        for name in self.slots:
            yield f"{name}.lora_A", self.lora_A(name)
            yield f"{name}.lora_B", self.lora_B(name)
