"""Names of an adapter's tensors in PEFT's file, and what must be there for each adapted module.

`base_model.model.` + module path + `.lora_A.weight`, `.lora_B.weight`; for an embedding `.lora_embedding_A`,
`.lora_embedding_B`. Inside Backhand a factor is `<module path>.lora_A` or `.lora_B`, whatever the module is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.adapters.nearest import nearest_names
from backhand.nn.lora_parameters import LoRASlot

PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_BASE_COPY = ".base_layer.weight"


@dataclass(frozen=True)
class FactorShapes:
    """What one adapted module must have in the file.

    Attributes:
        name: dotted module path.
        lora_A, lora_B: shapes of the factors, as PEFT stores them for this kind of module.
        weight: shape of the frozen weight.
        embedding: whether the module is an embedding, whose factors have names of their own.
    """

    name: str
    lora_A: tuple[int, ...]
    lora_B: tuple[int, ...]
    weight: tuple[int, ...]
    embedding: bool = False

    def keys(self) -> tuple[str, str]:
        """Names of lora_A and lora_B in the file."""
        first, second = _SUFFIXES[2:] if self.embedding else _SUFFIXES[:2]
        return PREFIX + self.name + first, PREFIX + self.name + second


def linear_shapes(slot: LoRASlot) -> FactorShapes:
    """What a linear module's slot must have in the file."""
    return FactorShapes(
        slot.name,
        (slot.rank, slot.in_features),
        (slot.out_features, slot.rank),
        (slot.out_features, slot.in_features),
    )


@dataclass(frozen=True)
class Matched:
    """Tensors of a file, told apart.

    Attributes:
        factors: `<module>.lora_A` and `<module>.lora_B`, in the order of the modules.
        base_copies: whole base weights that PEFT stores beside the factors of embeddings and output heads, by module.
        problems: a sentence for everything that is missing, unexpected or of another shape.
    """

    factors: dict[str, Tensor]
    base_copies: dict[str, Tensor]
    problems: list[str]


def match_tensors(
    expected: Sequence[FactorShapes], tensors: Mapping[str, Tensor], module_names: Sequence[str]
) -> Matched:
    """Hold the tensors of a file against what the configuration asks for on this model.

    Args:
        expected: the adapted modules.
        tensors: the file's tensors by their names there.
        module_names: all modules of the model, to say what an unexpected name may have meant.
    """
    matched = Matched({}, {}, [])
    left = dict(tensors)
    for module in expected:
        for letter, key, shape in zip("AB", module.keys(), (module.lora_A, module.lora_B), strict=True):
            _take_factor(matched, left, f"{module.name}.lora_{letter}", key, shape)
        copy_key = PREFIX + module.name + _BASE_COPY
        if copy_key in left and tuple(left[copy_key].shape) == module.weight:
            matched.base_copies[module.name] = left.pop(copy_key)
    adapted = {module.name for module in expected}
    matched.problems.extend(_unexpected(key, left[key], adapted, module_names) for key in left)
    return matched


def _take_factor(matched: Matched, left: dict[str, Tensor], factor: str, key: str, shape: tuple[int, ...]) -> None:
    tensor = left.pop(key, None)
    if tensor is None:
        matched.problems.append(f"missing: {key}, {shape}")
    elif tuple(tensor.shape) != shape:
        matched.problems.append(f"{key}: shape {tuple(tensor.shape)} in the file, {shape} by configuration and model")
    else:
        matched.factors[factor] = tensor


def _unexpected(key: str, tensor: Tensor, adapted: set[str], module_names: Sequence[str]) -> str:
    text = f"unexpected: {key}, {tuple(tensor.shape)}"
    if not key.startswith(PREFIX):
        return f"{text}; PEFT's names begin with {PREFIX}"
    path = key.removeprefix(PREFIX)
    suffix = next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), None)
    if suffix is None:
        if path.endswith("lora_magnitude_vector"):
            return f"{text}; magnitudes belong to DoRA, which is not supported"
        return f"{text}; only factors ({', '.join(_SUFFIXES)}) are understood"
    module = path.removesuffix(suffix)
    if module in adapted:
        return f"{text}; this kind of module has its factors under other names"
    if module in module_names:
        return f"{text}; the configuration does not adapt this module"
    near = nearest_names(module, module_names, count=2)
    return f"{text}; the model has no such module" + (f", the nearest are {' and '.join(near)}" if near else "")


def factor_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the tensors whatever the model is: values that are not finite, and factors without partner."""
    problems = []
    for key, tensor in tensors.items():
        finite = torch.isfinite(tensor.float())  # everything is computed in float32, where 1e300 is infinite
        if not bool(finite.all()):
            problems.append(f"{key}: {int((~finite).sum())} of {tensor.numel()} values are not finite")
    for ours, partner in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        problems.extend(_unpaired(tensors, ours, partner))
        problems.extend(_unpaired(tensors, partner, ours))
    return problems


def _unpaired(tensors: Mapping[str, Tensor], suffix: str, partner: str) -> list[str]:
    return [
        f"{key}: there is no {partner} beside it"
        for key in tensors
        if key.endswith(f".{suffix}") and key.removesuffix(suffix) + partner not in tensors
    ]
