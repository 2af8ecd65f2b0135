"""Rotary parameters, read from a Hugging Face config of transformers 5 or older.

transformers 5 has them in `rope_parameters`, which is one rule, or one rule per kind of layer (Gemma 3 and 4, OLMo 3).
Older configs have the base and the scaling in two fields. Both are brought into the same form, one rule per kind. The
readers raise ArtifactError for a value that is not a number, or a list whose length is not the number of rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from backhand.nn.families.config_fields import ConfigFields
from backhand.nn.families.family import QueryScaling, RotaryConfig
from backhand.nn.families.rotary_frequencies import yarn_length

SCALING_RULES = ("default", "linear", "llama3", "longrope", "proportional", "yarn")
"""Values of `rope_type` that `inverse_frequencies` computes."""

FULL = "full_attention"
SLIDING = "sliding_attention"
_READ_BY_A_RULE = (
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
    "mscale", "mscale_all_dim", "truncate", "mrope_section",
)  # fmt: skip
"""Fields that some `rope_type` of transformers reads."""
BETA_FAST, BETA_SLOW = 32.0, 1.0
_NONE: Mapping[str, Any] = MappingProxyType({})
_LENGTH = "original_max_position_embeddings"


def rotary(
    fields: ConfigFields,
    head_dim: int,
    max_position_embeddings: int,
    *,
    theta: Mapping[str, tuple[str, float]] = MappingProxyType({FULL: ("rope_theta", 10_000.0)}),
    absent: Mapping[str, Mapping[str, Any]] = _NONE,
    older: bool = True,
    share: float | None = None,
    older_names: Mapping[str, str] = _NONE,
    read_elsewhere: Sequence[str] = (),
    interleaved: bool = False,
) -> tuple[RotaryConfig, ...]:
    """Read one set of angles for all layers, or one set per kind of layer.

    Args:
        max_position_embeddings: longest document in tokens.
        theta: kinds of layers, each with the name of its base in older configs and with the default. One kind applies
            to all layers.
        absent: rule of a kind for which the config has none; the default rule if it is not here.
        older: configs with older names exist. They scale the first kind only.
        share: default share of the features that is rotated; None if all of them must be.
        older_names: names of rules in older configs, with their current names.
        read_elsewhere: fields of the rule that another reader uses.
        interleaved: adjacent features form pairs.

    Raises:
        ArtifactError: a value is not a number, or a list does not have one entry per rotated pair.
    """
    first = next(iter(theta))
    parameters = fields.mapping("rope_parameters")
    rules = {first: parameters}
    newer = fields.value("rope_parameters")
    original_length = None
    if len(theta) > 1:
        rules = {kind: None if parameters is None else parameters.mapping(kind) for kind in theta}
        newer = None if rules[first] is None or not isinstance(newer, Mapping) else newer[first]
        if parameters is not None:
            parameters.close(_READ_BY_A_RULE)  # one rule for all layers would be another model
    # Phi-3 has it here. transformers prefers it to the one inside the rule.
    elif fields.value(_LENGTH) is not None or fields.or_declared(_LENGTH) is not None:
        original_length = fields.integer(_LENGTH)
    bases = {kind: fields.number(key, base) if older else base for kind, (key, base) in theta.items()}
    if older and share is None:
        fields.must_equal("partial_rotary_factor", 1.0)
    elif share is not None:
        share = fields.number("partial_rotary_factor", share)
    if older and (scaling := fields.mapping("rope_scaling")):
        if newer and fields.value("rope_scaling") != newer:
            fields.problem("rope_scaling", "rope_parameters is set too, to another value")
        rules[first] = scaling
    sets = []
    for kind, stated in rules.items():
        rule = stated or ConfigFields(absent.get(kind, _NONE))
        rule.neutral(*read_elsewhere)
        if len(rules) > 1:
            rule.must_equal("truncate", True)  # transformers reads it next to the rules, not inside
        features = head_dim
        if share is not None:
            features = int(head_dim * rule.number("partial_rotary_factor", share))
            if features % 2 or not 0 < features <= head_dim:
                problem = f"{features} features of {head_dim} cannot be rotated in pairs"
                fields.problem("partial_rotary_factor", problem)
        elif rule.value("rope_type") != "proportional":
            rule.must_equal("partial_rotary_factor", 1.0)
        config = _rule(rule, bases[kind], original_length, features or head_dim, max_position_embeddings, older_names)
        own = None if features == head_dim else features
        sets.append(replace(config, features=own, interleaved=interleaved))
    return tuple(sets)


glm_rotary = partial(rotary, share=0.5, interleaved=True)
"""GLM: adjacent features form pairs, and half of the features are rotated by default."""

bamba_rotary = partial(rotary, share=0.5)
"""Bamba: half of the features is rotated by default."""

qwen35_rotary = partial(rotary, share=0.25, read_elsewhere=("mrope_section", "mrope_interleaved"))
"""Qwen3.5: a quarter of the features is rotated by default.

The assignment of features to image coordinates is ignored.
"""

lfm2_rotary = partial(rotary, theta={FULL: ("rope_theta", 1e6)})
gemma_rotary = partial(rotary, theta={FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)})
"""Gemma 3: angles of full and of sliding attention."""

modernbert_rotary = partial(
    rotary, theta={FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}
)
"""ModernBERT: angles of full and of sliding attention."""

olmo3_rotary = partial(rotary, theta={FULL: ("rope_theta", 5e5), SLIDING: ("", 5e5)})
"""OLMo 3: two sets of angles. In older configs `rope_theta` applies to the full layers only."""

gemma4_rotary = partial(
    rotary,
    theta={FULL: ("", 1e6), SLIDING: ("", 1e4)},
    absent={FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25}},
    older=False,
)
"""Gemma 4: a quarter of the pairs is rotated in full attention, all pairs in sliding attention."""

gpt_oss_rotary = partial(
    rotary,
    theta={FULL: ("rope_theta", 150_000.0)},
    absent={FULL: {"rope_type": "yarn", "factor": 32.0, "truncate": False, _LENGTH: 4096}},
)
"""gpt-oss: yarn with the defaults of transformers' class."""

_MINISTRAL3 = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    _LENGTH: 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Default of transformers' configuration class."""
ministral3_rotary = partial(
    rotary,
    absent={FULL: _MINISTRAL3},
    read_elsewhere=("llama_4_scaling_beta", _LENGTH, "max_position_embeddings"),
)
"""Ministral 3: one set, whose parameters also contain the fields of `query_scaling`."""


def phi3_rotary(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> tuple[RotaryConfig, ...]:
    """Phi-3: part of the features, by the default rule or by longrope, which older configs call su or yarn."""
    older = {"su": "longrope", "yarn": "longrope"}
    (config,) = rotary(fields, head_dim, max_position_embeddings, share=1.0, older_names=older)
    rule = dict(config.scaling or ()).get("rope_type", "default")
    if rule not in ("default", "longrope"):
        fields.problem("rope_parameters", f"no model of this type has {rule} angles")
    return (config,)


def query_scaling(fields: ConfigFields, config: RotaryConfig) -> QueryScaling | None:
    """Read the scaling of queries by position from the rotary parameters; None without it."""
    stated = fields.mapping("rope_scaling") or fields.mapping("rope_parameters")
    parameters = stated or ConfigFields(_MINISTRAL3)
    beta = _unless_zero(parameters, "llama_4_scaling_beta")
    if beta is None:
        return None
    length = dict(config.scaling or ()).get(_LENGTH)
    return QueryScaling(beta, length if isinstance(length, int) else parameters.integer(_LENGTH))


def _rule(
    parameters: ConfigFields,
    theta: float,
    original_length: int | None,
    head_dim: int,
    max_position_embeddings: int,
    older_names: Mapping[str, str] = _NONE,
) -> RotaryConfig:
    theta = parameters.number("rope_theta", theta)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    kind = older_names.get(kind, kind)
    scaling: tuple[tuple[str, float | int | str | tuple[float, ...]], ...] | None = None
    attention_factor = 1.0
    if kind == "linear":
        scaling = (("factor", parameters.number("factor")),)
    elif kind == "llama3":
        length = parameters.integer(_LENGTH, max_position_embeddings)
        scaling = (
            ("factor", parameters.number("factor")),
            ("low_freq_factor", parameters.number("low_freq_factor")),
            ("high_freq_factor", parameters.number("high_freq_factor")),
            (_LENGTH, original_length or length),
        )
    elif kind == "longrope":
        length = original_length or parameters.integer(_LENGTH, max_position_embeddings)
        short, long = (parameters.numbers(key, head_dim // 2) for key in ("short_factor", "long_factor"))
        scaling = (("short_factor", short),)
        if short != long:
            scaling += (("long_factor", long), (_LENGTH, length))
        attention_factor = _longrope_attention_factor(parameters, length, max_position_embeddings)
    elif kind == "yarn":
        length = original_length or parameters.integer(_LENGTH, max_position_embeddings)
        factor = parameters.number("factor", max_position_embeddings / length)
        scaling = (
            ("factor", factor),
            ("beta_fast", _unless_zero(parameters, "beta_fast") or BETA_FAST),
            ("beta_slow", _unless_zero(parameters, "beta_slow") or BETA_SLOW),
            (_LENGTH, length),
            ("truncate", parameters.flag("truncate", True)),
        )
        attention_factor = _yarn_attention_factor(parameters, factor)
        if theta == 1.0:
            parameters.problem("rope_theta", "all frequencies would be one, and yarn could not distinguish them")
    elif kind == "proportional":
        share, factor = parameters.number("partial_rotary_factor", 1.0), parameters.number("factor", 1.0)
        scaling = (("share", share), ("factor", factor))
    elif kind != "default":
        # Its parameters would only repeat the report.
        key = "rope_type" if parameters.stated("rope_type") else "type"
        parameters.problem(key, f"the engine has {', '.join(SCALING_RULES)}")
        return RotaryConfig(theta)
    parameters.close()
    return RotaryConfig(theta, None if scaling is None else (("rope_type", kind), *scaling), attention_factor)


def _unless_zero(parameters: ConfigFields, key: str) -> float | None:
    """Return a number, or None if it is absent, null or zero."""
    return parameters.number(key) if parameters.value(key) else None


def _yarn_attention_factor(parameters: ConfigFields, factor: float) -> float:
    """Return the stated factor, else 0.1 ln(factor) + 1, or the ratio of two such values if both mscales are set."""
    if parameters.value("attention_factor") is not None:
        return parameters.number("attention_factor")
    mscale, all_dims = _unless_zero(parameters, "mscale"), _unless_zero(parameters, "mscale_all_dim")
    if mscale and all_dims:
        return yarn_length(factor, mscale) / yarn_length(factor, all_dims)
    return yarn_length(factor)


def _longrope_attention_factor(parameters: ConfigFields, length: int, max_position_embeddings: int) -> float:
    """Return the stated factor, else √(1 + ln(factor) / ln(length)), with a default factor for the longest document."""
    factor = parameters.number("factor", max_position_embeddings / length)
    implied = 1.0 if factor <= 1.0 or length == 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    return parameters.number("attention_factor", implied)
