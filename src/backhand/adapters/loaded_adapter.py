"""An adapter from files after it has been checked: what it trains on this model, with which values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backhand.adapters.adapter_record import AdapterRecord
from backhand.adapters.config import LoRAConfig
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import FactorShapes
from backhand.adapters.targets import Target, module_values
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, TrainedTensor


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter from files, checked completely against a model's modules.

    Attributes:
        directory: where the files lie.
        described: configuration, base model and task as adapter_config.json has them.
        targets: the adapted modules.
        shapes: what each of them has in the file.
        factors: everything that was trained, by its name in `LoRAParameters`, on the CPU, in the dtype of the file.
        base_copies: whole base weights found beside factors of embeddings and heads, by module; to be compared with the
            base model by who has it.
        record: backhand.json, if there is one.
        slots: for linear modules and embeddings, what `LoRAParameters` takes.
        trained: the tensors trained as they are.
        forced: a sentence for each thing that is not as in training, where the user said to use the adapter anyway.
    """

    directory: Path
    described: PEFTConfig
    targets: tuple[Target, ...]
    shapes: tuple[FactorShapes, ...]
    factors: Mapping[str, Tensor]
    base_copies: Mapping[str, Tensor]
    record: AdapterRecord | None
    slots: tuple[LoRASlot, ...] = ()
    forced: tuple[str, ...] = ()
    trained: tuple[TrainedTensor, ...] = ()

    @property
    def config(self) -> LoRAConfig:
        """What the adapter looks like."""
        return self.described.config

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read over and may interest a person."""
        wide = [
            f"{shape.name}: rank {shape.lora_A[0]} is above the smaller side of its weight {shape.weight}"
            for shape in self.shapes
            if not shape.embedding and shape.lora_A[0] > min(shape.weight[:2])
        ]
        copies = [f"{name}: the file also holds the whole base weight" for name in self.base_copies]
        return (*self.forced, *self.described.notes, *wide, *copies, *self._overlapping())

    @property
    def beside(self) -> dict[str, str]:
        """By module, what it has that is no plain factors of a linear module; who knows only those must refuse it."""
        kinds = {tensor.name.rpartition(".")[0]: "it is trained in full, or in single rows" for tensor in self.trained}
        for shape in self.shapes:
            if shape.magnitude is not None:
                kinds[shape.name] = "DoRA rescales the sum of base weight and update"
            elif shape.lora_bias is not None:
                kinds[shape.name] = "lora_B has a bias"
            elif shape.embedding:
                kinds[shape.name] = "it is an embedding"
        return kinds

    def _overlapping(self) -> list[str]:
        """Modules whose alpha depends on the order of alpha_pattern's keys, which PEFT loses when it writes."""
        reordered = replace(self.config, alpha_pattern=dict(reversed(list(self.config.alpha_pattern.items()))))
        others = module_values(reordered, [target.name for target in self.targets], strict=False)
        return [
            f"{target.name}: keys of alpha_pattern overlap; alpha {target.alpha:g} is read, as in PEFT, but "
            f"{other.alpha:g} may have been trained"
            for target, other in zip(self.targets, others, strict=True)
            if target.alpha != other.alpha
        ]

    def fill(self, parameters: LoRAParameters) -> None:
        """Copy everything into `parameters`, which must have been built from `slots` and `trained`."""
        if parameters.layout != (self.slots, self.trained):
            raise ValueError("the parameters were built from other slots than the adapter's")
        with torch.no_grad():
            for name, view in parameters.named_tensors():
                view.copy_(self.factors[name])

    def parameters(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoRAParameters:
        """New `LoRAParameters` that hold the adapter."""
        parameters = LoRAParameters(self.slots, trained=self.trained, device=device, dtype=dtype)
        self.fill(parameters)
        return parameters
