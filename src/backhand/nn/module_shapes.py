"""Shapes of a model's trainable tensors: linear modules, embeddings and whole parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy

from backhand.nn.families.class_heads import ClassHead
from backhand.nn.lora_parameters import LoRAParameters, Shape


class ModuleShapes(dict[str, tuple[int, int]]):
    """Shapes of all linear modules, (out, in) by dotted path, and of the other trainable tensors.

    A plain dict may be used instead for a model of which only the linear modules are known.

    Args:
        linear: (out, in) of every linear module, in forward order.
        embeddings: (vocab, hidden) of every embedding. The first one is the input embedding.
        parameters: shape of every parameter by name, from which `modules_to_save` chooses.
        tied: name of each tied parameter with the name of its source: `lm_head.weight` → `model.embed_tokens.weight`.
        frozen: names of parameters without a hand-written gradient, which `modules_to_save` cannot choose.
        experts: (experts, out, in) of every parameter that contains the matrices of all experts, from which
            `target_parameters` chooses.
        interleaved: those parameters of `experts` that interleave the outputs of gate and up.
        outside: linear modules of transformers' class that the model does not compute here, such as BERT's pooler. PEFT
            would adapt them if their names match.
        class_head: the head that an adapter for classification adds to the model, and the size of its vectors.
    """

    def __init__(
        self,
        linear: Mapping[str, tuple[int, int]],
        *,
        embeddings: Mapping[str, tuple[int, int]],
        parameters: Mapping[str, tuple[int, ...]],
        tied: Mapping[str, str],
        frozen: Iterable[str] = (),
        experts: Mapping[str, tuple[int, int, int]] | None = None,
        interleaved: Iterable[str] = (),
        outside: Iterable[str] = (),
        class_head: tuple[ClassHead, int] | None = None,
    ) -> None:
        super().__init__(linear)
        self.embeddings = dict(embeddings)
        self.parameters = dict(parameters)
        self.tied = dict(tied)
        self.frozen = tuple(frozen)
        self.experts = dict(experts or {})
        self.interleaved = frozenset(interleaved)
        self.outside = tuple(outside)
        self.class_head = class_head

    def with_class_head(self, in_file: Mapping[str, tuple[int, ...]]) -> ModuleShapes:
        """Return these shapes with the parameters of the classification head, for as many labels as a file has.

        Args:
            in_file: shapes of the tensors of an adapter by name.
        """
        shapes = copy(self)
        if self.class_head is not None:
            head, hidden = self.class_head
            shapes.parameters = {**self.parameters, **head.shapes(hidden, head.labels_of(in_file))}
        return shapes

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]]) -> ModuleShapes:
        """Return `shapes` as a `ModuleShapes`. A plain mapping knows no trainable tensors other than the weights."""
        weights = {f"{name}.weight": shape for name, shape in shapes.items()}
        return shapes if isinstance(shapes, cls) else cls(shapes, embeddings={}, parameters=weights, tied={})


def check_fits(lora: LoRAParameters, shapes: ModuleShapes) -> None:
    """Raise ValueError for a slot or a trained tensor that the model does not have, or has with another shape."""
    for name, slot in lora.slots.items():
        sides = slot.out_features, slot.in_features
        expected: Shape = sides[::-1] if slot.embedding else sides
        actual: Shape | None = (shapes.embeddings if slot.embedding else shapes).get(name)
        if slot.experts:
            expected, actual = (slot.experts, *expected), shapes.experts.get(name)
        if actual != expected:
            raise ValueError(f"{name}: adapter is for {expected}, model has {actual}")
        if slot.interleaved != (name in shapes.interleaved):
            raise ValueError(f"{name}: the rows of gate and up are interleaved in only one of adapter and model")
    for tensor in lora.full_tensors.values():
        base = shapes.parameters.get(tensor.base_name, ())
        shape = base if tensor.token_ids is None else (len(tensor.token_ids), *base[1:])
        if shape != tensor.shape:
            raise ValueError(f"{tensor.name}: adapter has {tensor.shape}, model has {shape}")


def module_paths(parameters: Iterable[str]) -> list[str]:
    """Return the paths of all modules that contain these parameters, directly or in submodules."""
    paths: dict[str, None] = {}
    for name in parameters:
        parts = name.split(".")
        paths |= {".".join(parts[:count]): None for count in range(1, len(parts))}
    return list(paths)
