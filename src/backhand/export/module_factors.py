"""An adapter as the formats see it: per module two factors and what multiplies them, whatever file they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.adapters.loaded_adapter import LoadedAdapter
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot


@dataclass(frozen=True)
class ModuleFactors:
    """One adapted module: delta_weight = scaling · lora_B @ lora_A.

    Attributes:
        lora_A: (rank, in), or as PEFT has it for the kind of module.
        lora_B: (out, rank).
        scaling: what multiplies the product.
        magnitude: DoRA's m, (out,): the length that each row of weight + delta_weight is brought to; None without.
        embedding: whether the weight lies the other way round, (vocab, hidden) with lora_A (rank, vocab).
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]

    def scaled_to(self, scaling: float) -> ModuleFactors:
        """The same delta_weight under another scaling: the quotient goes into lora_B, in float64 and then back.

        Where both are the same up to float64's own rounding, lora_B keeps its bits.
        """
        quotient = self.scaling / scaling
        if abs(quotient - 1) < 1e-12:
            return ModuleFactors(self.lora_A, self.lora_B, scaling)
        folded = (self.lora_B.double() * quotient).to(torch.promote_types(self.lora_B.dtype, torch.float32))
        return ModuleFactors(self.lora_A, folded, scaling)

    def padded_to(self, rank: int) -> ModuleFactors:
        """The same delta_weight at a higher rank: rows and columns of zeros are added."""
        more = rank - self.rank
        if more == 0:
            return self
        return ModuleFactors(
            torch.nn.functional.pad(self.lora_A, (0, 0, 0, more)),
            torch.nn.functional.pad(self.lora_B, (0, more)),
            self.scaling,
        )


Factors = Mapping[str, ModuleFactors]
"""By dotted module path."""


def factors_of(loaded: LoadedAdapter) -> dict[str, ModuleFactors]:
    """The modules of a loaded adapter, in float32 at least; what is trained beside them is not among them."""

    def factor(name: str) -> Tensor:
        tensor = loaded.factors[name]
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    return {
        target.name: ModuleFactors(
            factor(f"{target.name}.lora_A"),
            factor(f"{target.name}.lora_B"),
            target.scaling,
            factor(f"{target.name}.lora_magnitude") if shape.magnitude is not None else None,
            shape.embedding,
        )
        for target, shape in zip(loaded.targets, loaded.shapes, strict=True)
    }


def parameters_of(factors: Factors) -> LoRAParameters:
    """The same as what the decoder engine computes with, on the CPU in float32."""
    slots = [
        LoRASlot(name, one.lora_A.shape[1], one.lora_B.shape[0], one.rank, one.scaling) for name, one in factors.items()
    ]
    parameters = LoRAParameters(slots)
    for name, one in factors.items():
        parameters.lora_A(name).copy_(one.lora_A)
        parameters.lora_B(name).copy_(one.lora_B)
    return parameters
