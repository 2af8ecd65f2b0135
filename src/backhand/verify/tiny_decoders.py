"""Tiny decoders of every family that the engine supports, with random weights.

All sizes differ, there are fewer key/value heads than heads, and heads × head_dim ≠ hidden. Norm weights and biases are
random. Documents are longer than the sliding window and than the original rope length, and local and global rotary
bases differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.decoder.delta_mixer import NORM as DELTA_NORM
from backhand.nn.decoder.weights import DecoderWeights, dense_views, empty_weights, module_shapes
from backhand.nn.families.family import (
    ATTENTION_AND_SSM,
    GATED_DELTA,
    KEYS_AS_VALUES,
    LAYER_SCALAR,
    MLP,
    SHARED_KEYS,
    SHORT_CONV,
    SSM,
    TRAITS,
    VALUE_NORMED,
    DecoderConfig,
    DeltaSizes,
    LayerConfig,
    LayerSizes,
    Mixture,
    Multipliers,
    PerLayerInput,
    QueryScaling,
    RotaryConfig,
    ShortConv,
    SSMSizes,
)
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, TrainedTensor
from backhand.ops.clamped_glu import Clamp
from backhand.ops.logits_rule import LogitsRule
from backhand.verify.scaffold import Draw, Tensors

WINDOW = 4


def rule(rope_type: str, **parameters: Any) -> tuple[tuple[str, Any], ...]:
    """Return a rule for rotary frequencies in the form of `RotaryConfig.scaling`."""
    return (("rope_type", rope_type), *parameters.items())


_LLAMA3 = rule("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=7)
_YARN = rule("yarn", factor=4.0, beta_fast=0.6, beta_slow=0.1, original_max_position_embeddings=7, truncate=False)
_LONGROPE = rule("longrope", short_factor=(1.3, 2.1), long_factor=(1.9, 0.7), original_max_position_embeddings=6)
_FULL, _SLIDING, _CONVOLVED = LayerConfig(), LayerConfig(window=WINDOW), LayerConfig(rotary=None, mixer=SHORT_CONV)
_DELTA = LayerConfig(rotary=None, mixer=GATED_DELTA)
_SSM = LayerConfig(rotary=None, mixer=SSM)
_PARALLEL, _MLP = LayerConfig(mixer=ATTENTION_AND_SSM), LayerConfig(rotary=None, mixer=MLP)

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

_EXPERTS = LayerConfig(experts=True)
_SLIDING_EXPERTS = LayerConfig(window=WINDOW, experts=True)
_SLIDING_BY_THE_OTHER = LayerConfig(window=WINDOW, rotary=1)
_STILL = LayerConfig(rotary=None)


def _tiny(family: str, **overrides: Any) -> DecoderConfig:
    """Return a tiny configuration with the family's traits and these overrides."""
    return replace(LLAMA, family=family, **(TRAITS.get(family, {}) | overrides))


def _gemma4_layer(*, slides: bool, mixer: str = VALUE_NORMED, kv_source: int | None = None) -> LayerConfig:
    sizes = LayerSizes(6 if slides else 8, 2, 18 if kv_source is None else 30)
    return LayerConfig(WINDOW if slides else None, int(slides), mixer=mixer, sizes=sizes, kv_source=kv_source)


def _gemma4(**overrides: Any) -> DecoderConfig:
    overrides |= {"tied_head": True, "attention_scaling": 0.55, "norm_eps": 0.05, "embedding_scaling": 3.7}
    full = RotaryConfig(1000.0, rule("proportional", share=0.5, factor=1.0))
    return _tiny("gemma4_text", logits=LogitsRule(cap=2.3), rotary=(full, RotaryConfig(10.0)), **overrides)


_THREES = {"num_heads": 6, "num_key_value_heads": 3}
_GRANITE = {"embedding_scaling": 2.9, "residual_multiplier": 0.37, "logits": LogitsRule(1 / 1.7)}

FAMILIES: dict[str, DecoderConfig] = {
    "llama": LLAMA,
    "llama 3, tied head": _tiny("llama", tied_head=True, rotary=(RotaryConfig(500.0, _LLAMA3),)),
    "llama, biases everywhere": _tiny("llama", qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral, window": _tiny("mistral", layers=(_SLIDING, _SLIDING)),
    "qwen2, qkv bias, tied head": _tiny("qwen2", tied_head=True, layers=(_FULL, _SLIDING)),
    "qwen3, q/k norm": _tiny("qwen3", **_THREES),
    # The choice of experts is a step function. These names seed inputs at which finite differences do not cross a step.
    "mixtral, two of five experts": _tiny("mixtral", mixture=Mixture(5, 2, 18), layers=(_EXPERTS, _EXPERTS)),
    "qwen3-moe, shares of all, a dense layer": _tiny(
        "qwen3_moe", tied_head=True, mixture=Mixture(7, 3, 9, of_all=True), layers=(_SLIDING_EXPERTS, _FULL), **_THREES
    ),
    "gpt-oss, sinks, biased experts": _tiny(
        "gpt_oss",
        qkv_bias=True,
        output_bias=True,
        rotary=(RotaryConfig(500.0, _YARN, attention_factor=1.3),),
        mixture=Mixture(5, 2, 7, router="mlp.router", bias=True, clamp=Clamp(1.4, 2.6), interleaved=True),
        layers=(_SLIDING_EXPERTS, _EXPERTS),
    ),
    "granite, four multipliers": _tiny("granite", tied_head=True, **_GRANITE),
    "granite 4, fused, no rotary": _tiny("granitemoehybrid", layers=(_STILL, _STILL), **_GRANITE),
    "granite 4, two of five experts next to the mlp": _tiny(
        "granitemoehybrid",
        mixture=Mixture(5, 2, 9, router="mlp.router", with_mlp=True),
        layers=(_EXPERTS, _EXPERTS),
        **_GRANITE,
    ),
    "smollm3, a layer without rotary": _tiny("smollm3", tied_head=True, layers=(replace(_SLIDING, rotary=None), _FULL)),
    "olmo2, norms after, q/k norm over all heads": _tiny("olmo2", **_THREES),
    "olmo3, yarn": _tiny(
        "olmo3",
        layers=(_SLIDING_BY_THE_OTHER, _FULL),
        rotary=(RotaryConfig(500.0, _YARN, attention_factor=1.3), RotaryConfig(50.0)),
    ),
    "exaone4, norms after, a layer without rotary": _tiny(
        "exaone4", tied_head=True, layers=(_STILL, _SLIDING), rotary=(RotaryConfig(500.0, _LLAMA3),)
    ),
    "phi3, fused, longrope, part of the features": _tiny(
        "phi3", rotary=(RotaryConfig(100.0, _LONGROPE, attention_factor=1.2, features=4),)
    ),
    "ministral3, scaled queries": _tiny(
        "ministral3", query_scaling=QueryScaling(0.4, 3), rotary=(RotaryConfig(100.0, _YARN, attention_factor=0.9),)
    ),
    "glm4, neighbours turned": _tiny(
        "glm4", qkv_bias=True, rotary=(RotaryConfig(100.0, features=4, interleaved=True),)
    ),
    "qwen3.5, delta rule and gated attention": _tiny(
        "qwen3_5_text",
        norm_eps=0.02,
        delta=DeltaSizes(key_heads=2, value_heads=4, key_width=5, value_width=7, taps=3),
        layers=(_DELTA, _FULL, _DELTA),
        rotary=(RotaryConfig(100.0, features=4),),
        **_THREES,
    ),
    "lfm2, short convolutions": _tiny(
        "lfm2", tied_head=True, short_conv=ShortConv(taps=3), layers=(_CONVOLVED, _FULL, _CONVOLVED)
    ),
    "lfm2, biases, attention above": _tiny("lfm2", short_conv=ShortConv(taps=4, bias=True), layers=(_CONVOLVED, _FULL)),
    "granite 4 h, mamba of one group": _tiny(
        "granitemoehybrid",
        norm_eps=0.1,
        ssm=SSMSizes(heads=3, head_width=5, groups=1, state_width=4, taps=3),
        layers=(_SSM, _STILL, _SSM),
        **_GRANITE,
    ),
    "bamba, mamba of several groups": _tiny(
        "bamba",
        norm_eps=0.1,
        tied_head=True,
        ssm=SSMSizes(4, 5, groups=2, state_width=3, taps=4, conv_bias=False, bias=True, time_steps=(0.2, 1.1)),
        layers=(_SSM, _FULL),
        rotary=(RotaryConfig(100.0, features=4),),
    ),
    "falcon-h1, mamba next to attention": _tiny(
        "falcon_h1",
        ssm=SSMSizes(3, 4, groups=1, state_width=5, taps=3, norm=None),
        multipliers=Multipliers(0.6, 1.4, gate=0.8, down=1.7, ssm=(0.9, 1.3, 0.7, 1.6, 1.2)),
        layers=(_PARALLEL, _PARALLEL),
        logits=LogitsRule(0.4),
        embedding_scaling=1.9,
    ),
    "falcon-h1, norm before the gate": _tiny(
        "falcon_h1",
        norm_eps=0.1,
        ssm=SSMSizes(4, 5, groups=2, state_width=3, taps=4, norm="before_gate"),
        layers=(_PARALLEL,),
    ),
    "nemotron-h, one sublayer a block": _tiny(
        "nemotron_h",
        norm_eps=0.1,
        mlp_bias=True,
        ssm=SSMSizes(4, 5, groups=2, state_width=3, taps=3, bias=True, time_steps=(0.5, inf)),
        layers=(_SSM, _MLP, _STILL),
        rotary=(),
    ),
    "gemma2, capped": _tiny(
        "gemma2",
        tied_head=True,
        layers=(_SLIDING, _FULL),
        attention_cap=0.9,
        logits=LogitsRule(cap=2.3),
        embedding_scaling=1.9,
    ),
    "gemma3": _tiny(
        "gemma3_text",
        tied_head=True,
        layers=(_SLIDING_BY_THE_OTHER, _FULL, _SLIDING_BY_THE_OTHER),
        rotary=(RotaryConfig(1000.0, rule("linear", factor=2.0)), RotaryConfig(10.0)),
        embedding_scaling=3.7,
    ),
    # Keys and values of both kinds of layers are used by two other layers.
    "gemma4, shared keys, inputs of layers": _gemma4(
        per_layer=PerLayerInput(5, 6, LLAMA.vocab_size),
        layers=(
            _gemma4_layer(slides=True),
            _gemma4_layer(slides=False),
            *(_gemma4_layer(slides=not source, mixer=SHARED_KEYS, kv_source=source) for source in (0, 1, 0, 1)),
        ),
    ),
    "gemma4, values made of keys": _gemma4(
        qkv_bias=True, layers=(_gemma4_layer(slides=False, mixer=KEYS_AS_VALUES), _gemma4_layer(slides=True))
    ),
    "gemma3, both directions": _tiny(
        "gemma3_text",
        causal=False,
        has_head=False,
        layers=(_SLIDING_BY_THE_OTHER, _FULL),
        rotary=(RotaryConfig(1000.0), RotaryConfig(10.0)),
        embedding_scaling=3.7,
    ),
    "bert": _tiny("bert", activation="gelu", rotary=(), layers=(_STILL, _STILL)),
    "modernbert": _tiny(
        "modernbert",
        activation="gelu",
        layers=(replace(_FULL, input_norm=False), _SLIDING_BY_THE_OTHER),
        rotary=(RotaryConfig(1000.0), RotaryConfig(10.0)),
    ),
    "modernbert, biases": _tiny(
        "modernbert",
        activation="gelu_tanh",
        norm_bias=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        layers=(replace(_SLIDING_BY_THE_OTHER, input_norm=False), _FULL),
        rotary=(RotaryConfig(1000.0), RotaryConfig(10.0)),
    ),
}


def family_of(name: str) -> DecoderConfig:
    """Return the configuration in `FAMILIES` with this name, or the only one whose name begins with it."""
    (key,) = {name: FAMILIES[name]} if name in FAMILIES else {key for key in FAMILIES if key.startswith(name)}
    return FAMILIES[key]


def random_weights(config: DecoderConfig, draw: Draw) -> Tensors:
    """Return every frozen tensor by its Hugging Face name, float64, of sizes that keep activations near one."""
    weights: Tensors = {}
    for name, view in dense_views(empty_weights(config, torch.float64), config):
        if view.ndim > 1:
            weights[name] = draw.normal(*view.shape, size=1.0 if "embed" in name else view.shape[1] ** -0.5)
        else:
            is_norm = name.endswith(("norm.weight", "LayerNorm.weight", LAYER_SCALAR))
            offset = 0.0 if name.endswith(f"{DELTA_NORM}.weight") else config.norm_offset
            weights[name] = draw.normal(*view.shape, size=0.3) + (1.0 - offset if is_norm else 0.0)
    return weights


def engine_weights(config: DecoderConfig, tensors: Tensors) -> DecoderWeights:
    """Return the engine's stacked form of weights by name, in their dtype and on their device."""
    table = tensors[f"{config.embedding}.weight"]
    weights = empty_weights(config, table.dtype, table.device)
    for name, view in dense_views(weights, config):
        view.copy_(tensors[name])
    return weights


def adapter_slots(config: DecoderConfig, targets: str | None, dropout: float = 0.0) -> dict[str, LoRASlot]:
    """Return a slot with mixed ranks and scalings for every module, or expert parameter, whose name ends in a target.

    Args:
        targets: name endings separated by spaces, None for all modules except the head.
        dropout: dropout of all slots but those of experts.
    """
    shapes = module_shapes(config)
    modules = {name: (0, *sides) for name, sides in shapes.items()} | shapes.experts
    slots: dict[str, LoRASlot] = {}
    for index, (name, (experts, out_features, in_features)) in enumerate(modules.items()):
        if name != HEAD if targets is None else name.endswith(tuple(targets.split())):
            rank, scaling = 2 + index % 3, (1.7, 0.6, 2.3)[index % 3]
            slot = LoRASlot(name, in_features, out_features, rank, scaling, 0.0 if experts else dropout)
            slots[name] = replace(slot, experts=experts, interleaved=name in shapes.interleaved)
    return slots


def random_factors(slots: Mapping[str, LoRASlot], draw: Draw) -> Tensors:
    """Return random float64 values of every slot's trained tensors, none equal to its initial value."""
    factors: Tensors = {}
    for name, slot in slots.items():
        for part, shape in slot.shapes().items():
            size = {"lora_A": 1.0 if slot.embedding else slot.in_features**-0.5, "lora_B": 0.4}.get(part, 0.3)
            factors[f"{name}.{part}"] = draw.normal(*shape, size=size) + (1.0 if part == "lora_magnitude" else 0.0)
    return factors


def lora_parameters(
    slots: Mapping[str, LoRASlot], tensors: Tensors, like: Tensor, trained: tuple[TrainedTensor, ...] = ()
) -> LoRAParameters:
    """Return the factors of a case in the engine's flat buffer, float32 or wider, with the compute dtype of `like`."""
    wide = torch.promote_types(like.dtype, torch.float32)
    lora = LoRAParameters(slots.values(), full_tensors=trained, device=like.device, dtype=wide)
    for name, view in lora.named_tensors():
        view.copy_(tensors[name])
    lora.refresh_compute(like.dtype)
    return lora


def random_batch(config: DecoderConfig, lengths: tuple[int, ...], draw: Draw) -> PackedBatch:
    """Return random segments. About a third of the positions, and the last of each segment, have no loss."""
    input_ids = draw.integers(config.vocab_size, sum(lengths))
    labels = [input_ids[:0]]
    for segment in input_ids.split(list(lengths)):
        targets = torch.full_like(segment, IGNORE_INDEX)
        targets[:-1] = segment[1:]
        labels.append(targets.masked_fill(draw.integers(3, len(segment)) == 0, IGNORE_INDEX))
    return PackedBatch(input_ids, torch.cat(labels), lengths)
