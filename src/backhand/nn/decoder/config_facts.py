"""The parsed configuration of a base model as flat, comparable facts.

They belong to the identity of a base. Two bases with equal weights and another `rms_norm_eps` or rotary base compute
other numbers. The decoder engine's parsed configuration is compared rather than config.json itself. A field that is
absent then equals one that states its default, and the two forms of `rope_parameters` are equal. A GGUF file agrees
with the directory it was converted from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from math import isinf
from typing import Any, cast

import numpy as np

from backhand.nn.families.config_fields import UNREAD, UnsupportedModel
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.families.neutral_fields import NEUTRAL
from backhand.nn.loading.source import ModelSource

_PARSED_BY = "parsed by"
_WITHOUT_EFFECT = ("notes", "max_position_embeddings", "class_head")
"""Fields of the parsed configuration that are said or checked, or belong to an adapter's head for classification."""
_OF_TRAINING = ("eos_token_id", "eos_token_ids", "padding_id")
"""Fields that decide which tokens are sampled or trained, and no number that the model computes."""
_MOST_SHOWN = 6


def config_facts(source: ModelSource) -> dict[str, Any]:
    """Return the fields that the computation depends on, by dotted name, as JSON holds them.

    Fields at their default are left out, so that a field which a later version adds changes nothing. For a model that
    only transformers computes, the facts are its config without the fields that never change a number.
    """
    try:
        parsed = decoder_config(source.config)
    except UnsupportedModel:
        raw = {key: value for key, value in source.config.items() if key not in (*NEUTRAL, UNREAD)}
        return {_PARSED_BY: "transformers", "model_type": source.config.get("model_type"), **dict(_flat(raw, ""))}
    flat = {name: value for name, value in _flat(parsed, "") if name.partition(".")[0] not in _WITHOUT_EFFECT}
    return {_PARSED_BY: "backhand", **flat}


def recorded_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that an adapter's record keeps: those that decide what the model computes for given tokens."""
    return {name: value for name, value in facts.items() if name.partition(".")[0] not in _OF_TRAINING}


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any], *, across_files: bool = False) -> str | None:
    """Return the changed fields as `name: before -> now, …`, or None if the two are equal.

    Args:
        across_files: one side may be a GGUF file, which stores numbers in float32. A rotary scaling that one side
            states as a rule and the other as its factors, as such a file does, is left out.
    """
    names = sorted({*before, *now})
    if across_files:
        names = [name for name in names if not _is_other_form_of_scaling(name, before, now)]
    if before.get(_PARSED_BY) != now.get(_PARSED_BY):
        names = [_PARSED_BY]  # the names of the two forms have nothing in common
    changed = changed_fields(
        *({name: facts.get(name) for name in names} for facts in (before, now)), in_float32=across_files
    )
    more = len(changed) - _MOST_SHOWN
    return ", ".join([*changed[:_MOST_SHOWN], f"and {more} more"] if more > 0 else changed) or None


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any], *, in_float32: bool = False) -> list[str]:
    """Return `name: before -> now` of each changed field, sorted. `in_float32` compares numbers in this precision."""
    stored = _in_float32 if in_float32 else _as_json
    changed = [name for name in sorted({*before, *now}) if stored(before.get(name)) != stored(now.get(name))]
    return [f"{name}: {_shown(before, name)} -> {_shown(now, name)}" for name in changed]


def flat_config(config: DecoderConfig) -> dict[str, Any]:
    """Return the compared fields of a parsed configuration that are not at their default, by dotted name."""
    return dict(_flat(replace(config, notes=()), ""))


def _in_float32(value: Any) -> Any:
    """Return a JSON value with its numbers rounded to float32."""
    if isinstance(value, list | tuple):
        return [_in_float32(one) for one in value]
    with np.errstate(over="ignore"):
        return float(np.float32(value)) if isinstance(value, float) else value


def _is_other_form_of_scaling(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    rotary, scaling, _ = name.partition(".scaling.")
    types = {facts.get(f"{rotary}.scaling.rope_type") for facts in (before, now)}
    return bool(scaling) and len(types) > 1 and "longrope" in types


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return str(facts[name]) if facts.get(name) is not None else "default"


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dataclasses, named tuples, mappings and sequences of them, that are not at their default."""
    for name, (item, default) in _members(value).items():
        if item is None or item == default:
            continue
        if _members(item):
            yield from _flat(item, f"{prefix}{name}.")
        elif isinstance(item, Sequence) and not isinstance(item, str) and any(map(_members, item)):
            yield f"{prefix}{name}", len(item)
            for index, one in enumerate(item):
                yield from _flat(one, f"{prefix}{name}.{index}.")
        else:
            yield f"{prefix}{name}", _as_json(item)


def _as_json(value: Any) -> Any:
    """Return nested tuples as the lists that JSON gives back, and infinity, which JSON does not have, as a word."""
    if isinstance(value, float) and isinf(value):
        return str(value)
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _members(value: Any) -> dict[str, tuple[Any, Any]]:
    """Name, value and default of each member; empty for what has no named members."""
    if is_dataclass(value):
        members = {}
        for field in fields(value):
            default = None if field.default is MISSING else field.default
            members[field.name] = getattr(value, field.name), default
        return members
    if hasattr(value, "_asdict"):
        named = cast("Any", value)
        return {name: (item, named._field_defaults.get(name)) for name, item in named._asdict().items()}
    if isinstance(value, tuple) and value and all(isinstance(one, tuple) and len(one) == 2 for one in value):
        value = dict(value)  # the parameters of a rotary scaling rule
    return {str(name): (item, None) for name, item in value.items()} if isinstance(value, Mapping) else {}
