"""A config read field by field, so that in the end every field has been asked for or is reported."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.decoder.family import DeltaSizes

UNREAD = "unread of the GGUF file"
"""Field of a config made from a GGUF file: metadata and tensors, by name, that are not understood."""
FOREIGN = "foreign in the GGUF file"
"""Field of a config made from a GGUF file: names of metadata that no model has."""


class UnsupportedModel(ArtifactError):
    """A model that the decoder engine does not compute exactly; transformers may still be able to run it.

    Attributes:
        model_type: as the config states it.
        problems: one `field = value: reason` for everything that stands in the way.
        remedy: what would make the engine take the model; one sentence without a full stop.
    """

    def __init__(
        self, model_type: str, problems: Collection[str], *, remedy: str | None = None, next_step: str | None = None
    ) -> None:
        self.model_type = model_type
        self.problems = tuple(problems)
        self.remedy = remedy or "Which models it takes stands in docs/models.md"
        super().__init__(
            f"the decoder engine does not know how to compute this {model_type} model",
            where="config.json",
            why="; ".join(self.problems),
            next_step=next_step or "use --engine transformers (or auto), which runs whatever transformers can load",
        )


class ConfigFields:
    """The fields of a config, read by name and type.

    A field that is absent has the default of transformers' configuration class. A value of another kind than is asked
    for, or none without a default, raises ArtifactError. An unread field is a problem if transformers might read it,
    and foreign if not.

    Args:
        model_type: whose configuration class decides, None for a mapping that belongs to no class.

    Attributes:
        problems: one line for everything that stands in the way.
        foreign: names of fields that are read neither here nor in transformers.
    """

    def __init__(self, config: Mapping[str, object], model_type: str | None = None) -> None:
        self._config = config
        self._model_type = model_type
        self._prefix = ""
        self._seen: set[str] = set()
        self.problems: list[str] = []
        self.foreign: list[str] = []

    def value(self, key: str) -> object:
        """The raw value, None if absent."""
        self._seen.add(key)
        return self._config.get(key)

    def stated(self, key: str) -> bool:
        """Whether the field is there, null or not."""
        return key in self._config

    def assume(self, key: str, value: object) -> None:
        """Take this value where the field is absent or null."""
        if self._config.get(key) is None:
            self._config = {**self._config, key: value}

    def put(self, key: str, value: object) -> None:
        """Take this value whatever the field says."""
        self._config = {**self._config, key: value}

    def or_declared(self, key: str) -> object:
        """The raw value; the class's default where the field is absent."""
        if self.stated(key) or self._model_type is None:
            return self.value(key)
        known = config_class(self._model_type)
        return None if known is None else known.fields.get(key)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer; where it is absent the class's default, or `default` if it has none or the field is null."""
        value = self._or_default(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; where it is absent or null, as for `integer`."""
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        value = self.value(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or any(isinstance(item, bool) or not isinstance(item, int | float) or not item > 0 for item in value)
        ):
            raise self._wrong(key, value, f"a list of {count} positive numbers")
        return tuple(float(item) for item in value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._or_default(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._or_default(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def mapping(self, key: str) -> ConfigFields | None:
        """A mapping inside this one, None if absent or null; its problems are collected here."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a mapping")
        inside = ConfigFields(value)
        inside._prefix, inside.problems, inside.foreign = f"{self._prefix}{key}.", self.problems, self.foreign
        return inside

    def must_equal(self, key: str, *allowed: object, reason: str | None = None) -> None:
        """Report the field unless it is absent, null, or one of the values for which the engine computes the same."""
        value = self.value(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(item) for item in allowed) if allowed else "null"
            self.problem(key, reason or f"the engine has {known}")

    def neutral(self, *keys: str) -> None:
        """Fields that do not change what the model computes."""
        self._seen.update(keys)

    def problem(self, key: str, reason: str) -> None:
        """Report a field."""
        self.problems.append(f"{self._prefix}{key} = {_shown(self.value(key))}: {reason}")

    def take_unread(self) -> None:
        """Report what a GGUF file's reader has left, and note what is foreign there."""
        unread, foreign = self.value(UNREAD), self.value(FOREIGN)
        if isinstance(unread, Mapping):
            self.problems += [f"{name} = {_shown(value)}: unknown to the engine" for name, value in unread.items()]
        if isinstance(foreign, list):
            self.foreign += [str(name) for name in foreign]

    def left(self) -> list[str]:
        """Names of what was not asked for and is not null."""
        return [key for key in self._config if key not in self._seen and self._config[key] is not None]

    def close(self, read: Collection[str] = ()) -> None:
        """Sort what was not asked for and is not null: a problem where transformers might read it, else foreign.

        Args:
            read: names that transformers reads, beside those of the configuration class.
        """
        left = self.left()
        if not left:
            return
        known = None if self._model_type is None else config_class(self._model_type)
        for key in left:
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
    """The gated delta rule's heads, widths and taps; where the fields are absent the class's defaults.

    Raises:
        ArtifactError: a value is no positive integer, or key heads cannot serve equally many value heads.
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


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class ConfigClass:
    """What transformers itself takes from a config: the fields of its class, and what it reads beside them.

    A config.json may hold anything. transformers sets what its configuration class does not declare as an attribute of
    that name, which nothing reads, so that it cannot change what is computed. Exceptions are names that transformers'
    common code looks for in every config (`READ_BESIDE_FIELDS`), aliases of fields (`attribute_map`) and attributes of
    the class. Tests watch every attribute that transformers reads while it makes and runs a model of each family, so
    that a new version of it shows there what is not classed yet.
    """

    fields: Mapping[str, object]  # every declared field with its default; None where it has none that JSON can say
    others: frozenset[str]  # further names that mean something to transformers

    def reads(self, key: str) -> bool:
        """Whether a config's field of this name can matter to transformers."""
        return key in self.fields or key in self.others


READ_BESIDE_FIELDS = frozenset({
    # Set on a config by name, and read by the code that all models share.
    "attention_chunk_size", "compression_config", "default_rope_type", "default_theta", "gradient_checkpointing",
    "head_dim", "is_causal", "kv_sharing_modes", "layer_types", "mtp_layer_types", "original_max_position_embeddings",
    "partial_rotary_factor", "per_layer_config", "quantization_config", "rope_local_base_freq", "rope_scaling",
    "rope_theta", "sliding_window", "sliding_window_pattern", "vision_aspect_ratio", "vision_feature_layer",
    "vision_feature_select_strategy", "number_of_conv_states", "output_router_logits",
    # Where a model inside another would be.
    "decoder", "generator", "text_config",
    # Implementations.
    "_attn_implementation", "_experts_implementation", "_heterogeneity_spec", "_rope_type_labels",
    "attn_implementation", "experts_implementation",
})  # fmt: skip


@cache
def config_class(model_type: str) -> ConfigClass | None:
    """The class of the installed transformers, None where it has none of this type; imports transformers."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        found: Any = CONFIG_MAPPING[model_type]
    except KeyError:
        return None
    parameters = {**inspect.signature(PreTrainedConfig).parameters, **inspect.signature(found).parameters}
    # Neither `self` nor a catch-all has a default.
    fields = {name: _plain(entry.default) for name, entry in parameters.items() if entry.default is not entry.empty}
    attributes = {name for name in dir(found) if not name.startswith("__")}
    return ConfigClass(fields, frozenset({*READ_BESIDE_FIELDS, *found.attribute_map, *attributes}))


def _plain(default: object) -> object:
    return default if isinstance(default, bool | int | float | str) else None
