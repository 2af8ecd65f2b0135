"""Rotary parameters from a Hugging Face config, in the form of transformers 5 or of older versions."""

from __future__ import annotations

import math

from backhand.nn.config_fields import ConfigFields
from backhand.nn.family import RotaryConfig

SCALING_RULES = ("default", "linear", "llama3", "longrope")
"""Values of `rope_type` that `rotary_frequencies` computes."""

FULL = "full_attention"
SLIDING = "sliding_attention"

_DEFAULT_THETA = 10_000.0
_GEMMA_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}


def rotary(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> RotaryConfig:
    """One set of angles for all layers: `rope_parameters`, or `rope_theta` and `rope_scaling`.

    Raises:
        ArtifactError: for a value that is no number, or no list of head_dim / 2 numbers, where one is needed.
    """
    theta = fields.number("rope_theta", _DEFAULT_THETA)
    fields.must_equal("partial_rotary_factor", 1.0)
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if scaling and parameters and fields.value("rope_scaling") != fields.value("rope_parameters"):
        fields.problem("rope_scaling", "rope_parameters is there too and says something else")
    # Phi-3's place for it; transformers lets it win over the one inside.
    stated = fields.value("original_max_position_embeddings") is not None
    original_length = fields.integer("original_max_position_embeddings") if stated else None
    return _rule(scaling or parameters, theta, original_length, head_dim, max_position_embeddings)


def gemma_rotary(
    fields: ConfigFields, head_dim: int, max_position_embeddings: int
) -> tuple[RotaryConfig, RotaryConfig]:
    """Gemma 3's two sets of angles: of full attention and of sliding attention; older configs scale only the former.

    Raises:
        ArtifactError: for a value that is no number, or no list of head_dim / 2 numbers, where one is needed.
    """
    theta = {
        FULL: fields.number("rope_theta", _GEMMA_THETA[FULL]),
        SLIDING: fields.number("rope_local_base_freq", _GEMMA_THETA[SLIDING]),
    }
    fields.must_equal("partial_rotary_factor", 1.0)
    parameters = fields.mapping("rope_parameters")
    rules = {layer_type: parameters.mapping(layer_type) if parameters else None for layer_type in theta}
    if parameters:
        parameters.close()
    scaling = fields.mapping("rope_scaling")
    if scaling is not None:
        newer = fields.value("rope_parameters")
        if isinstance(newer, dict) and fields.value("rope_scaling") != newer.get(FULL):
            fields.problem("rope_scaling", "rope_parameters is there too and says something else")
        rules[FULL] = scaling
    full, sliding = (
        _rule(rules[kind], theta[kind], None, head_dim, max_position_embeddings) for kind in (FULL, SLIDING)
    )
    return full, sliding


def _rule(
    parameters: ConfigFields | None,
    theta: float,
    original_length: int | None,
    head_dim: int,
    max_position_embeddings: int,
) -> RotaryConfig:
    if parameters is None:
        return RotaryConfig(theta)
    theta = parameters.number("rope_theta", theta)
    parameters.must_equal("partial_rotary_factor", 1.0)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    scaling: tuple[tuple[str, float | int | str | tuple[float, ...]], ...] | None = None
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
        factors = _one_list_of_factors(parameters, original_length, head_dim, max_position_embeddings)
        scaling = (("short_factor", factors),)
    elif kind != "default":
        # Its own parameters would only repeat the complaint.
        key = "rope_type" if parameters.stated("rope_type") else "type"
        parameters.problem(key, f"the engine has {', '.join(SCALING_RULES)}")
        return RotaryConfig(theta)
    parameters.close()
    return RotaryConfig(theta, None if scaling is None else (("rope_type", kind), *scaling))


def _one_list_of_factors(
    parameters: ConfigFields, original_length: int | None, head_dim: int, max_position_embeddings: int
) -> tuple[float, ...]:
    """longrope with the same factors at every length and cosines and sines of length one; else a problem."""
    short, long = (parameters.numbers(key, head_dim // 2) for key in ("short_factor", "long_factor"))
    if short != long:
        parameters.problem("long_factor", "differs from short_factor, and the engine has one list for every length")
    length = original_length or parameters.integer("original_max_position_embeddings", max_position_embeddings)
    factor = parameters.number("factor", max_position_embeddings / length)
    implied = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(length))
    if parameters.number("attention_factor", implied) != 1.0:
        parameters.problem("attention_factor", f"the engine has 1.0, and null means {implied:.4g} here")
    return short
