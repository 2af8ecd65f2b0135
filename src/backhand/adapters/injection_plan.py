"""Plan an injection: choose the modules to adapt, and collect all obstacles before the model is changed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.peft_keys import FactorShapes
from backhand.adapters.targets import Target, in_numbers, no_embedding_bias, resolve_targets
from backhand.adapters.trained_tensors import resolve_trained, saved_modules, tied_notes
from backhand.errors import UsageError
from backhand.nn.lora_parameters import AdapterLayout, LoRASlot, TrainedTensor
from backhand.nn.module_shapes import module_paths
from backhand.nn.modules.kinds import LORA_MODULES, LoRAConv1D, lora_class
from backhand.nn.modules.lora_module import LoRAModule, base_weight
from backhand.nn.modules.token_modules import TokenEmbedding, TokenLinear, TokenModule
from backhand.words import name_list


@dataclass(frozen=True)
class Injection:
    """Plan of an injection."""

    config: LoRAConfig
    targets: tuple[Target, ...]  # the modules to adapt, in the order of the model
    modules: dict[str, nn.Module]
    kinds: dict[str, type[LoRAModule]]  # the class that adapts each module
    shapes: tuple[FactorShapes, ...]  # shapes of each module's tensors in an adapter's file
    # module_names, linear, heads: all modules of the model, those of `all-linear`, and those that it leaves out
    module_names: tuple[str, ...]
    linear: frozenset[str]
    heads: tuple[str, ...]
    trained: tuple[TrainedTensor, ...]
    # the input embedding and modules that share its weight, by path, if rows of it are trained
    token_modules: dict[str, nn.Module]
    notes: tuple[str, ...]

    @property
    def layout(self) -> AdapterLayout:
        """The parts of the adapter."""
        slots = [
            LoRASlot(
                target.name,
                in_features=math.prod(shapes.lora_A[1:]),
                out_features=shapes.lora_B[0],
                rank=target.rank,
                scaling=target.scaling,
                dropout=self.config.dropout,
                use_dora=self.config.use_dora,
                lora_bias=self.config.lora_bias,
                embedding=shapes.embedding,
            )
            for target, shapes in zip(self.targets, self.shapes, strict=True)
        ]
        return AdapterLayout(tuple(slots), self.trained)


def plan_injection(
    model: nn.Module, config: LoRAConfig, heads: Sequence[str] | None, *, strict: bool = True, skeleton: bool = False
) -> Injection:
    """Resolve `config` on `model` and check that every module it names can be adapted.

    Args:
        heads: paths that `all-linear` leaves out, or None to ask the model.
        strict: raise for names that match nothing.
        skeleton: allow a model without weights, on torch's `meta` device.

    Raises:
        UsageError: see `inject`.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if any(isinstance(module, LoRAModule | TokenModule) for module in model.modules()):
        raise UsageError(
            "the model is adapted already",
            next_step="call remove() on the adapter that inject returned, or inject into a fresh model",
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise UsageError(
            "the model is adapted already, by PEFT",
            next_step="remove its adapter with unload() or merge_and_unload(), or inject into a fresh model",
        )
    linear = frozenset(name for name, one in modules.items() if isinstance(one, nn.Linear) or LoRAConv1D.fits(one))
    heads = tuple(_output_heads(model, modules) if heads is None else heads)
    targets = resolve_targets(config, list(modules), linear=linear, heads=heads, strict=strict)
    config = in_numbers(config, [target.name for target in targets])
    places = _places(model)
    in_attention = _inside_torch_attention(model)
    kinds: dict[str, type[LoRAModule]] = {}
    problems = []
    for target in targets:
        module = modules[target.name]
        kind = lora_class(module)
        if target.name in in_attention:
            problems.append(f"{target.name}: nn.MultiheadAttention reads its weight and never calls it")
        elif kind is None:
            problems.append(f"{target.name}: a {type(module).__qualname__} cannot be adapted{_otherwise_known(module)}")
        elif (reason := kind.obstacle(module, target.rank) or _without_weight(module, skeleton)) is not None:
            problems.append(f"{target.name}: {reason}")
        elif config.use_dora and getattr(module, "groups", 1) > 1:
            problems.append(f"{target.name}: DoRA of a grouped convolution does not exist in PEFT")
        elif config.lora_bias and not kind.takes_lora_bias:
            problems.append(str(no_embedding_bias(target.name)))
        elif len(places[id(module)]) > 1:
            problems.append(
                f"{target.name}: the same module is also at {name_list(places[id(module)][1:])}; PEFT would adapt "
                "the first place only"
            )
        else:
            kinds[target.name] = kind
    if problems:
        raise UsageError(
            f"{len(problems)} of {len(targets)} targeted modules cannot be adapted",
            where="target_modules",
            why="".join(f"\n    - {problem}" for problem in problems),
            next_step="exclude them with exclude_modules, or name others",
        )
    parameters, tied, embedding = _parameters(model, modules)
    trained = resolve_trained(
        config, parameters, embedding, tied=tied, targets=[target.name for target in targets], strict=strict
    )
    _check_buffers(modules, saved_modules(config.modules_to_save, module_paths(parameters), strict=strict))
    rows_of = _token_modules(modules, tied, embedding, skeleton) if config.trainable_token_indices else {}
    chosen = {target.name: modules[target.name] for target in targets}
    shapes = tuple(_factor_shapes(target, chosen[target.name], kinds[target.name], config) for target in targets)
    return Injection(
        config,
        tuple(targets),
        chosen,
        kinds,
        shapes,
        tuple(modules),
        linear,
        heads,
        tuple(trained),
        rows_of,
        (*_tied_notes(chosen, tied), *tied_notes(trained, tied)),
    )


def _check_buffers(modules: dict[str, nn.Module], saved: Sequence[str]) -> None:
    """Check that modules trained in full have no other state than parameters, which is all that a file contains.

    Raises:
        UsageError: if a module has buffers that belong to its state, as BatchNorm has.
    """
    for path in saved:
        parameters = {name for name, _ in modules[path].named_parameters(remove_duplicate=False)}
        if buffers := [name for name in modules[path].state_dict() if name not in parameters]:
            raise UsageError(
                f"{path} cannot be trained in full",
                where="modules_to_save",
                why=f"training would also change {name_list(buffers)}, and the adapter's files contain parameters only",
                next_step="leave it out of modules_to_save",
            )


def _otherwise_known(module: nn.Module) -> str:
    """Return why a module is not adapted although its base class is."""
    for kind in LORA_MODULES:
        if kind.base_type is not None and isinstance(module, kind.base_type):
            return f"; what it makes of {kind.base_type.__name__}'s weight is not known"
    return ""


def _factor_shapes(target: Target, module: nn.Module, kind: type[LoRAModule], config: LoRAConfig) -> FactorShapes:
    lora_A, lora_B = kind.factor_shapes(module, target.rank)
    return FactorShapes(
        target.name,
        lora_A,
        lora_B,
        tuple(base_weight(module).shape),
        kind.embedding,
        lora_B[:1] if config.lora_bias else None,
        kind.channel_shape(module) if config.use_dora else None,
    )


def _parameters(
    model: nn.Module, modules: dict[str, nn.Module]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str], str | None]:
    """Return the shapes of all parameters by name, the tied ones, and the path of the input embedding."""
    first: dict[int, str] = {}
    shapes, tied = {}, {}
    embedding = _input_embedding(model, modules)
    named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in sorted(named, key=lambda item: item[0] != f"{embedding}.weight"):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    for name, parameter in named:
        shapes[name] = tuple(parameter.shape)
    return shapes, tied, embedding


def _asked(model: nn.Module, method: str) -> tuple[bool, object]:
    """Return whether the model has this method of transformers', and its result; None without such a module."""
    ask = getattr(model, method, None)
    if not callable(ask):
        return False, None
    try:
        return True, ask()
    except (NotImplementedError, AttributeError):  # transformers models without such a module
        return True, None


def _input_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """Return the path of the layer that turns tokens into hidden states."""
    knows, found = _asked(model, "get_input_embeddings")
    if knows:
        return next((name for name, module in modules.items() if module is found), None)
    return next((name for name in modules if name == "embed_tokens" or name.endswith(".embed_tokens")), None)


def _without_weight(module: nn.Module, skeleton: bool) -> str | None:
    """Return the problem of a module without weight, unless the model may be a skeleton."""
    weight = module._parameters.get("weight")
    return (
        "its weight is not in memory (meta device)" if weight is not None and weight.is_meta and not skeleton else None
    )


def _token_modules(
    modules: dict[str, nn.Module], tied: dict[str, str], embedding: str | None, skeleton: bool
) -> dict[str, nn.Module]:
    """Return the input embedding and the modules that share its weight; all of them must support trained rows."""
    names = [
        str(embedding),
        *(name.removesuffix(".weight") for name, of in tied.items() if of == f"{embedding}.weight"),
    ]
    for name in names:
        kind = TokenEmbedding if name == embedding else TokenLinear
        if name != embedding and isinstance(modules[name], nn.Embedding):
            raise UsageError(
                f"{name} is a second embedding that shares the weight of {embedding}",
                where="trainable_token_indices",
                why="rows are trained in one embedding and in output heads tied to it",
                next_step="leave the tokens out",
            )
        if (reason := kind.obstacle(modules[name]) or _without_weight(modules[name], skeleton)) is not None:
            raise UsageError(f"{name}: {reason}", where="trainable_token_indices")
    return {name: modules[name] for name in names}


def _output_heads(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the paths of the layer that turns hidden states into logits."""
    knows, head = _asked(model, "get_output_embeddings")
    if knows:
        return [name for name, module in modules.items() if module is head]
    return ["lm_head"] if "lm_head" in modules else []


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Return the paths of each module object in different parents; a shared parent counts once."""
    seen: set[tuple[int, str]] = set()
    places: dict[int, list[str]] = defaultdict(list)
    for parent_name, parent in model.named_modules(remove_duplicate=False):
        for name, child in parent._modules.items():
            if child is not None and (id(parent), name) not in seen:
                seen.add((id(parent), name))
                places[id(child)].append(f"{parent_name}.{name}" if parent_name else name)
    return places


def _inside_torch_attention(model: nn.Module) -> set[str]:
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module._modules
    }


def _tied_notes(chosen: Iterable[str], tied: Mapping[str, str]) -> list[str]:
    """Return a sentence per adapted weight that another module shares."""
    notes = []
    for name in chosen:
        base = tied.get(f"{name}.weight", f"{name}.weight")
        shared = [base, *(other for other, of in tied.items() if of == base)]
        if others := [other for other in shared if other != f"{name}.weight"]:
            notes.append(f"{name}: its weight is tied to {name_list(others)}; the update applies to {name} alone")
    return notes


def close_fast_paths(module: nn.Module) -> list[tuple[nn.Module, str, object]]:
    """Make torch's own transformer layers call their linear layers.

    In evaluation nn.TransformerEncoderLayer passes the weights of its linear layers to one fused kernel and never calls
    them, so that an adapter would silently have no effect. The kernel supports ReLU and GELU only, and an attribute
    states whether the activation is one of these. The encoder may pass nested tensors, which only that kernel accepts.

    Returns:
        the changes: module, attribute and previous value.
    """
    changed: list[tuple[nn.Module, str, object]] = []
    for layer in module.modules():
        for kind, attribute, closed in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
            (nn.TransformerEncoder, "use_nested_tensor", False),
        ):
            if isinstance(layer, kind) and any(isinstance(inner, LoRAModule) for inner in layer.modules()):
                changed.append((layer, attribute, getattr(layer, attribute)))
                setattr(layer, attribute, closed)
    return changed
