"""Families in which some layers have a mixer other than attention, read as in `nn.families.family_parsing`.

LFM2, checked against the modelling source of transformers 5.24:

- A layer is a gated short convolution if `layer_types` says `conv`, and attention for any other value. Without the
  list, the layers in `full_attn_idxs` have attention; without that list too, all layers.
- Convolutions have `conv_L_cache` taps. `conv_bias` applies to the convolution and to the projections around it.
- The MLP's width is int(2/3 · intermediate_size), times `block_ffn_dim_multiplier`, truncated, and rounded up to a
  multiple of `block_multiple_of`. Without `block_auto_adjust_ff_dim` it is used unchanged. The older names
  `block_ff_dim` and `tie_embedding` win over `intermediate_size` and `tie_word_embeddings`.
- Attention is Qwen3's, with one norm over each head of q and of k and without biases. The rotary base is 1e6 if absent.
  The norm before the head is `embedding_norm`.

Granite 4, from the same source: it is Granite 3 with an MLP of width `shared_intermediate_size`, gate and up in one
module. With experts (`num_local_experts` > 0, of width `intermediate_size`), every layer adds their output to that of
the MLP. A chosen expert's weight is its share among the chosen ones. `layer_types` says which layers have attention;
without the list all have Mamba-2. Queries and keys are rotated if `position_embedding_type` is `rope`, and in no layer
for any other value.

Bamba, from the same source: layers in `attn_layer_indices` have attention, all others Mamba-2. Half of the features of
a head are rotated by default.

Falcon-H1, from the same source: every layer has attention and Mamba-2. `mamba_d_ssm` is the width of Mamba-2's heads
together, if it is not null. Its output is normalized only with `mamba_rms_norm`, after the gate unless
`mamba_norm_before_gate`. Multipliers of a module's input are here multipliers of its output, which is the same without
biases. Those of queries and keys are part of the scaling of scores.

Nemotron-H, from the same source: a block is one sublayer, Mamba-2, attention or an MLP without a gate, as
`layers_block_type` says. Older configs have a string with one of `M*-` per block (`hybrid_override_pattern`).
`num_hidden_layers` is not read. No features are rotated, attention has no biases, and time steps have no upper limit.
`use_bias` applies to the projections around Mamba-2. Mixtures of experts (`moe`, `E`) are not computed.

Granite and Bamba: the heads of Mamba-2 have `mamba_expand` times the hidden size together. The norm of its output is
computed for each of `mamba_n_groups` groups. The size of a chunk is a choice of the program.

Qwen3.5 and 3.6, dense, from the same source:

- A layer has the gated delta rule if `layer_types` says `linear_attention`. Without the list, all but every fourth have
  it (`full_attention_interval`).
- In the other layers q_proj computes a gate after each head's query, whose sigmoid multiplies attention's output.
- The heads of q and k are normalized, and a quarter of the features is rotated by default.
- `attention_bias` applies to all four projections.
- `mrope_section` assigns features to image coordinates, which are all equal in a text.
- Norms multiply by 1 + weight, except the norm of the delta rule's output, which multiplies by the weight.
- Layers that predict further tokens (mtp) are not part of the model, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from backhand.errors import ArtifactError
from backhand.nn.families.common_fields import (
    common_fields,
    layers_of_type,
    nearest_float32,
    with_biases,
    with_layers,
    with_multipliers,
    without_rotary,
)
from backhand.nn.families.config_fields import ConfigFields, delta_sizes, ssm_sizes
from backhand.nn.families.expert_families import read_mixture, with_experts
from backhand.nn.families.family import (
    ATTENTION,
    ATTENTION_AND_SSM,
    GATED_DELTA,
    GPT_OSS_ROUTER,
    MLP,
    SHORT_CONV,
    SSM,
    DecoderConfig,
    LayerConfig,
    Multipliers,
    ShortConv,
    SSMSizes,
)
from backhand.nn.families.rotary import FULL, bamba_rotary, lfm2_rotary, qwen35_rotary
from backhand.ops.logits_rule import LogitsRule

_CONV = "conv"
_LINEAR = "linear_attention"
_OLDER_TYPES = {"attention": FULL, "mamba": _LINEAR}
"""Layer types of older configs, with their current names."""
_FULL_INTERVAL = 4


def lfm2(fields: ConfigFields) -> DecoderConfig:
    """LFM2 and LFM2.5."""
    for older, key in (("block_ff_dim", "intermediate_size"), ("tie_embedding", "tie_word_embeddings")):
        if (value := fields.value(older)) is not None:
            fields.put(key, value)
    convolves = _convolving_layers(fields, fields.integer("num_hidden_layers"))
    decoder = common_fields(fields, rotary_sets=lfm2_rotary, norm_eps="norm_eps", activation=None)
    return replace(
        with_layers(decoder, convolves, rotary=None, mixer=SHORT_CONV),
        intermediate_size=_width(fields, decoder.intermediate_size),
        short_conv=ShortConv(fields.integer("conv_L_cache"), fields.flag("conv_bias", False)),
    )


def _convolving_layers(fields: ConfigFields, layers: int) -> list[bool]:
    """Return for each layer if it has a convolution."""
    convolves, indices = layers_of_type(fields, _CONV, layers), fields.value("full_attn_idxs")
    if convolves is not None or indices is None:
        return convolves or [False] * layers
    if not isinstance(indices, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in indices):
        raise ArtifactError("full_attn_idxs is not a list of layers", where="config.json")
    return [index not in indices for index in range(layers)]


def _width(fields: ConfigFields, stated: int) -> int:
    """Return the width of the MLP."""
    adjusts = fields.flag("block_auto_adjust_ff_dim", True)
    multiplier = fields.value("block_ffn_dim_multiplier")
    declared = not fields.stated("block_ffn_dim_multiplier")
    multiple = fields.integer("block_multiple_of")
    if not adjusts:
        return stated
    width = int(2 * stated / 3)
    if multiplier is None and not declared:
        return width
    return -(-int(fields.number("block_ffn_dim_multiplier") * width) // multiple) * multiple


WITHOUT_EXPERTS = ("intermediate_size", "num_experts_per_tok")
"""Fields of Granite 4 that do not matter without experts."""
OF_MAMBA = (
    "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand",
    "mamba_conv_bias", "mamba_proj_bias", "time_step_limit",
)  # fmt: skip
"""Fields that do not matter without Mamba layers."""


def granite4(fields: ConfigFields) -> DecoderConfig:
    """Granite 4, with and without experts."""
    fields.must_equal("output_router_logits", False)
    has_experts = fields.integer("num_local_experts", minimum=0) > 0
    fields.neutral("router_aux_loss_coef", *(() if has_experts else WITHOUT_EXPERTS))
    types = fields.value("layer_types")
    if isinstance(types, list):
        fields.put("layer_types", [_OLDER_TYPES.get(one, one) if isinstance(one, str) else one for one in types])
    decoder = with_biases(fields, with_multipliers(fields, common_fields(fields)))
    rotates = fields.or_declared("position_embedding_type") == "rope"
    if has_experts:
        mixture = read_mixture(fields, "num_local_experts", decoder.intermediate_size)
        decoder = with_experts(decoder, mixture._replace(router=GPT_OSS_ROUTER, with_mlp=True))
    decoder = replace(decoder, intermediate_size=fields.integer("shared_intermediate_size"))
    layers = len(decoder.layers)
    recurrent = layers_of_type(fields, _LINEAR, layers) or [True] * layers
    return _with_mamba(fields, without_rotary(decoder, lambda _: not rotates), recurrent)


def bamba(fields: ConfigFields) -> DecoderConfig:
    """Bamba."""
    fields.must_equal("partial_rotary_factor", 0.5)
    attention = fields.value("attn_layer_indices") or []
    if not isinstance(attention, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in attention):
        raise ArtifactError(f"attn_layer_indices = {attention!r:.80} is not a list of layers", where="config.json")
    decoder = with_biases(fields, common_fields(fields, rotary_sets=bamba_rotary))
    decoder = replace(decoder, mlp_bias=fields.flag("mlp_bias", False))
    return _with_mamba(fields, decoder, [layer not in attention for layer in range(len(decoder.layers))])


def falcon_h1(fields: ConfigFields) -> DecoderConfig:
    """Falcon-H1."""
    for key in ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"):
        fields.must_equal(key, False)
    decoder = common_fields(fields)
    width = fields.or_declared("mamba_d_ssm")
    sizes = ssm_sizes(fields, None if width is None else fields.integer("mamba_d_ssm"))
    place = "before_gate" if fields.flag("mamba_norm_before_gate", True) else "after_gate"
    attention_in, keys = fields.number("attention_in_multiplier"), fields.number("key_multiplier")
    gate, down = multipliers_of(fields, "mlp_multipliers", 2)
    # transformers holds the five in a float32 buffer.
    of_input = fields.number("ssm_in_multiplier")
    ssm = [of_input * nearest_float32(one) for one in multipliers_of(fields, "ssm_multipliers", 5)]
    multipliers = Multipliers(
        output=attention_in * fields.number("attention_out_multiplier"),
        second_output=fields.number("ssm_out_multiplier"),
        gate=gate,
        down=down,
        ssm=() if all(one == 1.0 for one in ssm) else tuple(ssm),
    )
    return replace(
        with_layers(decoder, [True] * len(decoder.layers), mixer=ATTENTION_AND_SSM),
        ssm=sizes._replace(norm=place if fields.flag("mamba_rms_norm", False) else None),
        multipliers=multipliers,
        attention_scaling=decoder.attention_scaling * attention_in**2 * keys,
        embedding_scaling=nearest_float32(fields.number("embedding_multiplier")),
        logits=LogitsRule(fields.number("lm_head_multiplier")),
    )


def multipliers_of(fields: ConfigFields, key: str, count: int) -> tuple[float, ...]:
    """Return a list of multipliers, all 1 if the field is null or absent."""
    return (1.0,) * count if fields.value(key) is None else fields.numbers(key, count)


def _with_mamba(fields: ConfigFields, decoder: DecoderConfig, recurrent: Sequence[bool]) -> DecoderConfig:
    """Return the decoder with Mamba-2 in these layers."""
    if not any(recurrent):
        fields.neutral(*OF_MAMBA)
        return decoder
    return replace(with_layers(decoder, recurrent, rotary=None, mixer=SSM), ssm=ssm_sizes(fields))


_NEMOTRON_MIXERS = {_LINEAR: SSM, FULL: ATTENTION, "mlp": MLP}
_NEMOTRON_LETTERS = {"M": _LINEAR, "*": FULL, "-": "mlp", "E": "moe"}
_NEMOTRON_PATTERN = "ME*-"
"""The blocks of the class's default."""
_NEMOTRON_OLDER = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias",
}  # fmt: skip
"""Older names of fields, which take precedence."""
UNUSED_BY_NEMOTRON = (
    "num_hidden_layers", "expand", "mamba_expand", "chunk_size", "use_mamba_kernels", "mamba_proj_bias",
    "time_step_max", "time_step_floor", "time_step_limit", "mamba_dt_max", "mamba_dt_init_floor", "mamba_dt_limit",
    "mamba_ssm_cache_dtype", "attention_bias", "sliding_window", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "rescale_prenorm_residual", "residual_in_fp32", "hidden_dropout",
    "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
    "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size", "moe_shared_expert_overlap", "num_experts_per_tok", "routed_scaling_factor", "n_group",
    "topk_group", "norm_topk_prob",
)  # fmt: skip
"""Fields that the class does not read, or only for the initialization, the prediction of further tokens, or experts."""


def nemotron_h(fields: ConfigFields) -> DecoderConfig:
    """Nemotron-H without experts."""
    for older, key in _NEMOTRON_OLDER.items():
        if (value := fields.value(older)) is not None:
            fields.put(key, value)
    fields.must_equal("mamba_hidden_act", "silu")
    fields.neutral(*UNUSED_BY_NEMOTRON)
    kinds = _block_kinds(fields)
    fields.put("num_hidden_layers", len(kinds))
    decoder = common_fields(
        fields, rotary_sets=lambda *_: (), norm_eps="layer_norm_epsilon", activation=("mlp_hidden_act", "relu2")
    )
    heads, groups = fields.integer("mamba_num_heads"), fields.integer("n_groups")
    if heads % groups:
        raise ArtifactError(f"{heads} Mamba heads cannot share {groups} groups", where="config.json")
    sizes = SSMSizes(
        heads,
        fields.integer("mamba_head_dim"),
        groups,
        fields.integer("ssm_state_size"),
        fields.integer("conv_kernel"),
        conv_bias=fields.flag("use_conv_bias", True),
        bias=fields.flag("use_bias", False),
        time_steps=(fields.number("time_step_min"), inf),
    )
    layers = tuple(LayerConfig(rotary=None, mixer=_NEMOTRON_MIXERS[kind]) for kind in kinds)
    return replace(decoder, layers=layers, ssm=sizes, mlp_bias=fields.flag("mlp_bias", False))


def _block_kinds(fields: ConfigFields) -> list[str]:
    """Return the kind of each block, a key of `_NEMOTRON_MIXERS`."""
    current, alias, pattern = map(fields.value, ("layers_block_type", "layer_types", "hybrid_override_pattern"))
    stated = alias if current is None else current
    if stated is None:
        stated = [_NEMOTRON_LETTERS.get(letter, letter) for letter in str(pattern or _NEMOTRON_PATTERN)]
    if not isinstance(stated, list) or not stated or not all(isinstance(kind, str) for kind in stated):
        raise ArtifactError("layers_block_type is not a list of kinds of blocks", where="config.json")
    kinds = [_OLDER_TYPES.get(str(kind), str(kind)) for kind in stated]
    if unknown := sorted({*kinds} - {*_NEMOTRON_MIXERS}):
        key = "hybrid_override_pattern" if current is None and alias is None else "layers_block_type"
        fields.problem(key, f"the engine has no blocks of kind {', '.join(unknown)}")
    return [kind if kind in _NEMOTRON_MIXERS else FULL for kind in kinds]


def qwen3_5(fields: ConfigFields) -> DecoderConfig:
    """Qwen3.5 and 3.6, dense."""
    fields.must_equal("attn_output_gate", True)
    fields.neutral("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    sizes = delta_sizes(fields)
    decoder = with_biases(fields, common_fields(fields, rotary_sets=qwen35_rotary))
    linear = _linear_layers(fields, len(decoder.layers))
    return replace(with_layers(decoder, linear, rotary=None, mixer=GATED_DELTA), delta=sizes)


def _linear_layers(fields: ConfigFields, layers: int) -> list[bool]:
    """Return for each layer if it has the delta rule.

    This is given by `layer_types`. Without it, all but every `full_attention_interval`-th layer have the delta rule.
    """
    linear = layers_of_type(fields, _LINEAR, layers)
    if linear is None:
        interval = fields.integer("full_attention_interval", _FULL_INTERVAL)
        return [(index + 1) % interval != 0 for index in range(layers)]
    fields.value("full_attention_interval")  # the list decides
    return linear
