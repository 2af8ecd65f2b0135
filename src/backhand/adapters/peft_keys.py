"""Names of an adapter's tensors in PEFT's file, and the tensors that each adapted module must have.

`base_model.model.` + module path + `.lora_A.weight`, `.lora_B.weight`; for an embedding `.lora_embedding_A`,
`.lora_embedding_B`; with `lora_bias` `.lora_B.bias`; with DoRA `.lora_magnitude_vector`, which has no `.weight`.
A module trained in full has its parameters under their own names, and embedding rows are
`.token_adapter.trainable_tokens_delta`. Factors of a parameter of experts have the path of the parameter's module. If
several parameters of one module are adapted, PEFT's wrappers are nested, the first parameter innermost, and each inner
wrapper adds `.base_layer`. Inside Backhand the names are `<module path>.lora_A`, `.lora_B`, `.lora_bias`,
`.lora_magnitude`, the parameter's name, and `<module path>.trainable_tokens`, for any kind of module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backhand.nn.lora_parameters import TOKENS, LoRASlot, TrainedTensor
from backhand.words import nearest_names

PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_BIAS = ".lora_B.bias"
_MAGNITUDE = ".lora_magnitude_vector"
_TOKENS = "token_adapter.trainable_tokens_delta"
_BASE_COPY = ".base_layer.weight"


def factor_of(key: str) -> tuple[str, str] | None:
    """Return the module and the suffix of a factor's name in the file, or None for the name of another tensor."""
    suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
    return (key[len(PREFIX) : -len(suffix)], suffix) if suffix and key.startswith(PREFIX) else None


@dataclass(frozen=True)
class FactorShapes:
    """Shapes of the tensors that one adapted module must have in the file."""

    name: str
    # lora_A, lora_B: shapes of the factors in PEFT's file, for this kind of module
    lora_A: tuple[int, ...]
    lora_B: tuple[int, ...]
    weight: tuple[int, ...]
    embedding: bool = False  # True for an embedding, whose factors have names of their own
    # lora_bias, magnitude: shapes of the bias of lora_B and of DoRA's magnitude, None if there is none
    lora_bias: tuple[int, ...] | None = None
    magnitude: tuple[int, ...] | None = None
    experts: int = 0  # number of experts that share the parameter, 0 for a module
    path: str | None = None  # path in the file, if it is not `name`
    interleaved: bool = False  # True if the rows of the experts' lora_B alternate between gate and up

    def keys(self) -> tuple[str, str]:
        """Return the names of lora_A and lora_B in the file."""
        first, second = _SUFFIXES[2:] if self.embedding else _SUFFIXES[:2]
        path = PREFIX + (self.path or self.name)
        return path + first, path + second

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield (name inside Backhand, name in the file, shape) of each tensor of this module."""
        for letter, key, shape in zip("AB", self.keys(), (self.lora_A, self.lora_B), strict=True):
            yield f"{self.name}.lora_{letter}", key, shape
        if self.lora_bias is not None:
            yield f"{self.name}.lora_bias", PREFIX + self.name + _BIAS, self.lora_bias
        if self.magnitude is not None:
            yield f"{self.name}.lora_magnitude", PREFIX + self.name + _MAGNITUDE, self.magnitude


def slot_shapes(slots: Iterable[LoRASlot]) -> list[FactorShapes]:
    """Return the shapes of linear modules, embeddings and experts in the file; experts in the model's order."""
    shapes = [_shapes(slot) for slot in slots]
    holders = [shape.name.rpartition(".")[0] for shape in shapes if shape.experts]
    for place, shape in enumerate(shapes):
        if shape.experts:
            holder = holders.pop(0)
            shapes[place] = replace(shape, path=holder + ".base_layer" * holders.count(holder))
    return shapes


def _shapes(slot: LoRASlot) -> FactorShapes:
    parts = slot.shapes()
    weight = (slot.out_features, slot.in_features)
    return FactorShapes(
        slot.name,
        parts["lora_A"],
        parts["lora_B"],
        weight[::-1] if slot.embedding else weight,
        slot.embedding,
        parts.get("lora_bias"),
        parts.get("lora_magnitude"),
        slot.experts,
        interleaved=slot.interleaved,
    )


def trained_key(tensor: TrainedTensor) -> str:
    """Return the name in the file of a tensor that is trained directly."""
    name = tensor.name
    return PREFIX + (name if tensor.token_ids is None else name.removesuffix(TOKENS) + _TOKENS)


@dataclass(frozen=True)
class Matched:
    """Tensors of a file by their role."""

    # `<module>.lora_A`, `<module>.lora_B` and all other trained tensors, in the order of the modules
    factors: dict[str, Tensor]
    # whole base weights that PEFT stores next to the factors of embeddings and output heads, by module
    base_copies: dict[str, Tensor]
    problems: list[str]  # a sentence per tensor that is missing, unexpected or has another shape


def match_tensors(
    expected: Sequence[FactorShapes],
    tensors: Mapping[str, Tensor],
    module_names: Sequence[str],
    trained: Sequence[TrainedTensor] = (),
    unusable: Collection[str] = (),
) -> Matched:
    """Match the tensors of a file with those that the configuration requires on this model.

    Args:
        module_names: all modules of the model, to suggest what an unexpected name may mean.
        unusable: names of tensors in the file that are not in `tensors`, whose problems are already reported.
    """
    matched = Matched({}, {}, [])
    left = dict(tensors)

    def take(name: str, key: str, shape: tuple[int, ...]) -> None:
        tensor = left.pop(key, None)
        if tensor is None:
            matched.problems.extend([] if key in unusable else [f"missing: {key}, {shape}"])
        elif (found := tuple(tensor.shape)) != shape:
            matched.problems.append(f"{key}: shape {found} in the file, {shape} by configuration and model")
        else:
            matched.factors[name] = tensor

    for module in expected:
        for of_module in module.tensors():
            take(*of_module)
        copy_key = PREFIX + module.name + _BASE_COPY
        if copy_key in left and tuple(left[copy_key].shape) == module.weight:
            matched.base_copies[module.name] = left.pop(copy_key)
    for tensor in trained:
        take(tensor.name, trained_key(tensor), tensor.shape)
    adapted = {module.name for module in expected}
    matched.problems.extend(_unexpected(key, left[key], adapted, module_names) for key in left)
    return matched


def _unexpected(key: str, tensor: Tensor, adapted: set[str], module_names: Sequence[str]) -> str:
    text = f"unexpected: {key}, {tuple(tensor.shape)}"
    if not key.startswith(PREFIX):
        return f"{text}; PEFT's names begin with {PREFIX}"
    if (found := factor_of(key)) is None:
        options = ((_MAGNITUDE, "use_dora"), (_BIAS, "lora_bias"), (f".{_TOKENS}", "trainable_token_indices"))
        for end, option in options:
            if key.endswith(end):
                return f"{text}; by the configuration's {option} this module has none"
        return f"{text}; neither a factor ({', '.join(_SUFFIXES)}) nor of a module in modules_to_save"
    module, *_ = found
    if module in adapted:
        return f"{text}; this kind of module has its factors under other names"
    if module in module_names:
        return f"{text}; the configuration does not adapt this module"
    near = nearest_names(module, module_names, count=2)
    return f"{text}; the model has no such module" + (f", the nearest are {' and '.join(near)}" if near else "")


def factor_problems(tensors: Mapping[str, Tensor], unusable: Collection[str] = ()) -> list[str]:
    """Return problems that do not depend on the model: values that are not finite, and factors without a partner.

    Tensors named in `unusable` are in the file, and their problems are already reported.
    """
    there = {*tensors, *unusable}
    problems = []
    for key, tensor in tensors.items():
        finite = torch.isfinite(tensor.float())  # computations are in float32, where 1e300 is infinite
        if not bool(finite.all()):
            problems.append(f"{key}: {int((~finite).sum())} of {tensor.numel()} values are not finite")
    for ours, partner in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        for end, other in ((ours, partner), (partner, ours)):
            keys = [key for key in tensors if key.endswith(f".{end}") and key.removesuffix(end) + other not in there]
            problems += [f"{key}: its partner {other} is missing" for key in keys]
    return problems
