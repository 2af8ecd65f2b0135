"""What of a model an adapter can train: its linear modules, and beside them embeddings and whole parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from backhand.nn.lora_parameters import LoRAParameters


class ModuleShapes(dict[str, tuple[int, int]]):
    """(out, in) of every linear module by dotted path.

    A plain dict in its place describes a model of which nothing but linear modules is known.

    Args:
        linear: (out, in) of every linear module, in forward order.
        embeddings: (vocab, hidden) of every embedding; the first one is the input embedding.
        parameters: shape of every parameter by its name, which `modules_to_save` chooses from.
        tied: names of parameters that are another one, by name: `lm_head.weight` → `model.embed_tokens.weight`.
    """

    def __init__(
        self,
        linear: Mapping[str, tuple[int, int]],
        *,
        embeddings: Mapping[str, tuple[int, int]],
        parameters: Mapping[str, tuple[int, ...]],
        tied: Mapping[str, str],
    ) -> None:
        super().__init__(linear)
        self.embeddings = dict(embeddings)
        self.parameters = dict(parameters)
        self.tied = dict(tied)


def embeddings_of(shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, int]]:
    """(vocab, hidden) of the embeddings; none where only linear modules are known."""
    return shapes.embeddings if isinstance(shapes, ModuleShapes) else {}


def parameters_of(shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by name; those of the linear modules' weights where nothing else is known."""
    if isinstance(shapes, ModuleShapes):
        return shapes.parameters
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def check_fits(lora: LoRAParameters, shapes: ModuleShapes) -> None:
    """Raise ValueError for a slot or a trained tensor that the model has not, or has in another shape."""
    for name, slot in lora.slots.items():
        known = shapes.embeddings if slot.embedding else shapes
        wanted = (slot.in_features, slot.out_features) if slot.embedding else (slot.out_features, slot.in_features)
        if known.get(name) != wanted:
            raise ValueError(f"{name}: adapter is for {wanted}, model has {known.get(name)}")
    for tensor in lora.trained.values():
        base = shapes.parameters.get(tensor.base_name, ())
        there = base if tensor.token_ids is None else (len(tensor.token_ids), *base[1:])
        if there != tensor.shape:
            raise ValueError(f"{tensor.name}: adapter has {tensor.shape}, model has {there}")


def module_paths(parameters: Iterable[str]) -> list[str]:
    """Paths of all modules that hold these parameters, themselves or further down."""
    paths: dict[str, None] = {}
    for name in parameters:
        parts = name.split(".")
        paths |= {".".join(parts[:count]): None for count in range(1, len(parts))}
    return list(paths)
