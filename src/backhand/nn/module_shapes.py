"""What of a model an adapter can train: its linear modules, and beside them embeddings and whole parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from backhand.nn.lora_parameters import LoRAParameters, Shape


class ModuleShapes(dict[str, tuple[int, int]]):
    """(out, in) of every linear module by dotted path.

    A plain dict in its place describes a model of which nothing but linear modules is known.

    Args:
        linear: (out, in) of every linear module, in forward order.
        embeddings: (vocab, hidden) of every embedding; the first one is the input embedding.
        parameters: shape of every parameter by its name, which `modules_to_save` chooses from.
        tied: names of parameters that are another one, by name: `lm_head.weight` → `model.embed_tokens.weight`.
        frozen: names of parameters without a gradient by hand, which `modules_to_save` cannot choose.
        experts: (experts, out, in) of every parameter that holds the matrices of all experts, which
            `target_parameters` chooses from.
        interleaved: those of them whose outputs are gate's and up's interleaved.
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
    ) -> None:
        super().__init__(linear)
        self.embeddings = dict(embeddings)
        self.parameters = dict(parameters)
        self.tied = dict(tied)
        self.frozen = tuple(frozen)
        self.experts = dict(experts or {})
        self.interleaved = frozenset(interleaved)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]]) -> ModuleShapes:
        """The same; of any other mapping, which says nothing of tensors beside the modules' weights, what it says."""
        weights = {f"{name}.weight": shape for name, shape in shapes.items()}
        return shapes if isinstance(shapes, cls) else cls(shapes, embeddings={}, parameters=weights, tied={})


def check_fits(lora: LoRAParameters, shapes: ModuleShapes) -> None:
    """Raise ValueError for a slot or a trained tensor that the model has not, or has in another shape."""
    for name, slot in lora.slots.items():
        sides = slot.out_features, slot.in_features
        wanted: Shape = sides[::-1] if slot.embedding else sides
        there: Shape | None = (shapes.embeddings if slot.embedding else shapes).get(name)
        if slot.experts:
            wanted, there = (slot.experts, *wanted), shapes.experts.get(name)
        if there != wanted:
            raise ValueError(f"{name}: adapter is for {wanted}, model has {there}")
        if slot.interleaved != (name in shapes.interleaved):
            raise ValueError(f"{name}: gate's and up's rows are interleaved in one of adapter and model alone")
    for tensor in lora.trained.values():
        base = shapes.parameters.get(tensor.base_name, ())
        found = base if tensor.token_ids is None else (len(tensor.token_ids), *base[1:])
        if found != tensor.shape:
            raise ValueError(f"{tensor.name}: adapter has {tensor.shape}, model has {found}")


def module_paths(parameters: Iterable[str]) -> list[str]:
    """Paths of all modules that hold these parameters, themselves or further down."""
    paths: dict[str, None] = {}
    for name in parameters:
        parts = name.split(".")
        paths |= {".".join(parts[:count]): None for count in range(1, len(parts))}
    return list(paths)
