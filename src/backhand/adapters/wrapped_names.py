"""An adapter of a text model in the names of the image model around it, and back.

PEFT matches the names of `target_modules` against the ends of module paths, and an image model's vision part has a
q_proj as well. So what is written for the whole model is a regular expression over the text model's paths where it
picks exactly the adapted modules, and whole paths otherwise.

Read, an adapter of the whole model is one of the text model as soon as the names in its file lie in there, whichever of
the two ways of writing the prefix they have: the tensors say what was adapted. What it has of other parts stays as it
is, and does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from backhand.adapters.contents import AdapterContents
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import PREFIX
from backhand.adapters.targets import Target
from backhand.nn.loading.wrappers import Wrapper, text_name

_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")
_IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<end>.+)")
_IN_A_PATTERN = re.compile(r"(?:model(?:\\?\.))?(?:language_model|text_model)(?:\\?\.)(?:model(?:\\?\.))?")
_NO_OTHER_CHOICE: dict[str, Any] = {"exclude_modules": (), "layers_to_transform": None, "layers_pattern": ()}


def in_wrapper(
    described: PEFTConfig, targets: Sequence[Target], wrapper: Wrapper, module_names: Collection[str] | None
) -> tuple[PEFTConfig, tuple[Target, ...]]:
    """Configuration and targets with the names that the whole model has for them.

    Args:
        described: configuration and names as the text model has them.
        module_names: all linear modules of the text model, None if they are not known.
    """
    renamed = tuple(replace(target, name=wrapper.outside(target.name)) for target in targets)
    wanted = _expression([target.name for target in targets], wrapper, module_names or ())
    config = replace(described.config, target_modules=wanted, **_NO_OTHER_CHOICE)
    return replace(described, config=config), renamed


def _expression(names: Sequence[str], wrapper: Wrapper, module_names: Collection[str]) -> str | tuple[str, ...]:
    """What picks these modules of the text model and no others of the whole."""
    whole = tuple(sorted(wrapper.outside(name) for name in names))
    parts = [_IN_LAYER.fullmatch(name) for name in names]
    ends: dict[str, set[str]] = {}
    for match in parts:
        if match is None:
            return whole
        ends.setdefault(match["end"], set()).add(match["layer"])
    layers = set().union(*ends.values())
    if not layers or any(numbers != layers for numbers in ends.values()):
        return whole
    everywhere = {match["layer"] for name in module_names if (match := _IN_LAYER.fullmatch(name))}
    numbers = r"\d+" if layers == everywhere else f"(?:{'|'.join(sorted(layers, key=int))})"
    inside = "|".join(re.escape(end) for end in sorted(ends))
    return rf"{re.escape(wrapper.prefix)}\.layers\.{numbers}\.(?:{inside})"


def of_the_text_model(contents: AdapterContents) -> AdapterContents:
    """What was read, in the text model's names where it is an adapter of a whole image model's text part."""
    names = {key: _inside(key) for key in (*contents.tensors, *(contents.unusable or ()))}
    if all(name is None or name == key for key, name in names.items()):
        return contents

    def renamed(key: str) -> str:
        return names[key] or key

    config = contents.described.config
    modules = {match["module"] for key in names if (match := _FACTOR.fullmatch(renamed(key).removeprefix(PREFIX)))}
    config = replace(
        config,
        target_modules=tuple(sorted(modules)),
        **_NO_OTHER_CHOICE,
        rank_pattern=_patterns(config.rank_pattern),
        alpha_pattern=_patterns(config.alpha_pattern),
        modules_to_save=tuple(text_name(name) or name for name in config.modules_to_save),
    )
    return replace(
        contents,
        described=replace(contents.described, config=config),
        tensors={renamed(key): tensor for key, tensor in contents.tensors.items()},
        stored_bytes={renamed(key): size for key, size in contents.stored_bytes.items() if key in names},
        unusable=None if contents.unusable is None else [renamed(key) for key in contents.unusable],
    )


def _inside(key: str) -> str | None:
    if not key.startswith(PREFIX):
        return None
    name = text_name(key.removeprefix(PREFIX))
    return None if name is None else PREFIX + name


def _patterns(pattern: Any) -> dict[str, Any]:
    """Keys of rank_pattern or alpha_pattern, perhaps regular expressions, without the prefix."""
    return {_IN_A_PATTERN.sub(r"model\\.", key): value for key, value in pattern.items()}
