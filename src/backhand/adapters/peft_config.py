"""PEFT's adapter_config.json: read strictly into our configuration; `peft_config_writer` writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backhand.adapters.config import (
    ALL_LINEAR,
    LoRAConfig,
    check_alpha,
    check_dropout,
    check_modules,
    check_rank,
    check_tokens,
)
from backhand.adapters.peft_fields import HARMLESS_INITS, PEFT_FIELDS
from backhand.errors import UsageError


@dataclass(frozen=True)
class PEFTConfig:
    """What an adapter_config.json says.

    Attributes:
        config: the adapter itself.
        base_model: `base_model_name_or_path`: a hub id or a path.
        task_type: `CAUSAL_LM` and the like, or None.
        revision: of the base model on the hub, or None.
        fan_in_fan_out: whether the adapted modules are GPT-2's Conv1D.
        notes: what was read over and may interest a person.
    """

    config: LoRAConfig
    base_model: str | None = None
    task_type: str | None = None
    revision: str | None = None
    fan_in_fan_out: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)


def read_peft_config(raw: Mapping[str, Any]) -> tuple[PEFTConfig, list[str]]:
    """Our configuration from the object in adapter_config.json, and every problem in it.

    Nothing that the object names is imported or opened.

    Returns:
        the configuration, with defaults where a field is unusable, and a sentence for each problem; the configuration
        describes the adapter only if there is none.
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
    read = _Reader(raw, problems)
    config = LoRAConfig(
        rank=read.value("r", check_rank, 8),
        alpha=read.value("lora_alpha", check_alpha, 8),
        dropout=float(read.value("lora_dropout", check_dropout, 0.0)),
        target_modules=read.modules("target_modules", required=True),
        exclude_modules=read.modules("exclude_modules", required=False),
        rank_pattern=read.pattern("rank_pattern", check_rank),
        alpha_pattern=read.pattern("alpha_pattern", check_alpha),
        use_rslora=read.boolean("use_rslora"),
        use_dora=read.boolean("use_dora"),
        lora_bias=read.boolean("lora_bias"),
        modules_to_save=read.names("modules_to_save"),
        trainable_token_indices=read.tokens("trainable_token_indices"),
        layers_to_transform=read.layers(),
        layers_pattern=read.layers_pattern(),
    )
    if not problems:
        try:
            config.validate()
        except UsageError as error:
            problems.append(error.one_line)
    described = PEFTConfig(
        config,
        base_model=read.text("base_model_name_or_path"),
        task_type=read.text("task_type"),
        revision=read.text("revision"),
        fan_in_fan_out=read.boolean("fan_in_fan_out"),
        notes=tuple(notes),
    )
    return described, problems


def _judge_fields(raw: Mapping[str, Any], problems: list[str]) -> list[str]:
    """Notes on fields that are read over; problems for fields that change what the adapter computes."""
    notes = []
    for name, value in raw.items():
        rule = PEFT_FIELDS.get(name)
        if rule is None:
            if value in (None, False, "", [], {}):
                notes.append(f"{name}: unknown, and off")
            else:
                problems.append(f"{name}: unknown, and set to {_short(value)}; a newer PEFT may have written it")
        elif rule.treatment == "refused" and not any(value is off or value == off for off in rule.off):
            problems.append(f"{name}: {_short(value)} is not supported ({rule.reason})")
    return notes


class _Reader:
    """Takes single fields, and notes a problem in place of raising."""

    def __init__(self, raw: Mapping[str, Any], problems: list[str]) -> None:
        self.raw = raw
        self.problems = problems

    def value(self, name: str, check: Callable[[str, object], None], default: Any) -> Any:
        value = self.raw.get(name, default)
        return value if self._holds(name, value, check) else default

    def _holds(self, name: str, value: object, check: Callable[[str, object], None]) -> bool:
        try:
            check(name, value)
        except UsageError as error:
            self.problems.append(error.one_line)
            return False
        return True

    def modules(self, name: str, *, required: bool) -> str | tuple[str, ...]:
        value = self.raw.get(name)
        if value is None and not required:
            return ()
        if not value:
            self.problems.append(f"{name}: {value!r} names no module")
            return ALL_LINEAR
        if not self._holds(name, value, check_modules):
            return ALL_LINEAR
        return value if isinstance(value, str) else tuple(value)

    def pattern(self, name: str, check: Callable[[str, object], None]) -> dict[str, Any]:
        value = self.raw.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{name}: {_short(value)} is not a map of names to numbers")
            return {}
        return {key: number for key, number in value.items() if self._holds(f"{name}[{key!r}]", number, check)}

    def boolean(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if not isinstance(value, bool):
            self.problems.append(f"{name}: {_short(value)} is neither true nor false")
        return value is True

    def text(self, name: str) -> str | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            self.problems.append(f"{name}: {_short(value)} is not a string")
            return None
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        if not value:
            return ()
        if isinstance(value, str):
            self.problems.append(f"{name}: {_short(value)} is not a list of names")
            return ()
        return tuple(value) if self._holds(name, value, check_modules) else ()

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        if isinstance(value, dict) and len(value) == 1:
            # By the name of the embedding; that it is the input one, the tensors' names show.
            (value,) = value.values()
        if not value:
            return ()
        if isinstance(value, dict):
            self.problems.append(f"{name}: rows of {len(value)} modules are trained, only the input embedding's can be")
            return ()
        return tuple(value) if self._holds(name, value, check_tokens) else ()

    def layers(self) -> tuple[int, ...] | None:
        value = self.raw.get("layers_to_transform")
        if value is None or value == []:
            return None
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            self.problems.append(f"layers_to_transform: {_short(value)} is not a list of layer numbers")
            return None
        return tuple(numbers)

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.raw.get("layers_pattern")
        if not value or self.raw.get("layers_to_transform") in (None, []):
            return ()
        names = [value] if isinstance(value, str) else value
        if not self._holds("layers_pattern", names, check_modules):
            return ()
        return tuple(names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
