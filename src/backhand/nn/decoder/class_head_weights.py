"""Parameters of a classification head: those in the files of a model, and the start of a new head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backhand.nn.families.family import DecoderConfig
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters

_START_STD = 0.02
"""Standard deviation of new weights, as in transformers (`initializer_range` of nearly all models)."""


def load_class_head(
    source: ModelSource, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Return the parameters of the head that the files contain, by name, in float32 or wider.

    Files of a pretrained BERT contain the pooler, files of a classifier all parameters, and those of most decoders
    none. Parameters of another shape belong to another head and are left out.
    """
    wide, hidden, found = torch.promote_types(dtype, torch.float32), config.hidden_size, {}
    for name in config.class_head.parameters.values():
        tensor = source.head_tensor(name)
        labels = 0 if tensor is None else len(tensor)
        if tensor is not None and tuple(tensor.shape) == config.class_head.shapes(hidden, labels)[name]:
            found[name] = tensor.to(device=device, dtype=wide)
    return found


def start_class_head(
    lora: LoRAParameters, config: DecoderConfig, base: Mapping[str, Tensor], generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Return the first values of the head's parameters that an adapter trains, by name.

    Args:
        base: the parameters in the files of the model, which the head starts from if their shape fits.
        generator: draws the other weights; None for zeros. Biases start at 0, and norms at 1.
    """
    values = {}
    for argument, name in config.class_head.parameters.items():
        if (tensor := lora.full_tensors.get(name)) is None:
            continue
        if name in base and base[name].shape == tensor.shape:
            values[name] = base[name]
        elif argument == "norm":
            values[name] = torch.ones(tensor.shape)
        elif len(tensor.shape) == 2 and generator is not None:
            drawn = torch.randn(tensor.shape, generator=generator, device=generator.device)
            values[name] = _START_STD * drawn
        else:
            values[name] = torch.zeros(tensor.shape)
    return values
