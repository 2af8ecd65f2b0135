"""PEFT's adapter_config.json written in one canonical form: the same adapter gives the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from backhand.adapters.config import ALL_LINEAR, LoRAConfig
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_fields import FORMAT_VERSION, PEFT_FIELDS
from backhand.adapters.targets import Target, resolve_targets


def peft_config_bytes(described: PEFTConfig, targets: Sequence[Target], module_names: Collection[str] | None) -> bytes:
    """adapter_config.json in canonical form: the same adapter gives the same bytes.

    Args:
        described: configuration and names.
        targets: the adapted modules, with what was resolved for each.
        module_names: all modules of the model, if known; then `all-linear` is written as the shortest list of names
            that picks exactly the adapted ones.
    """
    config = described.config
    names = [target.name for target in targets]
    modules, exclude, layers = written_targets(config, names, module_names)
    fields: dict[str, Any] = {name: None for name, rule in PEFT_FIELDS.items() if name != "runtime_config"}
    fields |= {
        "peft_type": "LORA",
        "peft_version": FORMAT_VERSION,
        "task_type": described.task_type,
        "base_model_name_or_path": described.base_model,
        "revision": described.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": modules,
        "exclude_modules": exclude,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "modules_to_save": list(config.modules_to_save) or None,
        "trainable_token_indices": list(config.trainable_token_indices) or None,
        "rank_pattern": written_pattern({t.name: t.rank for t in targets}, config.rank),
        "alpha_pattern": written_pattern({t.name: _number(t.alpha) for t in targets}, _number(config.alpha)),
        "layers_to_transform": layers,
        "layers_pattern": list(config.layers_pattern) or None if layers else None,
        "fan_in_fan_out": described.fan_in_fan_out,
        "init_lora_weights": True,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "qalora_group_size": 16,
        "bias": "none",
        "use_qalora": False,
        "ensure_weight_tying": False,
    }
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def written_targets(
    config: LoRAConfig, names: Sequence[str], module_names: Collection[str] | None
) -> tuple[str | list[str], str | list[str] | None, list[int] | None]:
    """target_modules, exclude_modules and layers_to_transform so that PEFT adapts exactly `names`.

    Names and a regular expression are written as they were given: PEFT reads them as we do. `all-linear` would depend
    on the reader's idea of it, so it becomes a list: last parts of the paths if these pick nothing else among
    `module_names`, whole paths otherwise.
    """
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        exclude = config.exclude_modules
        return (
            targets if isinstance(targets, str) else sorted(targets),
            exclude if isinstance(exclude, str) and exclude else sorted(exclude) or None,
            None if config.layers_to_transform is None else sorted(config.layers_to_transform),
        )
    ends = sorted({name.rpartition(".")[2] for name in names})
    if module_names is not None:
        shortest = LoRAConfig(target_modules=tuple(ends), modules_to_save=config.modules_to_save)
        picked = resolve_targets(shortest, list(module_names))
        exact = {target.name for target in picked} == set(names)
    else:
        exact = not config.exclude_modules and config.layers_to_transform is None
    return (ends if exact else sorted(names)), None, None


def written_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """rank_pattern or alpha_pattern with keys of which exactly one matches each module that differs from `default`.

    A last path part that has the same value wherever it occurs is a key by itself, such as `q_proj`; any other module
    is written with its whole path behind `^`. So the order of keys, which a reader may lose, means nothing.
    """
    by_end: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_end.setdefault(name.rpartition(".")[2], set()).add(value)
    pattern = {}
    for name, value in values.items():
        if value == default:
            continue
        end = name.rpartition(".")[2]
        key = re.escape(end) if len(by_end[end]) == 1 else "^" + re.escape(name)
        pattern[key] = value
    return pattern


def _number(value: float) -> float:
    """An integer where the value is one: Ollama reads lora_alpha as an unsigned integer."""
    return int(value) if float(value).is_integer() else float(value)
