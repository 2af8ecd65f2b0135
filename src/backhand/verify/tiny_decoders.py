"""Tiny decoders of every family the engine knows, as data, with random weights: what block and decoder proofs run on.

No two sizes alike, fewer key/value heads than heads, heads × head_dim ≠ hidden, norm weights and biases random,
documents longer than the sliding window and than the original rope length, different local and global rotary bases.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.delta_mixer import NORM as DELTA_NORM
from backhand.nn.decoder.family import (
    FUSED_GATE_UP,
    FUSED_QKV,
    GATED_DELTA,
    GLM4_NORMS,
    GRANITE4_GROUPS,
    GROUPS,
    KEYS_AS_VALUES,
    LAYER_SCALAR,
    LFM2_GROUPS,
    LFM2_NORMS,
    LFM2_QK_NORMS,
    NORMS_AFTER,
    SANDWICH_NORMS,
    SHARED_KEYS,
    SHORT_CONV,
    VALUE_NORMED,
    DecoderConfig,
    DeltaSizes,
    LayerConfig,
    LayerSizes,
    Mixture,
    PerLayerInput,
    QueryScaling,
    RotaryConfig,
    ShortConv,
)
from backhand.nn.decoder.weights import DecoderWeights, dense_views, empty_weights, module_shapes
from backhand.nn.lora_parameters import LoRASlot
from backhand.ops.clamped_glu import Clamp
from backhand.ops.logits_rule import LogitsRule
from backhand.verify.case import Draw, Tensors

WINDOW = 4

_LLAMA3 = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 7),
)

_YARN = (
    ("rope_type", "yarn"),
    ("factor", 4.0),
    ("beta_fast", 0.6),
    ("beta_slow", 0.1),
    ("original_max_position_embeddings", 7),
    ("truncate", False),
)

_LONGROPE = (
    ("rope_type", "longrope"),
    ("short_factor", (1.3, 2.1)),
    ("long_factor", (1.9, 0.7)),
    ("original_max_position_embeddings", 6),
)

_FULL, _SLIDING, _CONVOLVED = LayerConfig(), LayerConfig(window=WINDOW), LayerConfig(rotary=None, mixer=SHORT_CONV)
_DELTA = LayerConfig(rotary=None, mixer=GATED_DELTA)

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=23,
    hidden_size=14,
    intermediate_size=18,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    norm_eps=1e-3,
    layers=(_FULL, _FULL),
    rotary=(RotaryConfig(theta=100.0),),
    attention_scaling=0.45,
    tied_head=False,
    max_position_embeddings=64,
)

FAMILIES: dict[str, DecoderConfig] = {
    "llama": LLAMA,
    "llama 3, tied head": replace(LLAMA, tied_head=True, rotary=(RotaryConfig(500.0, _LLAMA3),)),
    "llama, biases everywhere": replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral, window": replace(LLAMA, family="mistral", layers=(_SLIDING, _SLIDING)),
    "qwen2, qkv bias, tied head": replace(
        LLAMA, family="qwen2", qkv_bias=True, tied_head=True, layers=(_FULL, _SLIDING)
    ),
    "qwen3, q/k norm": replace(LLAMA, family="qwen3", qk_norm="head", num_heads=6, num_key_value_heads=3),
    # Which experts are chosen is a step function: what is drawn under these names lies where no difference crosses it.
    "mixtral, two of five experts": replace(
        LLAMA,
        family="mixtral",
        mixture=Mixture(5, 2, 18),
        layers=(LayerConfig(experts=True), LayerConfig(experts=True)),
    ),
    "qwen3-moe, shares of all, a dense layer": replace(
        LLAMA,
        family="qwen3_moe",
        tied_head=True,
        qk_norm="head",
        num_heads=6,
        num_key_value_heads=3,
        mixture=Mixture(7, 3, 9, of_all=True),
        layers=(LayerConfig(window=WINDOW, experts=True), _FULL),
    ),
    "gpt-oss, sinks, biased experts": replace(
        LLAMA,
        family="gpt_oss",
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        rotary=(RotaryConfig(500.0, _YARN, attention_factor=1.3),),
        mixture=Mixture(5, 2, 7, router="mlp.router", bias=True, clamp=Clamp(1.4, 2.6), interleaved=True),
        layers=(LayerConfig(window=WINDOW, experts=True), LayerConfig(experts=True)),
    ),
    "granite, four multipliers": replace(
        LLAMA,
        family="granite",
        tied_head=True,
        embedding_scaling=2.9,
        residual_multiplier=0.37,
        logits=LogitsRule(1 / 1.7),
    ),
    "granite 4, fused, no rotary": replace(
        LLAMA,
        family="granitemoehybrid",
        groups=GRANITE4_GROUPS,
        embedding_scaling=2.9,
        residual_multiplier=0.37,
        logits=LogitsRule(1 / 1.7),
        layers=(LayerConfig(rotary=None), LayerConfig(rotary=None)),
    ),
    "smollm3, a layer without rotary": replace(
        LLAMA, family="smollm3", tied_head=True, layers=(LayerConfig(window=WINDOW, rotary=None), _FULL)
    ),
    "olmo2, norms after, q/k norm over all heads": replace(
        LLAMA, family="olmo2", norms=NORMS_AFTER, qk_norm="width", num_heads=6, num_key_value_heads=3
    ),
    "olmo3, yarn": replace(
        LLAMA,
        family="olmo3",
        norms=NORMS_AFTER,
        qk_norm="width",
        layers=(LayerConfig(window=WINDOW, rotary=1), LayerConfig(rotary=0)),
        rotary=(RotaryConfig(500.0, _YARN, attention_factor=1.3), RotaryConfig(50.0)),
    ),
    "exaone4, norms after, a layer without rotary": replace(
        LLAMA,
        family="exaone4",
        tied_head=True,
        norms=NORMS_AFTER,
        qk_norm="head",
        layers=(LayerConfig(rotary=None), _SLIDING),
        rotary=(RotaryConfig(500.0, _LLAMA3),),
    ),
    "phi3, fused, longrope, part of the features": replace(
        LLAMA,
        family="phi3",
        groups=((FUSED_QKV,), GROUPS[1], (FUSED_GATE_UP,), GROUPS[3]),
        rotary=(RotaryConfig(100.0, _LONGROPE, attention_factor=1.2, features=4),),
    ),
    "ministral3, scaled queries": replace(
        LLAMA,
        family="ministral3",
        query_scaling=QueryScaling(0.4, 3),
        rotary=(RotaryConfig(100.0, _YARN, attention_factor=0.9),),
    ),
    "glm4, neighbours turned": replace(
        LLAMA,
        family="glm4",
        qkv_bias=True,
        groups=(*GROUPS[:2], (FUSED_GATE_UP,), GROUPS[3]),
        norms=GLM4_NORMS,
        rotary=(RotaryConfig(100.0, features=4, interleaved=True),),
    ),
    "qwen3.5, delta rule and gated attention": replace(
        LLAMA,
        family="qwen3_5_text",
        num_heads=6,
        num_key_value_heads=3,
        norm_eps=0.02,
        norm_offset=1.0,
        qk_norm="head",
        attention_gate=True,
        delta=DeltaSizes(key_heads=2, value_heads=4, key_width=5, value_width=7, taps=3),
        layers=(_DELTA, _FULL, _DELTA),
        rotary=(RotaryConfig(100.0, features=4),),
    ),
    "lfm2, short convolutions": replace(
        LLAMA,
        family="lfm2",
        tied_head=True,
        groups=LFM2_GROUPS,
        norms=LFM2_NORMS,
        final_norm="model.embedding_norm",
        qk_norm="head",
        qk_norms=LFM2_QK_NORMS,
        short_conv=ShortConv(taps=3),
        layers=(_CONVOLVED, _FULL, _CONVOLVED),
    ),
    "lfm2, biases, attention above": replace(
        LLAMA,
        family="lfm2",
        groups=LFM2_GROUPS,
        norms=LFM2_NORMS,
        final_norm="model.embedding_norm",
        qk_norm="head",
        qk_norms=LFM2_QK_NORMS,
        short_conv=ShortConv(taps=4, bias=True),
        layers=(_CONVOLVED, _FULL),
    ),
    "gemma2, capped": replace(
        LLAMA,
        family="gemma2",
        tied_head=True,
        layers=(_SLIDING, _FULL),
        norm_offset=1.0,
        norms=SANDWICH_NORMS,
        activation="gelu_tanh",
        attention_cap=0.9,
        logits=LogitsRule(cap=2.3),
        embedding_scaling=1.9,
    ),
    "gemma3": replace(
        LLAMA,
        family="gemma3_text",
        tied_head=True,
        layers=(LayerConfig(window=WINDOW, rotary=1), LayerConfig(rotary=0), LayerConfig(window=WINDOW, rotary=1)),
        rotary=(RotaryConfig(1000.0, (("rope_type", "linear"), ("factor", 2.0))), RotaryConfig(10.0)),
        norm_offset=1.0,
        norms=SANDWICH_NORMS,
        qk_norm="head",
        activation="gelu_tanh",
        embedding_scaling=3.7,
    ),
}


_GEMMA4 = replace(
    LLAMA,
    family="gemma4_text",
    tied_head=True,
    norms=SANDWICH_NORMS,
    qk_norm="head",
    activation="gelu_tanh",
    attention_scaling=0.55,
    norm_eps=0.05,
    embedding_scaling=3.7,
    logits=LogitsRule(cap=2.3),
    rotary=(RotaryConfig(1000.0, (("rope_type", "proportional"), ("share", 0.5), ("factor", 1.0))), RotaryConfig(10.0)),
    value_norm=True,
    layer_scalar=True,
)


def _gemma4_layer(*, slides: bool, mixer: str = VALUE_NORMED, keys_of: int | None = None) -> LayerConfig:
    sizes = LayerSizes(6 if slides else 8, 2, 18 if keys_of is None else 30)
    return LayerConfig(WINDOW if slides else None, int(slides), mixer=mixer, sizes=sizes, keys_of=keys_of)


FAMILIES |= {
    # The keys and values of either kind of layer have two users.
    "gemma4, shared keys, inputs of layers": replace(
        _GEMMA4,
        per_layer=PerLayerInput(5, 6, LLAMA.vocab_size),
        layers=(
            _gemma4_layer(slides=True),
            _gemma4_layer(slides=False),
            _gemma4_layer(slides=True, mixer=SHARED_KEYS, keys_of=0),
            _gemma4_layer(slides=False, mixer=SHARED_KEYS, keys_of=1),
            _gemma4_layer(slides=True, mixer=SHARED_KEYS, keys_of=0),
            _gemma4_layer(slides=False, mixer=SHARED_KEYS, keys_of=1),
        ),
    ),
    "gemma4, values made of keys": replace(
        _GEMMA4,
        qkv_bias=True,
        layers=(_gemma4_layer(slides=False, mixer=KEYS_AS_VALUES), _gemma4_layer(slides=True)),
    ),
}


def family_of(name: str) -> DecoderConfig:
    """The family of `FAMILIES` called so, or the only one whose name begins so."""
    (found,) = {name: FAMILIES[name]} if name in FAMILIES else {key for key in FAMILIES if key.startswith(name)}
    return FAMILIES[found]


def random_weights(config: DecoderConfig, draw: Draw) -> Tensors:
    """Every frozen tensor by its Hugging Face name, float64, of sizes that keep activations near one."""
    weights: Tensors = {}
    for name, view in dense_views(empty_weights(config, torch.float64), config):
        if view.ndim > 1:
            weights[name] = draw.normal(*view.shape, size=1.0 if "embed" in name else view.shape[1] ** -0.5)
        else:
            is_norm = name.endswith(("norm.weight", LAYER_SCALAR))
            offset = 0.0 if name.endswith(f"{DELTA_NORM}.weight") else config.norm_offset
            weights[name] = draw.normal(*view.shape, size=0.3) + (1.0 - offset if is_norm else 0.0)
    return weights


def engine_weights(config: DecoderConfig, tensors: Tensors) -> DecoderWeights:
    """The engine's stacked form of weights by name, in their dtype and on their device."""
    table = tensors["model.embed_tokens.weight"]
    weights = empty_weights(config, table.dtype, table.device)
    for name, view in dense_views(weights, config):
        view.copy_(tensors[name])
    return weights


def adapter_slots(config: DecoderConfig, targets: tuple[str, ...] | None, dropout: float = 0.0) -> dict[str, LoRASlot]:
    """A slot for every module that ends in one of the targets (None: all but the head), of mixed ranks and scalings.

    Parameters of experts are among them, without dropout.
    """
    shapes = module_shapes(config)
    modules = [(name, 0, *sides) for name, sides in shapes.items()]
    slots: dict[str, LoRASlot] = {}
    for index, (name, experts, out_features, in_features) in enumerate(
        [*modules, *((name, *sides) for name, sides in shapes.experts.items())]
    ):
        wanted = name != "lm_head" if targets is None else name.endswith(targets)
        if wanted:
            rank, scaling = 2 + index % 3, (1.7, 0.6, 2.3)[index % 3]
            own = 0.0 if experts else dropout
            turns = name in shapes.interleaved
            slots[name] = LoRASlot(
                name, in_features, out_features, rank, scaling, own, experts=experts, interleaved=turns
            )
    return slots


def random_factors(slots: dict[str, LoRASlot], draw: Draw) -> Tensors:
    """What is trained of every slot, nothing of it where it starts, float64."""
    factors: Tensors = {}
    for name, slot in slots.items():
        for part, shape in slot.shapes().items():
            size = {"lora_A": 1.0 if slot.embedding else slot.in_features**-0.5, "lora_B": 0.4}.get(part, 0.3)
            factors[f"{name}.{part}"] = draw.normal(*shape, size=size) + (1.0 if part == "lora_magnitude" else 0.0)
    return factors


def random_batch(
    config: DecoderConfig, lengths: tuple[int, ...], draw: Draw, parents: tuple[int, ...] = ()
) -> PackedBatch:
    """Random segments, about a third of their positions without loss, and always the last one of each."""
    input_ids = draw.integers(config.vocab_size, sum(lengths))
    labels = [input_ids[:0]]
    for segment in input_ids.split(list(lengths)):
        targets = torch.full_like(segment, IGNORE_INDEX)
        targets[:-1] = segment[1:]
        labels.append(targets.masked_fill(draw.integers(3, len(segment)) == 0, IGNORE_INDEX))
    return PackedBatch(input_ids, torch.cat(labels), lengths, parents)
