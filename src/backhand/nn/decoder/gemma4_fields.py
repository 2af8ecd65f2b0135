"""Gemma 4's text model, read as in `family_parsing`; checked against the modelling source of transformers 5.24.

- Full layers have heads of `global_head_dim` features (512 where it is absent), in newer files by `per_layer_config`,
  which wins: a mapping from a layer's number to the sizes that it has of its own.
- The last `num_kv_shared_layers` layers have neither k_proj nor v_proj: each uses the keys and values of the last layer
  of its kind before them. With `use_double_wide_mlp` their MLPs are twice as wide.
- With `attention_k_eq_v` full layers have no v_proj, and values come from the keys' projection;
  `num_global_key_value_heads` counts for them then.
- q and k are normed over each head, v too, without a weight; norms multiply by the weight in float32. Scores are not
  scaled. Windows as Gemma 3's; the last layer is a full one whatever the list says.
- Full layers turn by the rule `proportional`: frequencies of the whole head, of which the first
  `partial_rotary_factor` turn and the others stand still.
- Layers with experts (26B-A4B) the engine does not compute, nor attention in both directions.
"""

from __future__ import annotations

from dataclasses import replace

from backhand.errors import ArtifactError
from backhand.nn.decoder.common_fields import (
    GELU,
    all_but_every,
    common_fields,
    nearest_float32,
    with_biases,
)
from backhand.nn.decoder.config_fields import ConfigFields
from backhand.nn.decoder.family import (
    KEYS_AS_VALUES,
    SHARED_KEYS,
    VALUE_NORMED,
    DecoderConfig,
    LayerConfig,
    LayerSizes,
    PerLayerInput,
)
from backhand.nn.decoder.rotary import gemma4_rotary
from backhand.ops.logits_rule import LogitsRule

_PATTERN = 6
_GLOBAL_HEAD_DIM = 512
_CAP = "final_logit_softcapping"
"""There is none where it is absent or null: the class has no number either."""


def gemma4_text(fields: ConfigFields) -> DecoderConfig:
    """Gemma 4's dense text models.

    Raises:
        ArtifactError: for a value that no model has.
    """
    fields.must_equal("use_bidirectional_attention", "vision")
    fields.must_equal("enable_moe_block", False, reason="the engine has no experts beside an MLP, as 26B-A4B has them")
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        fields.value(key)  # read by layers of experts alone
    decoder = common_fields(
        fields,
        window=fields.integer("sliding_window"),
        slides=all_but_every(_PATTERN),
        rotary_sets=gemma4_rotary,
        activation=GELU,
    )
    count = len(decoder.layers)
    sliding = [layer.window is not None for layer in decoder.layers]
    sliding[-1] = False
    sharing = fields.integer("num_kv_shared_layers", 0, minimum=0)
    wide = fields.flag("use_double_wide_mlp", False)
    as_values = fields.flag("attention_k_eq_v", False)
    sizes, sources = _sizes(fields, decoder, sliding, as_values), _sources(sliding, count - sharing)
    layers = []
    for slides, own_sizes, source in zip(sliding, sizes, sources, strict=True):
        ffn = decoder.intermediate_size * (2 if wide and source is not None else 1)
        own = VALUE_NORMED if slides or not as_values else KEYS_AS_VALUES
        layers.append(
            LayerConfig(
                window=fields.integer("sliding_window") if slides else None,
                rotary=int(slides),
                mixer=own if source is None else SHARED_KEYS,
                sizes=LayerSizes(*own_sizes, ffn),
                kv_source=source,
            )
        )
    return replace(
        with_biases(fields, decoder),
        layers=tuple(layers),
        embedding_scaling=nearest_float32(decoder.hidden_size**0.5),
        logits=LogitsRule(cap=None if fields.value(_CAP) is None else fields.number(_CAP)),
        per_layer=_per_layer(fields, decoder, count),
    )


def _sources(sliding: list[bool], first_sharing: int) -> list[int | None]:
    """Of each layer the number of that whose keys and values it uses; None where it has its own.

    Raises:
        ArtifactError: there are none to use.
    """
    if not first_sharing > 0:
        raise ArtifactError("num_kv_shared_layers leaves no layer with keys and values", where="config.json")
    own = {kind: index for index, kind in enumerate(sliding[:first_sharing])}
    if any(kind not in own for kind in sliding):
        raise ArtifactError("layers share the keys and values of a kind of layer that has none", where="config.json")
    return [None if index < first_sharing else own[kind] for index, kind in enumerate(sliding)]


def _sizes(fields: ConfigFields, decoder: DecoderConfig, sliding: list[bool], as_values: bool) -> list[tuple[int, int]]:
    """Features of a head and key/value heads of each layer, alike in all layers of a kind.

    Raises:
        ArtifactError: for a value that is no size, or key/value heads that the heads cannot share.
    """
    plain = decoder.head_dim, decoder.num_key_value_heads
    every = fields.mapping("per_layer_config")
    for key in ("global_head_dim", "num_global_key_value_heads"):
        fields.value(key)  # which do not count beside it
    if every is None:
        kv_heads = decoder.num_key_value_heads
        if as_values and fields.value("num_global_key_value_heads") is not None:
            kv_heads = fields.integer("num_global_key_value_heads")
        found = [
            plain if slides else (fields.integer("global_head_dim", _GLOBAL_HEAD_DIM), kv_heads) for slides in sliding
        ]
    else:
        found = [plain] * len(sliding)
        for index in range(len(sliding)):
            if (own := every.mapping(str(index))) is not None:
                found[index] = own.integer("head_dim", plain[0]), own.integer("num_key_value_heads", plain[1])
                if more := own.left():
                    fields.problem("per_layer_config", f"the engine has no {more[0]} for a layer of its own")
        if more := every.left():
            fields.problem("per_layer_config", f"{more[0]} is none of {len(sliding)} layers")
    for kind in (True, False):
        own_kind = {size for size, slides in zip(found, sliding, strict=True) if slides == kind}
        if len(own_kind) > 1:
            fields.problem("per_layer_config", "the engine has one size of head for each kind of layer")
    for head_dim, kv_heads in found:
        if decoder.num_heads % kv_heads:
            raise ArtifactError(
                f"{decoder.num_heads} heads cannot share {kv_heads} key/value heads", where="config.json"
            )
        if head_dim % 2:
            fields.problem("global_head_dim", f"{head_dim} is odd, and the rotary embedding turns pairs")
    return found


def _per_layer(fields: ConfigFields, decoder: DecoderConfig, layers: int) -> PerLayerInput | None:
    width = fields.integer("hidden_size_per_layer_input", minimum=0)
    rows = fields.integer("vocab_size_per_layer_input")
    if width and rows < decoder.vocab_size:
        fields.problem(
            "vocab_size_per_layer_input", f"tokens from {rows} on have no row in the table of layers' inputs"
        )
    return PerLayerInput(width, layers, rows) if width else None
