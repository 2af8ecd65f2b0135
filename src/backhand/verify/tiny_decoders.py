"""Tiny decoders of every family the engine knows, with random weights, and one training step of them as an op.

No two sizes alike, fewer key/value heads than heads, heads × head_dim ≠ hidden, norm weights and biases random,
documents longer than the sliding window and than the original rope length, different local and global rotary bases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import EMBEDDING
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.delta_mixer import NORM as DELTA_NORM
from backhand.nn.decoder.family import (
    GATED_DELTA,
    KEYS_AS_VALUES,
    LAYER_SCALAR,
    SHARED_KEYS,
    SHORT_CONV,
    TRAITS,
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
from backhand.nn.decoder.weights import BlockWeights, DecoderWeights, dense_views, empty_weights, module_shapes
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot, TrainedTensor
from backhand.ops.clamped_glu import Clamp
from backhand.ops.logits_rule import LogitsRule
from backhand.verify.mutants import Backward
from backhand.verify.reference_decoder import ReferenceAdapter, reference_loss
from backhand.verify.scaffold import Arguments, Draw, Op, Tensors

WINDOW = 4


def rule(rope_type: str, **parameters: Any) -> tuple[tuple[str, Any], ...]:
    """Of rotary frequencies."""
    return (("rope_type", rope_type), *parameters.items())


_LLAMA3 = rule("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=7)
_YARN = rule("yarn", factor=4.0, beta_fast=0.6, beta_slow=0.1, original_max_position_embeddings=7, truncate=False)
_LONGROPE = rule("longrope", short_factor=(1.3, 2.1), long_factor=(1.9, 0.7), original_max_position_embeddings=6)
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

_EXPERTS = LayerConfig(experts=True)
_SLIDING_EXPERTS = LayerConfig(window=WINDOW, experts=True)
_SLIDING_BY_THE_OTHER = LayerConfig(window=WINDOW, rotary=1)
_STILL = LayerConfig(rotary=None)


def _tiny(family: str, **own: Any) -> DecoderConfig:
    """What the family has by its name, and what is said."""
    return replace(LLAMA, family=family, **(TRAITS.get(family, {}) | own))


def _gemma4_layer(*, slides: bool, mixer: str = VALUE_NORMED, kv_source: int | None = None) -> LayerConfig:
    sizes = LayerSizes(6 if slides else 8, 2, 18 if kv_source is None else 30)
    return LayerConfig(WINDOW if slides else None, int(slides), mixer=mixer, sizes=sizes, kv_source=kv_source)


def _gemma4(**own: Any) -> DecoderConfig:
    own |= {"tied_head": True, "attention_scaling": 0.55, "norm_eps": 0.05, "embedding_scaling": 3.7}
    full = RotaryConfig(1000.0, rule("proportional", share=0.5, factor=1.0))
    return _tiny("gemma4_text", logits=LogitsRule(cap=2.3), rotary=(full, RotaryConfig(10.0)), **own)


_THREES = {"num_heads": 6, "num_key_value_heads": 3}
_GRANITE = {"embedding_scaling": 2.9, "residual_multiplier": 0.37, "logits": LogitsRule(1 / 1.7)}

FAMILIES: dict[str, DecoderConfig] = {
    "llama": LLAMA,
    "llama 3, tied head": _tiny("llama", tied_head=True, rotary=(RotaryConfig(500.0, _LLAMA3),)),
    "llama, biases everywhere": _tiny("llama", qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral, window": _tiny("mistral", layers=(_SLIDING, _SLIDING)),
    "qwen2, qkv bias, tied head": _tiny("qwen2", tied_head=True, layers=(_FULL, _SLIDING)),
    "qwen3, q/k norm": _tiny("qwen3", **_THREES),
    # Which experts are chosen is a step function: what is drawn under these names lies where no difference crosses it.
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
    # The keys and values of either kind of layer have two users.
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


def adapter_slots(config: DecoderConfig, targets: str | None, dropout: float = 0.0) -> dict[str, LoRASlot]:
    """A slot for every module that ends in one of the targets (None: all but the head), of mixed ranks and scalings.

    Targets are apart by blanks. Parameters of experts are among them, without dropout.
    """
    shapes = module_shapes(config)
    modules = {name: (0, *sides) for name, sides in shapes.items()} | shapes.experts
    slots: dict[str, LoRASlot] = {}
    for index, (name, (experts, out_features, in_features)) in enumerate(modules.items()):
        if name != "lm_head" if targets is None else name.endswith(tuple(targets.split())):
            rank, scaling = 2 + index % 3, (1.7, 0.6, 2.3)[index % 3]
            slot = LoRASlot(name, in_features, out_features, rank, scaling, 0.0 if experts else dropout)
            slots[name] = replace(slot, experts=experts, interleaved=name in shapes.interleaved)
    return slots


def random_factors(slots: Mapping[str, LoRASlot], draw: Draw) -> Tensors:
    """What is trained of every slot, nothing of it where it starts, float64."""
    factors: Tensors = {}
    for name, slot in slots.items():
        for part, shape in slot.shapes().items():
            size = {"lora_A": 1.0 if slot.embedding else slot.in_features**-0.5, "lora_B": 0.4}.get(part, 0.3)
            factors[f"{name}.{part}"] = draw.normal(*shape, size=size) + (1.0 if part == "lora_magnitude" else 0.0)
    return factors


def lora_parameters(
    slots: Mapping[str, LoRASlot], tensors: Tensors, like: Tensor, trained: tuple[TrainedTensor, ...] = ()
) -> LoRAParameters:
    """The factors of a case in the engine's flat buffer: float32 or wider, used in the dtype of `like`."""
    wide = torch.promote_types(like.dtype, torch.float32)
    lora = LoRAParameters(slots.values(), trained=trained, device=like.device, dtype=wide)
    for name, view in lora.named_tensors():
        view.copy_(tensors[name])
    lora.refresh_compute(like.dtype)
    return lora


def random_batch(config: DecoderConfig, lengths: tuple[int, ...], draw: Draw) -> PackedBatch:
    """Random segments, about a third of their positions without loss, and always the last one of each."""
    input_ids = draw.integers(config.vocab_size, sum(lengths))
    labels = [input_ids[:0]]
    for segment in input_ids.split(list(lengths)):
        targets = torch.full_like(segment, IGNORE_INDEX)
        targets[:-1] = segment[1:]
        labels.append(targets.masked_fill(draw.integers(3, len(segment)) == 0, IGNORE_INDEX))
    return PackedBatch(input_ids, torch.cat(labels), lengths)


# ---------------------------------------------------------------------------------------------------------------------
# One training step on random documents: by hand, and the reference, for any family and adapter.
#
# DoRA's norm is held constant in the gradient while the step takes it anew from the factors, so finite differences,
# which would vary it, leave lora_A and lora_B out in those cases; `dora_linear` tries them with the norm as an input.


LOSS_SCALING = 0.043
DROPOUT_SEED = 12345
BASE = "base "
"""In front of frozen tensors' names; a tensor that is trained has the name of the base's whose place it takes."""


class DecoderInputs(NamedTuple):
    """What one training step is given."""

    decoder: Decoder
    lora: LoRAParameters
    batch: PackedBatch
    loss_scaling: float
    dropout_seed: int | None


class DecoderGrads(NamedTuple):
    """The step's loss, and the gradients of each kind of trained tensor, in the order of the buffer."""

    loss: Tensor
    d_lora_A: tuple[Tensor, ...]
    d_lora_B: tuple[Tensor, ...]
    d_lora_bias: tuple[Tensor, ...]
    d_lora_magnitude: tuple[Tensor, ...]
    d_weight: tuple[Tensor, ...]
    d_bias: tuple[Tensor, ...]
    d_trainable_tokens: tuple[Tensor, ...]


KINDS = DecoderGrads._fields[1:]


def _names(lora: LoRAParameters, kind: str) -> list[str]:
    """The trained tensors of a kind, `d_lora_A` for those called lora_A."""
    return [name for name, _ in lora.named_tensors() if f"d_{name.rpartition('.')[2]}" == kind]


def decoder_step(_d_y: Tensor, inputs: DecoderInputs) -> DecoderGrads:
    """The engine's training step; the loss's gradient is the loss scaling."""
    decoder, lora, batch, loss_scaling, dropout_seed = inputs
    decoder.attach(lora)
    lora.gradients.zero_()
    loss = decoder.loss_and_gradients(batch, loss_scaling, dropout_seed)
    return DecoderGrads(loss, *(tuple(lora.gradient(name).clone() for name in _names(lora, kind)) for kind in KINDS))


def per_token(gradients: tuple[Tensor, ...], inputs: DecoderInputs) -> tuple[Tensor, ...]:
    """The gradients of the mean in place of the sum."""
    return tuple(gradient / max(inputs.batch.supervised_tokens, 1) for gradient in gradients)


@cache
def _slots(
    family: str, targets: str | None, whole: str, use_dora: bool, lora_bias: bool, dropout: float
) -> Mapping[str, LoRASlot]:
    """Those of modules that are not trained in full."""
    config = family_of(family)
    slots = {
        name: slot if slot.experts else replace(slot, use_dora=use_dora, lora_bias=lora_bias)
        for name, slot in adapter_slots(config, targets, dropout).items()
    }
    if targets is not None and EMBEDDING.endswith(tuple(targets.split())):
        sizes = config.vocab_size, config.hidden_size
        slots[EMBEDDING] = LoRASlot(EMBEDDING, *sizes, 3, 1.3, 0.0, use_dora, embedding=True)
    return {name: slot for name, slot in slots.items() if not f"{name}.weight".endswith(tuple(whole.split()))}


@cache
def _trained(family: str, whole: str, tokens: tuple[int, ...]) -> tuple[TrainedTensor, ...]:
    """The tensors trained as they are."""
    config = family_of(family)
    shapes, ends = module_shapes(config).parameters, tuple(whole.split())
    rows = TrainedTensor(f"{EMBEDDING}.{TOKENS}", (len(tokens), config.hidden_size), tokens)
    found = tuple(TrainedTensor(name, shape) for name, shape in shapes.items() if name.endswith(ends))
    return (*found, rows) if tokens else found


def _ids(draw: Draw, config: DecoderConfig, lengths: tuple[int, ...], supervised: bool) -> Tensors:
    batch = random_batch(config, lengths, draw)
    labels = batch.labels if supervised else torch.full_like(batch.labels, IGNORE_INDEX)
    return {"ids": batch.input_ids, "labels": labels}


def _batch(ids: Tensor, labels: Tensor, lengths: tuple[int, ...], parents: tuple[int, ...], shared: int) -> PackedBatch:
    return PackedBatch(ids, labels, lengths, (-1, *(0,) * (len(lengths) - 1)) if shared else parents)


def _values(draw: Draw, trained: tuple[TrainedTensor, ...], base: Tensors) -> Tensors:
    """Tensors that are trained as they are, moved away from the base's."""
    values: Tensors = {}
    for tensor in trained:
        start = base.get(tensor.base_name, base[f"{EMBEDDING}.weight"])
        start = start if tensor.token_ids is None else start[list(tensor.token_ids)]
        values[tensor.name] = start + draw.normal(*tensor.shape, size=0.2)
    return values


def _step(t: Arguments, backward: Backward) -> tuple[Tensor, Tensors]:
    weights = engine_weights(t["config"], t["base"])
    lora = lora_parameters(t["slots"], t, weights.final_norm, t["trained"])
    decoder = Decoder(t["config"], weights, recompute=t["recompute"])
    grads = backward(t["d_y"], DecoderInputs(decoder, lora, t["batch"], float(t["d_y"]), t["dropout_seed"]))
    several, loss = ((_names(lora, kind), getattr(grads, kind)) for kind in KINDS), grads.loss
    if decoder.lora is None:  # the backward was left out, for the forward alone
        decoder.attach(lora)
        loss = decoder.token_losses(t["batch"], t["dropout_seed"]).sum(dtype=torch.float64)
    return loss, {name: d for names, ds in several for name, d in zip(names, ds, strict=True)}


def _reference(args: Arguments, base: Tensors, config: DecoderConfig, batch: PackedBatch) -> Tensor:
    trained = {tensor.name: tensor for tensor in args["trained"]}
    return reference_loss(base, config, batch, ReferenceAdapter(args["slots"], args, args["dropout_seed"], trained))


def decoder_op(
    name: str, documents: tuple[int, ...], targets: str | None = None, gradients: tuple[str, ...] = KINDS
) -> Op:
    """A step of a tiny decoder as an op.

    Its options: `family` as in `family_of`; `documents` and `parents`, the segments as in `PackedBatch`; `shared`,
    tokens of one more segment, which all of them continue; `supervised`, False to mask every label; `recompute` and
    `dropout` as in a run. What is trained: `targets`, ends of the adapted modules' names, apart by blanks, None for all
    but the head; `whole`, ends of the names of tensors that are trained as they are, likewise; `tokens`, rows of the
    embedding that are trained; `use_dora` and `lora_bias` of every adapted module but experts.

    Args:
        documents, targets: the usual ones.
    """
    return Op(
        name,
        dict(ids=_ids, base=lambda draw, config: {f"{BASE}{n}": w for n, w in random_weights(config, draw).items()})
        | dict(factors=lambda draw, slots: random_factors(slots, draw), values=_values)
        | dict(d_y=lambda: torch.tensor(LOSS_SCALING, dtype=torch.float64)),
        dict(family=..., targets=targets, whole="", tokens=(), use_dora=False, lora_bias=False, dropout=0.0)
        | dict(documents=documents, shared=0, parents=(), recompute="none", supervised=True),
        derived={
            "config": lambda family: family_of(family),  # noqa: PLW0108 - by this name
            "lengths": lambda documents, shared: (shared, *documents) if shared else documents,
            "batch": _batch,
            "base": lambda args: {key.removeprefix(BASE): args[key] for key in args if key.startswith(BASE)},
            "slots": _slots,
            "trained": _trained,
            "dropout_seed": lambda dropout: DROPOUT_SEED if dropout else None,
        },
        runner=_step,
        backward=decoder_step,
        reference=_reference,
        pooled=True,
        gradients=gradients,
    )


def configured(right: DecoderConfig, changes: Mapping[str, Any]) -> DecoderConfig:
    """A configuration with other values; or functions of the right one make them."""
    return replace(right, **{key: value(right) if callable(value) else value for key, value in changes.items()})


def another(
    right: Decoder, kind: type[Decoder] = Decoder, weights: DecoderWeights | None = None, **own: Any
) -> Decoder:
    """A decoder of another kind, weights or configuration, see `configured`."""
    return kind(configured(right.config, own), weights or right.weights, recompute=right.recompute)


def with_slots(lora: LoRAParameters, change: Callable[[LoRASlot], LoRASlot]) -> LoRAParameters:
    """The same factors of other slots."""
    made = LoRAParameters(map(change, lora.slots.values()), device=lora.values.device, dtype=lora.values.dtype)
    made.values.copy_(lora.values)
    made.refresh_compute(lora.compute_values.dtype)
    return made


def changed(weights: BlockWeights, changes: Mapping[str, Callable[[Any], Any]]) -> BlockWeights:
    """Weights of a block with others among them, where all of these are there: what becomes of the right ones."""
    right = {field: getattr(weights, field) for field in changes}
    if any(part is None for part in right.values()):
        return weights
    return replace(weights, **{field: change(right[field]) for field, change in changes.items()})
