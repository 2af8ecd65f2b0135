"""Gemma 4's text model, read as in `nn.families.family_parsing`.

Checked against the modelling source of transformers 5.24:

- Heads of full layers have `global_head_dim` features (512 if absent). Newer files have `per_layer_config`, which wins.
  It maps a layer's number to its own sizes.
- The last `num_kv_shared_layers` layers have neither k_proj nor v_proj. Each uses the keys and values of the last
  earlier layer of its kind. With `use_double_wide_mlp` their MLPs are twice as wide.
- With `attention_k_eq_v` full layers have no v_proj, and values share the projection of the keys.
  `num_global_key_value_heads` then applies to them.
- q, k and v are normalized over each head, v without a weight. Norms multiply by the weight in float32. Scores are not
  scaled. Windows are as in Gemma 3. The last layer has full attention regardless of the list.
- Full layers use the rotary rule `proportional`: frequencies of the whole head, of which the first
  `partial_rotary_factor` are rotated and the others are not.
- The engine computes neither layers with experts (26B-A4B) nor bidirectional attention.
"""

from __future__ import annotations

from dataclasses import replace

from backhand.errors import ArtifactError
from backhand.nn.families.common_fields import (
    GELU,
    common_fields,
    nearest_float32,
    sliding_except_every,
    with_biases,
)
from backhand.nn.families.config_fields import ConfigFields
from backhand.nn.families.family import (
    KEYS_AS_VALUES,
    SHARED_KEYS,
    VALUE_NORMED,
    DecoderConfig,
    LayerConfig,
    LayerSizes,
    PerLayerInput,
)
from backhand.nn.families.rotary import gemma4_rotary
from backhand.ops.logits_rule import LogitsRule

_PATTERN = 6
_GLOBAL_HEAD_DIM = 512
_CAP = "final_logit_softcapping"
"""No cap if the field is absent or null: the class has no default either."""


def gemma4_text(fields: ConfigFields) -> DecoderConfig:
    """Gemma 4's dense text models.

    Raises:
        ArtifactError: a value that no model has.
    """
    fields.must_equal("use_bidirectional_attention", "vision")
    fields.must_equal(
        "enable_moe_block", False, reason="the engine has no experts in addition to an MLP, as in 26B-A4B"
    )
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        fields.value(key)  # only layers of experts read them
    decoder = common_fields(
        fields,
        window=fields.integer("sliding_window"),
        slides=sliding_except_every(_PATTERN),
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
        unshared = VALUE_NORMED if slides or not as_values else KEYS_AS_VALUES
        layers.append(
            LayerConfig(
                window=fields.integer("sliding_window") if slides else None,
                rotary=int(slides),
                mixer=unshared if source is None else SHARED_KEYS,
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
    """Return, for each layer, the layer whose keys and values it uses, or None if it computes its own.

    Raises:
        ArtifactError: no earlier layer has keys and values to use.
    """
    if not first_sharing > 0:
        raise ArtifactError("num_kv_shared_layers leaves no layer with keys and values", where="config.json")
    last_of_kind = {kind: index for index, kind in enumerate(sliding[:first_sharing])}
    if any(kind not in last_of_kind for kind in sliding):
        raise ArtifactError("layers share the keys and values of a kind of layer that has none", where="config.json")
    return [None if index < first_sharing else last_of_kind[kind] for index, kind in enumerate(sliding)]


def _sizes(fields: ConfigFields, decoder: DecoderConfig, sliding: list[bool], as_values: bool) -> list[tuple[int, int]]:
    """Return head_dim and key/value heads of each layer. They are equal in all layers of a kind.

    Raises:
        ArtifactError: a value is not a valid size, or the heads are not a multiple of the key/value heads.
    """
    plain = decoder.head_dim, decoder.num_key_value_heads
    every = fields.mapping("per_layer_config")
    for key in ("global_head_dim", "num_global_key_value_heads"):
        fields.value(key)  # ignored if per_layer_config exists
    if every is None:
        kv_heads = decoder.num_key_value_heads
        if as_values and fields.value("num_global_key_value_heads") is not None:
            kv_heads = fields.integer("num_global_key_value_heads")
        sizes = [
            plain if slides else (fields.integer("global_head_dim", _GLOBAL_HEAD_DIM), kv_heads) for slides in sliding
        ]
    else:
        sizes = [plain] * len(sliding)
        for index in range(len(sliding)):
            if (layer := every.mapping(str(index))) is not None:
                sizes[index] = layer.integer("head_dim", plain[0]), layer.integer("num_key_value_heads", plain[1])
                if more := layer.unread():
                    fields.problem("per_layer_config", f"the engine has no {more[0]} for a layer of its own")
        if more := every.unread():
            fields.problem("per_layer_config", f"{more[0]} is none of {len(sliding)} layers")
    for kind in (True, False):
        own_kind = {size for size, slides in zip(sizes, sliding, strict=True) if slides == kind}
        if len(own_kind) > 1:
            fields.problem("per_layer_config", "the engine has one size of head for each kind of layer")
    for head_dim, kv_heads in sizes:
        if decoder.num_heads % kv_heads:
            raise ArtifactError(
                f"{decoder.num_heads} heads cannot share {kv_heads} key/value heads", where="config.json"
            )
        if head_dim % 2:
            fields.problem("global_head_dim", f"{head_dim} is odd, and the rotary embedding rotates pairs")
    return sizes


def _per_layer(fields: ConfigFields, decoder: DecoderConfig, layers: int) -> PerLayerInput | None:
    width = fields.integer("hidden_size_per_layer_input", minimum=0)
    rows = fields.integer("vocab_size_per_layer_input")
    if width and rows < decoder.vocab_size:
        fields.problem(
            "vocab_size_per_layer_input", f"tokens from {rows} on have no row in the table of per-layer embeddings"
        )
    return PerLayerInput(width, layers, rows) if width else None
