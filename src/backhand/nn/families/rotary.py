"""Rotary parameters, read from a Hugging Face config of transformers 5 or older.

The readers raise ArtifactError for a value that is not a number, or a list whose length is not the number of rotated
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

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
_DEFAULT_THETA = 10_000.0
_GEMMA_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_OLMO_THETA = 500_000.0
BETA_FAST, BETA_SLOW = 32.0, 1.0
_GEMMA4_SCALING = {FULL: (("rope_type", "proportional"), ("share", 0.25), ("factor", 1.0)), SLIDING: None}
_NONE: Mapping[str, str] = MappingProxyType({})
TwoSets = tuple[RotaryConfig, RotaryConfig]
"""Angles of full attention and of sliding attention."""


def rotary(
    fields: ConfigFields,
    head_dim: int,
    max_position_embeddings: int,
    share: float | None = None,
    older_names: Mapping[str, str] = _NONE,
    read_elsewhere: Sequence[str] = (),
    interleaved: bool = False,
) -> RotaryConfig:
    """Read one set of angles for all layers, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Args:
        max_position_embeddings: longest document in tokens.
        share: default share of the features that is rotated; None if all of them must be.
        older_names: names of rules in older configs, with their current names.
        read_elsewhere: fields of the rule that another reader uses.
        interleaved: adjacent features form pairs.

    Raises:
        ArtifactError: a value is not a number, or a list does not have one entry per rotated pair.
    """
    theta = fields.number("rope_theta", _DEFAULT_THETA)
    if share is None:
        fields.must_equal("partial_rotary_factor", 1.0)
    else:
        share = fields.number("partial_rotary_factor", share)
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if scaling and parameters and fields.value("rope_scaling") != fields.value("rope_parameters"):
        fields.problem("rope_scaling", "rope_parameters is set too, to another value")
    # Phi-3 has it here. transformers prefers it to the one inside the rule.
    key = "original_max_position_embeddings"
    stated = fields.value(key) is not None or fields.or_declared(key) is not None
    original_length = fields.integer(key) if stated else None
    stated_rule = scaling or parameters
    if stated_rule:
        stated_rule.neutral(*read_elsewhere)
    features = None
    if share is not None:
        share = stated_rule.number("partial_rotary_factor", share) if stated_rule else share
        features = int(head_dim * share)
        if features % 2 or not 0 < features <= head_dim:
            fields.problem("partial_rotary_factor", f"{features} features of {head_dim} cannot be rotated in pairs")
    elif stated_rule:
        stated_rule.must_equal("partial_rotary_factor", 1.0)
    config = _rule(stated_rule, theta, original_length, features or head_dim, max_position_embeddings, older_names)
    return replace(config, features=None if features == head_dim else features, interleaved=interleaved)


glm_rotary = partial(rotary, share=0.5, interleaved=True)
"""GLM: adjacent features form pairs, and half of the features are rotated by default."""

qwen35_rotary = partial(rotary, share=0.25, read_elsewhere=("mrope_section", "mrope_interleaved"))
"""Qwen3.5: a quarter of the features is rotated by default.

The assignment of features to image coordinates is ignored.
"""

ministral3_rotary = partial(
    rotary, read_elsewhere=("llama_4_scaling_beta", "original_max_position_embeddings", "max_position_embeddings")
)
"""Ministral 3: one set, whose parameters also contain the fields of `query_scaling`."""


def phi3_rotary(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> RotaryConfig:
    """Phi-3: part of the features, by the default rule or by longrope, which older configs call su or yarn."""
    older = {"su": "longrope", "yarn": "longrope"}
    config = rotary(fields, head_dim, max_position_embeddings, share=1.0, older_names=older)
    rule = dict(config.scaling or ()).get("rope_type", "default")
    if rule not in ("default", "longrope"):
        fields.problem("rope_parameters", f"no model of this type has {rule} angles")
    return config


def query_scaling(fields: ConfigFields, config: RotaryConfig) -> QueryScaling | None:
    """Read the scaling of queries by position from the rotary parameters; None without it."""
    parameters = fields.mapping("rope_scaling") or fields.mapping("rope_parameters")
    beta = None if parameters is None else _unless_zero(parameters, "llama_4_scaling_beta")
    if parameters is None or beta is None:
        return None
    length = dict(config.scaling or ()).get("original_max_position_embeddings")
    if not isinstance(length, int):
        length = parameters.integer("original_max_position_embeddings")
    return QueryScaling(beta, length)


def gemma_rotary(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> TwoSets:
    """Gemma 3: angles of full and of sliding attention. Older configs scale only the former."""
    theta = {
        FULL: fields.number("rope_theta", _GEMMA_THETA[FULL]),
        SLIDING: fields.number("rope_local_base_freq", _GEMMA_THETA[SLIDING]),
    }
    return _by_kind(fields, theta, head_dim, max_position_embeddings)


def olmo3_rotary(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> TwoSets:
    """OLMo 3: two sets of angles, as in Gemma 3. In older configs `rope_theta` applies to the full layers only."""
    theta = {FULL: fields.number("rope_theta", _OLMO_THETA), SLIDING: _OLMO_THETA}
    return _by_kind(fields, theta, head_dim, max_position_embeddings)


def gemma4_rotary(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> TwoSets:
    """Gemma 4: a quarter of the pairs is rotated in full attention, all pairs in sliding attention."""
    parameters = fields.mapping("rope_parameters")
    sets = []
    for kind in (FULL, SLIDING):
        rule = None if parameters is None else parameters.mapping(kind)
        if rule is None:
            sets.append(RotaryConfig(_GEMMA_THETA[kind], _GEMMA4_SCALING[kind]))
            continue
        if rule.value("rope_type") != "proportional":
            rule.must_equal("partial_rotary_factor", 1.0)
        sets.append(_rule(rule, _GEMMA_THETA[kind], None, head_dim, max_position_embeddings))
    if parameters is not None:
        parameters.close(_READ_BY_A_RULE)
    full, sliding = sets
    return full, sliding


def _by_kind(fields: ConfigFields, theta: Mapping[str, float], head_dim: int, max_position_embeddings: int) -> TwoSets:
    """Read the angles of full and of sliding attention; `theta` is the default base."""
    fields.must_equal("partial_rotary_factor", 1.0)
    parameters = fields.mapping("rope_parameters")
    rules = {layer_type: parameters.mapping(layer_type) if parameters else None for layer_type in theta}
    for rule in rules.values():
        if rule is not None:  # transformers reads it next to the rules, not inside
            rule.must_equal("truncate", True)
    if parameters:
        parameters.close(_READ_BY_A_RULE)  # one rule for all layers would be another model
    scaling = fields.mapping("rope_scaling")
    if scaling is not None:
        newer = fields.value("rope_parameters")
        if isinstance(newer, dict) and fields.value("rope_scaling") != newer.get(FULL):
            fields.problem("rope_scaling", "rope_parameters is set too, to another value")
        rules[FULL] = scaling
    for rule in rules.values():
        if rule is not None:
            rule.must_equal("partial_rotary_factor", 1.0)
    full, local = (_rule(rules[kind], theta[kind], None, head_dim, max_position_embeddings) for kind in (FULL, SLIDING))
    return full, local


def _rule(
    parameters: ConfigFields | None,
    theta: float,
    original_length: int | None,
    head_dim: int,
    max_position_embeddings: int,
    older_names: Mapping[str, str] = _NONE,
) -> RotaryConfig:
    if parameters is None:
        return RotaryConfig(theta)
    theta = parameters.number("rope_theta", theta)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    kind = older_names.get(kind, kind)
    scaling: tuple[tuple[str, float | int | str | tuple[float, ...]], ...] | None = None
    attention_factor = 1.0
    if kind == "linear":
        scaling = (("factor", parameters.number("factor")),)
    elif kind == "llama3":
        length = parameters.integer("original_max_position_embeddings", max_position_embeddings)
        scaling = (
            ("factor", parameters.number("factor")),
            ("low_freq_factor", parameters.number("low_freq_factor")),
            ("high_freq_factor", parameters.number("high_freq_factor")),
            ("original_max_position_embeddings", original_length or length),
        )
    elif kind == "longrope":
        length = original_length or parameters.integer("original_max_position_embeddings", max_position_embeddings)
        short, long = (parameters.numbers(key, head_dim // 2) for key in ("short_factor", "long_factor"))
        scaling = (("short_factor", short),)
        if short != long:
            scaling += (("long_factor", long), ("original_max_position_embeddings", length))
        attention_factor = _longrope_attention_factor(parameters, length, max_position_embeddings)
    elif kind == "yarn":
        length = original_length or parameters.integer("original_max_position_embeddings", max_position_embeddings)
        factor = parameters.number("factor", max_position_embeddings / length)
        scaling = (
            ("factor", factor),
            ("beta_fast", _unless_zero(parameters, "beta_fast") or BETA_FAST),
            ("beta_slow", _unless_zero(parameters, "beta_slow") or BETA_SLOW),
            ("original_max_position_embeddings", length),
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
