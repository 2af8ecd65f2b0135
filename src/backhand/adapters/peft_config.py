"""PEFT's adapter_config.json: read strictly into our configuration, and written in one canonical form."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backhand.adapters.config import ALL_LINEAR, LoRAConfig
from backhand.adapters.targets import Target, resolve_targets, targeted_parameters
from backhand.bounds import Text, check_value, hints_of
from backhand.errors import UsageError
from backhand.words import shorten


@dataclass(frozen=True)
class PEFTConfig:
    """Contents of an adapter_config.json."""

    config: LoRAConfig
    base_model: str | None = None  # `base_model_name_or_path`: a hub id or a path
    task_type: str | None = None  # `CAUSAL_LM` and the like, or None
    revision: str | None = None  # of the base model on the hub, or None
    fan_in_fan_out: bool = False  # True if the adapted modules are GPT-2's Conv1D
    notes: tuple[str, ...] = field(default=(), compare=False)


_REFUSED_OUTPUTS = ("falcon_h1", "nemotron_h")
"""Model types that are trained by hand, and whose modules named `out_proj` PEFT refuses to adapt."""


def peft_notes(model_type: object, modules: Collection[str]) -> tuple[str, ...]:
    """Return a note if PEFT refuses an adapter of these modules.

    Fused kernels read the weight of `out_proj` without its factors. PEFT refuses the module by the type of the model,
    also where no such kernel runs.
    """
    refused = [name for name in modules if name.rpartition(".")[2] == "out_proj"]
    if model_type not in _REFUSED_OUTPUTS or not refused:
        return ()
    remedy = "for one that PEFT loads, add --exclude-modules out_proj, or merge"
    return (f"PEFT refuses an adapter of out_proj in {model_type} models: {remedy}",)


def read_peft_config(raw: Mapping[str, Any]) -> tuple[PEFTConfig, list[str]]:
    """Convert the object in adapter_config.json into our configuration.

    Nothing that the object names is imported or opened.

    Returns:
        the configuration, with defaults for unusable fields, and a sentence per problem. The configuration describes
        the adapter only if there is no problem.
    """
    problems: list[str] = []
    notes = _judge_fields(raw, problems)
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type: {raw.get('peft_type')!r} is not 'LORA'")
    if raw.get("init_lora_weights", True) not in HARMLESS_INITS:
        problems.append(
            f"init_lora_weights: {raw['init_lora_weights']!r} changed the base model; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion to make it an ordinary one"
        )
    config = LoRAConfig(**_values(raw, problems))
    if not problems:
        try:
            config.validate()
        except UsageError as error:
            problems.append(error.one_line)
    described = PEFTConfig(
        config,
        base_model=_checked("base_model_name_or_path", raw.get("base_model_name_or_path"), Text | None, problems),
        task_type=_checked("task_type", raw.get("task_type"), Text | None, problems),
        revision=_checked("revision", raw.get("revision"), Text | None, problems),
        fan_in_fan_out=bool(_checked("fan_in_fan_out", raw.get("fan_in_fan_out", False), bool, problems)),
        notes=tuple(notes),
    )
    return described, problems


def _judge_fields(raw: Mapping[str, Any], problems: list[str]) -> list[str]:
    """Return notes on ignored fields, and add problems for fields that change what the adapter computes."""
    notes = []
    for name, value in raw.items():
        switched_off: tuple[Any, ...] = ("none", None) if name == "bias" else (None, False, "", [], {})
        if name not in PEFT_FIELDS:
            if value in (None, False, "", [], {}):
                notes.append(f"{name}: unknown, and off")
            else:
                problems.append(f"{name}: unknown, and set to {_short(value)}; a newer PEFT may have written it")
        elif name in REFUSED and not any(value is off or value == off for off in switched_off):
            problems.append(f"{name}: {_short(value)} is not supported ({REFUSED[name]})")
    return notes


_OURS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"} | {
    name: name
    for name in (
        *("target_modules", "target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layers_to_transform"),
        "layers_pattern",
    )
}
"""PEFT's fields and ours with the same meaning, and except for rank and alpha with the same default."""
_NEVER_NULL = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias")


def _values(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the usable values of `LoRAConfig` by its names. Absent fields keep their defaults."""
    stated = {"r": 8, "lora_alpha": 8, **raw}
    values: dict[str, Any] = {}
    if not stated.get("target_modules"):
        values["target_modules"] = ()
        if not stated.get("target_parameters"):
            problems.append(f"target_modules: {stated.get('target_modules')!r} names no module")
    if stated.get("layers_to_transform") in (None, []):
        stated.pop("layers_pattern", None)
    hints = hints_of(LoRAConfig)
    for name, ours in _OURS.items():
        value = _one_form(name, stated.get(name))
        if name in stated and (name in _NEVER_NULL or value not in (None, "", [], {})):
            value = _checked(name, value, hints[ours], problems)
            values |= {} if value is None else {ours: value}
    if "dropout" in values:
        values["dropout"] = float(values["dropout"])
    return values


def _one_form(name: str, value: Any) -> Any:
    """Return a value in one of the forms in which PEFT writes it."""
    if name == "trainable_token_indices" and isinstance(value, dict) and len(value) == 1:
        # The key is the embedding's name; the tensors' names show that it is the input embedding.
        return next(iter(value.values()))
    is_single = name in ("layers_to_transform", "layers_pattern") and isinstance(value, int | str)
    return [value] if is_single else value


def _checked(name: str, value: Any, hint: Any, problems: list[str]) -> Any:
    """Return the value of a field, None if it does not have the type, which is a problem."""
    try:
        check_value(name, value, hint)
    except UsageError as error:
        problems.append(error.one_line)
        return None
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    return shorten(repr(value))


def peft_config_bytes(described: PEFTConfig, targets: Sequence[Target], module_names: Collection[str] | None) -> bytes:
    """Return adapter_config.json in canonical form: the same adapter gives the same bytes.

    Args:
        module_names: all modules of the model, if known; `all-linear` is then written as the shortest list of names
            that selects exactly the adapted modules.
    """
    config = described.config
    parameters = set(targeted_parameters(config, [target.name for target in targets]))
    names = [target.name for target in targets if target.name not in parameters]
    modules, exclude, layers = written_targets(config, names, module_names)
    fields: dict[str, Any] = {name: None for name in PEFT_FIELDS if name != "runtime_config"}
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
        "target_parameters": sorted(config.target_parameters) or None,
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
    """Return target_modules, exclude_modules and layers_to_transform with which PEFT adapts exactly `names`.

    Names and a regular expression are written as given, since PEFT interprets them in the same way. Modules that only
    transformers computes are excluded (`ModuleShapes.outside`). `all-linear` has no
    common definition, and becomes a list: of module names without their path if these select nothing else among
    `module_names`, of full paths otherwise.
    """
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return (
            targets if isinstance(targets, str) else sorted(targets),
            _written_exclusion(config, names, module_names or ()),
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


def _written_exclusion(
    config: LoRAConfig, names: Sequence[str], module_names: Collection[str]
) -> str | list[str] | None:
    """Return exclude_modules, with the modules that `config` selects among `module_names` in addition to `names`."""
    exclude, adapted = config.exclude_modules, set(names)
    picked = resolve_targets(config, list(module_names), strict=False) if adapted & set(module_names) else []
    others = [target.name for target in picked if target.name not in adapted]
    if isinstance(exclude, str) and exclude:
        return "|".join((f"(?:{exclude})", *map(re.escape, others))) if others else exclude
    return sorted((*exclude, *others)) or None


def written_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return rank_pattern or alpha_pattern, in which exactly one key matches each module that differs from `default`.

    A last path part with the same value wherever it occurs is a key by itself, such as `q_proj`. Any other module is
    written as `^` and its full path. The order of keys, which a reader may not preserve, therefore has no effect.
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
    """Return an integer if the value is one, since Ollama reads lora_alpha as an unsigned integer."""
    return int(value) if float(value).is_integer() else float(value)


# The fields of PEFT's LoraConfig (0.21.2) by their treatment; a test compares these with PEFT's list of fields.

FORMAT_VERSION = "0.21.2"
"""The PEFT release whose format is written, recorded as peft_version in the file."""

HANDLED = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "exclude_modules", "target_parameters", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora",
    "lora_bias", "modules_to_save", "trainable_token_indices", "layers_to_transform", "layers_pattern",
    # Written for GPT-2's Conv1D; on reading, the module determines the layout of its weight.
    "fan_in_fan_out",
    # Ignored unless it names a method that changed the base model.
    "init_lora_weights",
)  # fmt: skip
"""Fields that are read into our configuration, or preserved and written again."""

NEUTRAL = (
    # These concern trainability, the writer of the file, and how PEFT runs, not what it computes.
    "inference_mode", "peft_version", "runtime_config",
    # Names of modules to import, which is never done.
    "auto_mapping", "megatron_core",
    # These concern initialisation that leaves the base model unchanged, or are only read with use_qalora.
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
)  # fmt: skip
"""Fields that do not change what the trained adapter computes; ignored at any value."""

REFUSED: Mapping[str, str] = {
    "bias": "trained biases of the base model",
    "layer_replication": "repeats layers of the base model",
    "megatron_config": "modules of Megatron, split over processes",
    "alora_invocation_tokens": "the adapter applies only after certain tokens",
    "use_qalora": "pools the input before lora_A",
    "use_bdlora": "factors are block-diagonal",
    "arrow_config": "routes between several adapters",
    "kasa_config": "truncates the base weight and adds a diagonal between the factors",
    "monteclora_config": "samples the factors",
    "velora_config": "stores the compression of activations in training in addition to the factors",
    "ensure_weight_tying": "shares factors between tied modules",
}
"""Fields that change what the adapter computes in an unsupported way, with the reason; an error unless switched off."""

PEFT_FIELDS = (*HANDLED, *NEUTRAL, *REFUSED)

HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that do not change the base model."""
