"""A model config read field by field, so that every field is either used or reported."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.families.family import DeltaSizes, SSMSizes

UNREAD = "unread of the GGUF file"
"""Field of a config made from a GGUF file: metadata and tensors, by name, that the reader does not understand."""
HEADLESS = "files without a head"
"""Field of the config of files that hold a decoder without its head, which the config does not tie to the embedding."""
FOREIGN = "foreign in the GGUF file"
"""Field of a config made from a GGUF file: names of metadata that no model has."""


class UnsupportedModel(ArtifactError):
    """A model that the decoder engine does not compute exactly. transformers may still be able to run it.

    Attributes:
        model_type: from the config.
        problems: one `field = value: reason` for every obstacle.
        remedy: a change with which the engine would take the model, as one sentence without a full stop.
    """

    def __init__(
        self, model_type: str, problems: Collection[str], *, remedy: str | None = None, next_step: str | None = None
    ) -> None:
        self.model_type = model_type
        self.problems = tuple(problems)
        self.remedy = remedy or "docs/models.md lists the models that it takes"
        super().__init__(
            f"the decoder engine does not know how to compute this {model_type} model",
            where="config.json",
            why="; ".join(self.problems),
            next_step=next_step or "use --engine transformers (or auto), which runs whatever transformers can load",
        )


class ConfigFields:
    """Fields of a config, read by name and type.

    An absent field has the default of transformers' configuration class. A value of another type, or an absent field
    without a default, raises ArtifactError. An unread field is a problem if transformers might read it, else it is
    foreign.

    Args:
        model_type: selects the configuration class; None for a mapping that belongs to no class.

    Attributes:
        problems: one line for every obstacle.
        foreign: names of fields that neither the engine nor transformers reads.
    """

    def __init__(self, config: Mapping[str, object], model_type: str | None = None) -> None:
        self._config = config
        self._model_type = model_type
        self._prefix = ""
        self._seen: set[str] = set()
        self.problems: list[str] = []
        self.foreign: list[str] = []

    def value(self, key: str) -> object:
        """Return the raw value, None if absent."""
        self._seen.add(key)
        return self._config.get(key)

    def stated(self, key: str) -> bool:
        """Return True if the field exists, also if it is null."""
        return key in self._config

    def put(self, key: str, value: object) -> None:
        """Override the field with this value."""
        self._config = {**self._config, key: value}

    def or_declared(self, key: str) -> object:
        """Return the raw value, or the class default if the field is absent."""
        if self.stated(key) or self._model_type is None:
            return self.value(key)
        known = config_class(self._model_type)
        return None if known is None else known.fields.get(key)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return an integer.

        If the field is absent, use the class default; without one, or if it is null, use `default`.
        """
        value = self._or_default(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number, with the defaults of `integer`."""
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of `count` positive numbers."""
        value = self.value(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or any(isinstance(item, bool) or not isinstance(item, int | float) or not item > 0 for item in value)
        ):
            raise self._wrong(key, value, f"a list of {count} positive numbers")
        return tuple(float(item) for item in value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._or_default(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self._or_default(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def mapping(self, key: str) -> ConfigFields | None:
        """Return a nested mapping, None if absent or null. Its problems are collected in this object."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a mapping")
        inside = ConfigFields(value)
        inside._prefix, inside.problems, inside.foreign = f"{self._prefix}{key}.", self.problems, self.foreign
        return inside

    def must_equal(self, key: str, *allowed: object, reason: str | None = None) -> None:
        """Report the field unless it is absent, null, or one of the values that the engine computes."""
        value = self.value(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(item) for item in allowed) if allowed else "null"
            self.problem(key, reason or f"the engine has {known}")

    def neutral(self, *keys: str) -> None:
        """Mark fields as read that do not change the model's output."""
        self._seen.update(keys)

    def problem(self, key: str, reason: str) -> None:
        """Report a field."""
        self.problems.append(f"{self._prefix}{key} = {_shown(self.value(key))}: {reason}")

    def take_unread(self) -> None:
        """Report the fields that the reader of a GGUF file left unread, and collect the foreign ones."""
        unread, foreign = self.value(UNREAD), self.value(FOREIGN)
        if isinstance(unread, Mapping):
            self.problems += [f"{name} = {_shown(value)}: unknown to the engine" for name, value in unread.items()]
        if isinstance(foreign, list):
            self.foreign += [str(name) for name in foreign]

    def unread(self) -> list[str]:
        """Return the names of fields that are not null and have not been read."""
        return [key for key in self._config if key not in self._seen and self._config[key] is not None]

    def close(self, read: Collection[str] = ()) -> None:
        """Classify the unread fields that are not null: a problem if transformers might read the field, else foreign.

        Args:
            read: names that transformers reads in addition to the fields of the configuration class.
        """
        unread = self.unread()
        if not unread:
            return
        known = None if self._model_type is None else config_class(self._model_type)
        for key in unread:
            if key in read or (known is None and self._model_type) or (known is not None and known.reads(key)):
                self.problem(key, "transformers reads this field, and the engine does not")
            else:
                self.foreign.append(f"{self._prefix}{key}")

    def _or_default(self, key: str, default: object) -> object:
        value = self.value(key)
        value = self.or_declared(key) if value is None else value
        if value is not None:
            return value
        if default is None:
            raise ArtifactError(
                f"the field {self._prefix}{key} is missing", where="config.json", next_step="fetch the model again"
            )
        return default

    def _wrong(self, key: str, value: object, expected: str) -> ArtifactError:
        return ArtifactError(
            f"{self._prefix}{key} = {_shown(value)} is not {expected}",
            where="config.json",
            next_step="fetch the model again",
        )


def delta_sizes(fields: ConfigFields) -> DeltaSizes:
    """Read heads, widths and taps of the gated delta rule. Absent fields have the class defaults.

    Raises:
        ArtifactError: a value is not a positive integer, or the value heads are not a multiple of the key heads.
    """
    names = "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"
    sizes = DeltaSizes(*(fields.integer(f"linear_{name}") for name in names))
    if sizes.value_heads % sizes.key_heads:
        raise ArtifactError(
            f"{sizes.value_heads} value heads cannot share {sizes.key_heads} key heads",
            where="config.json",
            next_step="fetch the model again",
        )
    return sizes


def ssm_sizes(fields: ConfigFields, stated_width: int | None = None) -> SSMSizes:
    """Read the sizes of Mamba-2 layers. Absent fields have the class defaults.

    Args:
        stated_width: features of all heads together; None for `mamba_expand` times the hidden size.

    Raises:
        ArtifactError: a value is not a positive integer, the heads are not a multiple of the groups, or they do not
            have the width together.
    """
    heads, groups = fields.integer("mamba_n_heads"), fields.integer("mamba_n_groups")
    expanded = fields.integer("mamba_expand") * fields.integer("hidden_size")
    width = expanded if stated_width is None else stated_width
    stated = fields.or_declared("mamba_d_head")
    head_width = width // heads if stated == "auto" else fields.integer("mamba_d_head")
    if heads % groups or head_width * heads != width:
        raise ArtifactError(
            f"{heads} Mamba heads of {head_width} in {groups} groups do not fit a width of {width}",
            where="config.json",
            next_step="fetch the model again",
        )
    return SSMSizes(
        heads,
        head_width,
        groups,
        fields.integer("mamba_d_state"),
        fields.integer("mamba_d_conv"),
        conv_bias=fields.flag("mamba_conv_bias", True),
        bias=fields.flag("mamba_proj_bias", False),
        time_steps=_time_steps(fields),
    )


def _time_steps(fields: ConfigFields) -> tuple[float, float] | None:
    """Return the limits of the time step, or None if they allow every step.

    JSON has no infinity: transformers 5 writes it as `{"__float__": "Infinity"}`, older versions as the word.
    """
    stated = fields.value("time_step_limit")
    if stated is None:
        return None
    limits = [inf if one == {"__float__": "Infinity"} else one for one in stated] if isinstance(stated, list) else []
    numbers = [float(one) for one in limits if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) != 2 or len(limits) != 2 or not 0 <= numbers[0] <= numbers[1]:
        raise ArtifactError(
            f"time_step_limit = {_shown(stated)} is not a lowest and a highest time step",
            where="config.json",
            next_step="fetch the model again",
        )
    return None if numbers == [0.0, inf] else (numbers[0], numbers[1])


def token_ids(stated: object) -> list[int]:
    """Return the ids in an `eos_token_id` value: an integer, a list of integers, or None.

    Raises:
        ArtifactError: if the value is anything else.
    """
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise ArtifactError(
            f"eos_token_id = {stated!r} is neither a token id nor a list of them",
            where="config.json or generation_config.json",
            next_step="write the id of the token that ends a text there, or remove the key",
        )
    return list(ids)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class ConfigClass:
    """Fields that transformers reads from a config.

    A config.json may contain anything. transformers sets undeclared fields as attributes of the config object, which
    nothing reads, so they cannot change the result. There are three exceptions: names that transformers' common code
    looks up in every config (`READ_OUTSIDE_CLASS`), aliases of fields (`attribute_map`) and attributes of the class.
    Tests record every attribute that transformers reads while it builds and runs a model of each family. A new version
    of transformers that reads an unclassified name fails there.
    """

    fields: Mapping[str, object]  # every declared field with its default; None if JSON cannot express the default
    others: frozenset[str]  # further names that transformers reads

    def reads(self, key: str) -> bool:
        """Return True if a config field of this name can matter to transformers."""
        return key in self.fields or key in self.others


READ_OUTSIDE_CLASS = frozenset({
    # Set on a config by name, and read by the code that all models share.
    "attention_chunk_size", "compression_config", "default_rope_type", "default_theta", "gradient_checkpointing",
    "head_dim", "is_causal", "kv_sharing_modes", "layer_types", "mtp_layer_types", "original_max_position_embeddings",
    "partial_rotary_factor", "per_layer_config", "quantization_config", "rope_local_base_freq", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "sliding_window_pattern", "vision_aspect_ratio",
    "vision_feature_layer", "vision_feature_select_strategy", "number_of_conv_states", "output_router_logits",
    # Nested models.
    "decoder", "generator", "text_config",
    # Implementations.
    "_attn_implementation", "_experts_implementation", "_heterogeneity_spec", "_rope_type_labels",
    "attn_implementation", "experts_implementation",
})  # fmt: skip


@cache
def config_class(model_type: str) -> ConfigClass | None:
    """Return the configuration class of the installed transformers, or None. Imports transformers."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config_type: Any = CONFIG_MAPPING[model_type]
    except KeyError:
        return None
    parameters = {**inspect.signature(PreTrainedConfig).parameters, **inspect.signature(config_type).parameters}
    # Neither `self` nor a catch-all has a default.
    fields = {name: _plain(entry.default) for name, entry in parameters.items() if entry.default is not entry.empty}
    attributes = {name for name in dir(config_type) if not name.startswith("__")}
    return ConfigClass(fields, frozenset({*READ_OUTSIDE_CLASS, *config_type.attribute_map, *attributes}))


def _plain(default: object) -> object:
    return default if isinstance(default, bool | int | float | str) else None
