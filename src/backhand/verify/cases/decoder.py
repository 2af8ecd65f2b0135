"""A tiny decoder of every family: the loss and every adapter gradient of the engine's own training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family import LayerConfig, RotaryConfig
from backhand.nn.lora_parameters import LoRASlot
from backhand.ops.logits_rule import PLAIN
from backhand.verify.decoder_op import DecoderInputs, decoder_op, per_token, rebuilt, with_slots, with_weights
from backhand.verify.mutants import Mutant, rotate_equal_shapes, wrong
from backhand.verify.tiny_decoders import FAMILIES, WINDOW, rule

ALL_LINEAR_AND_HEAD = "_proj lm_head"
GEMMA4 = "gemma4, shared"
OP = decoder_op("decoder", (9, 5, 5, 1, 11), gradients=("d_lora_A", "d_lora_B"))
TREES: dict[str, Any] = {"documents": (3, 4, 2, 5, 5, 1, 2, 6, 3), "parents": (-1, -1, 1, 2, 2, 1, -1, 6, 6)}

CASES = (
    *(OP.case(family, family) for family in FAMILIES),
    *(
        OP.case(f"{family}; dropout, recompute {recompute}", family, dropout=0.2, recompute=recompute)
        for family, recompute in zip(FAMILIES, ("mlp", "block") * len(FAMILIES), strict=False)
    ),
    OP.case("llama; head adapted", "llama", ALL_LINEAR_AND_HEAD),
    OP.case("gemma3; tied head adapted", "gemma3", ALL_LINEAR_AND_HEAD),
    OP.case("granite; tied head adapted", "granite, four", ALL_LINEAR_AND_HEAD, dropout=0.2),
    OP.case("head adapted, dropout", "llama", ALL_LINEAR_AND_HEAD, dropout=0.2),
    OP.case("tied head alone, dropout", "gemma3", "lm_head", dropout=0.3),
    OP.case("head alone", "llama 3", "lm_head"),
    OP.case("fused q, k and v alone", "phi3", "qkv_proj", dropout=0.2),
    OP.case("q and v, dropout", "qwen2", "q_proj v_proj", dropout=0.2),
    OP.case("top block's down alone", "gemma3", "2.mlp.down_proj"),
    OP.case("upper block's o and up", "llama", "1.self_attn.o_proj 1.mlp.up_proj", recompute="block"),
    OP.case("one document", "gemma3", documents=(13,)),
    OP.case("one-token documents", "llama", documents=(1, 1)),
    OP.case("shared prefix", "llama", shared=5),
    OP.case("shared prefix, recompute block", "gemma3", shared=7, recompute="block"),
    OP.case("shared prefix, recompute mlp", "mistral", shared=6, recompute="mlp"),
    OP.case("shared prefix, scaled queries", "ministral3", shared=5),
    OP.case("shared prefix, capped", "gemma2", ALL_LINEAR_AND_HEAD, shared=5),
    OP.case("shared prefix of one document", "qwen3, q/k norm", documents=(6,), shared=3),
    OP.case("shared prefix, short convolutions", "lfm2, short", shared=5, recompute="block"),
    OP.case("shared prefix shorter than the taps", "lfm2, biases", shared=2),
    OP.case("documents shorter than the taps", "lfm2, biases", documents=(2, 1, 7, 2), shared=4),
    OP.case("trees", "llama", **TREES),
    OP.case("trees, recompute block", "gemma3", recompute="block", **TREES),
    OP.case("trees, capped", "gemma2", ALL_LINEAR_AND_HEAD, **TREES),
    OP.case("trees, short convolutions", "lfm2, biases", recompute="mlp", **TREES),
    OP.case("trees, shared keys", GEMMA4, **TREES),
    OP.case("trees, sinks and experts", "gpt-oss", **TREES),
    OP.case("trees, delta rule", "qwen3.5", **TREES),
    OP.case("trees, mamba", "bamba", **TREES),
    OP.case("shared prefix, mamba", "granite 4 h", shared=5, recompute="block"),
    OP.case("several chunks of mamba", "granite 4 h", documents=(70, 5), shared=3),
    OP.case("trees, mamba next to attention", "falcon-h1, norm", **TREES),
    OP.case("mamba next to attention, out_proj of the top one alone", "falcon-h1, mamba", "1.mamba.out_proj"),
    OP.case("mamba, in_proj of the top one alone", "granite 4 h", "2.mamba.in_proj"),
    OP.case("trees, one sublayer a block", "nemotron", **TREES),
    OP.case("one sublayer a block, down and o alone", "nemotron", "1.mixer.down_proj 2.mixer.o_proj", dropout=0.2),
    OP.case("short convolutions, out of one alone", "lfm2, short", "2.conv.out_proj"),
    OP.case("short convolutions, w2 and in of one", "lfm2, short", "1.feed_forward.w2 2.conv.in_proj"),
    OP.case("shared keys, k of the lender alone", GEMMA4, "0.self_attn.k_proj"),
    OP.case("shared keys, v of the lender alone, recompute block", GEMMA4, "1.self_attn.v_proj", recompute="block"),
    OP.case("shared prefix, shared keys", GEMMA4, shared=5, recompute="block"),
    OP.case("users of lent keys alone", GEMMA4, "4.self_attn.q_proj"),
    OP.case(
        "inputs of layers, their gates and projections alone",
        GEMMA4,
        "per_layer_input_gate per_layer_projection",
        dropout=0.2,
    ),
    OP.case("inputs of layers, last projection alone", GEMMA4, "5.per_layer_projection"),
    OP.case(
        "inputs of layers, what makes them alone", GEMMA4, "per_layer_model_projection", dropout=0.2, recompute="mlp"
    ),
    OP.case("shared prefix, attention with sinks", "gpt-oss", shared=5, recompute="mlp"),
    OP.case("values made of keys, shared prefix", "gemma4, values", shared=3),
    OP.case("shared prefix, delta rule", "qwen3.5", shared=5, recompute="block"),
    OP.case("shared prefix shorter than the delta rule's taps", "qwen3.5", shared=1),
    OP.case("several chunks of the delta rule", "qwen3.5", documents=(70, 5), shared=3),
    OP.case("delta rule, in_proj_a of the top one alone", "qwen3.5", "2.linear_attn.in_proj_a"),
    OP.case("no supervised token", "qwen3, q/k norm", supervised=False, recompute="mlp"),
    OP.case("no tokens", "gemma3", documents=(0,), dropout=0.2),
)


def _family(name: str, gradients: str, **changes: Any) -> tuple[Mutant, ...]:
    """Run the step of a decoder with the same weights and another configuration, see `rebuilt`."""
    return OP.perturb(name, gradients, decoder=lambda s: rebuilt(s.decoder, **changes))


def _layers(name: str, gradients: str, change: Callable[[LayerConfig], LayerConfig]) -> tuple[Mutant, ...]:
    return _family(name, gradients, layers=lambda config: tuple(map(change, config.layers)))


def _rotary(name: str, gradients: str, change: Callable[[RotaryConfig], RotaryConfig]) -> tuple[Mutant, ...]:
    return _family(name, gradients, rotary=lambda config: tuple(map(change, config.rotary)))


def _blocks(name: str, gradients: str, **changes: Callable[[Tensor], Tensor]) -> tuple[Mutant, ...]:
    """Run the step with other weights in every block, see `with_weights`."""

    def other(s: DecoderInputs) -> Decoder:
        blocks = [with_weights(block, changes) for block in s.decoder.weights.blocks]
        return rebuilt(s.decoder, weights=replace(s.decoder.weights, blocks=blocks))

    return OP.perturb(name, gradients, decoder=other)


def _batch(name: str, gradients: str, change: Callable[[PackedBatch], dict[str, Any]]) -> tuple[Mutant, ...]:
    """Run the step on another batch."""
    return OP.perturb(name, gradients, batch=lambda s: replace(s.batch, **change(s.batch)))


def _head_without_dropout(slot: LoRASlot) -> LoRASlot:
    return replace(slot, dropout=0.0) if slot.name == HEAD else slot


def _every_feature(rotary: RotaryConfig) -> RotaryConfig:
    """Rotate all features by the default rule, which has a frequency for each pair."""
    return rotary if rotary.features is None else replace(rotary, features=None, scaling=None)


def _as_long(rotary: RotaryConfig) -> RotaryConfig:
    """Use the factors of long documents for all documents."""
    scaling = dict(rotary.scaling or ())
    if "long_factor" in scaling:
        scaling |= {"original_max_position_embeddings": 0}
    return replace(rotary, scaling=tuple(scaling.items()) or None)


def _all_pairs_rotated(rotary: RotaryConfig) -> RotaryConfig:
    """Rotate all pairs, also those that the rule `proportional` does not rotate."""
    unrotated = dict(rotary.scaling or ()).get("rope_type") == "proportional"
    return replace(rotary, scaling=rule("proportional", share=1.0, factor=1.0)) if unrotated else rotary


def _window_of_the_other_kind(layer: LayerConfig) -> LayerConfig:
    """Change the windows of layers with shared keys."""
    return layer if layer.kv_source is None else replace(layer, window=WINDOW if layer.window is None else None)


AccumulateGrad = Callable[[CrossLayer, int, Tensor, Tensor], None]
"""A wrong `CrossLayer.accumulate_grad`, called with ∂L/∂k and ∂L/∂v of one layer that uses shared keys and values."""


def _last_user_alone(shared: CrossLayer, layer: int, d_k: Tensor, d_v: Tensor) -> None:
    shared.pop_grad(layer)
    CrossLayer.accumulate_grad(shared, layer, d_k, d_v)


def _first_user_alone(shared: CrossLayer, layer: int, d_k: Tensor, d_v: Tensor) -> None:
    if shared.grad(layer) is None:
        CrossLayer.accumulate_grad(shared, layer, d_k, d_v)


def _last_layers_input(shared: CrossLayer, layer: int, d_k: Tensor, d_v: Tensor) -> None:
    CrossLayer.accumulate_grad(shared, layer, d_k, d_v)
    if shared.d_ple is not None:
        shared.d_ple[:, layer + 1 :] = 0.0


def _accumulating(name: str, gradients: str, accumulate_grad: AccumulateGrad) -> tuple[Mutant, ...]:
    """Run the step with a wrong accumulation of the gradients of shared tensors."""
    kind = type("Other", (CrossLayer,), {"accumulate_grad": accumulate_grad})

    class Other(Decoder):
        def cross_layer(self, token_ids: Tensor, dropout_seed: int | None = None) -> tuple[CrossLayer | None, Any]:
            right, begin = super().cross_layer(token_ids, dropout_seed)
            return (None if right is None else kind(right.kv_sources, right.ple)), begin

    return OP.perturb(name, gradients, decoder=lambda s: rebuilt(s.decoder, Other))


def _sibling_seen(batch: PackedBatch) -> dict[str, Any]:
    """Let segments continue their previous sibling instead of their parent."""
    parents = list(batch.parents)
    previous: dict[int, int] = {}
    for number, parent in enumerate(batch.parents):
        parents[number] = previous.get(parent, parent) if parent >= 0 else parent
        previous[parent] = number
    return {"parents": tuple(parents), "document_ends": batch.ends}


def _as_if(name: str, gradients: str, **properties: Any) -> tuple[Mutant, ...]:
    """Run the step on the batch with other properties of its segments."""
    other = type("Other", (PackedBatch,), {key: property(make) for key, make in properties.items()})

    def changed_batch(s: DecoderInputs) -> PackedBatch:
        batch: PackedBatch = other(**{part.name: getattr(s.batch, part.name) for part in fields(PackedBatch)})
        return batch

    return OP.perturb(name, gradients, batch=changed_batch)


def _restarting(batch: PackedBatch) -> Tensor:
    """Return positions that start at 0 in each segment."""
    return torch.cat([torch.arange(0), *(torch.arange(n) for n in batch.lengths)]).to(batch.input_ids.device)


def _all_supervised(batch: PackedBatch) -> dict[str, Any]:
    """Give masked positions the next token of the batch as their target."""
    return {"labels": torch.where(batch.labels == IGNORE_INDEX, batch.input_ids.roll(-1), batch.labels)}


BOTH = "d_lora_A d_lora_B"

MUTANTS = (
    OP.perturb("loss scaling forgotten", "d_lora_A", loss_scaling=1.0),
    wrong("mean for sum", "d_lora_B", lambda s, whole: per_token(whole, s)),
    _batch(
        "documents see each other",
        BOTH,
        lambda batch: {"lengths": (sum(batch.lengths),), "parents": (), "document_ends": None},
    ),
    _batch("mask of the labels ignored", "d_lora_A", _all_supervised),
    _batch("labels shifted by one", "d_lora_B", lambda batch: {"labels": batch.labels.roll(1)}),
    _batch("prefix unseen", BOTH, lambda batch: {"parents": (), "document_ends": batch.ends}),
    _batch("a segment sees its sibling", BOTH, _sibling_seen),
    _as_if("positions from 0 in each segment", BOTH, positions=_restarting),
    _as_if("shared tokens counted once", BOTH, weights=lambda _batch: None),
    OP.perturb("dropout ignored", "d_lora_A", dropout_seed=None),
    OP.perturb("dropout of another seed", "d_lora_B", dropout_seed=lambda s: s.dropout_seed and s.dropout_seed + 1),
    OP.perturb("head's dropout ignored", BOTH, lora=lambda s: with_slots(s.lora, _head_without_dropout)),
    _layers("window off by one", "d_lora_A", lambda layer: replace(layer, window=layer.window and layer.window + 1)),
    _family("rotary bases swapped", "d_lora_A", rotary=lambda config: config.rotary[::-1]),
    _blocks("taps reversed", "d_lora_A", conv=lambda conv: conv.flip(2)),
    _accumulating("last user of keys alone", BOTH, _last_user_alone),
    _accumulating("first user of keys alone", "d_lora_B", _first_user_alone),
    _accumulating("keys without users", "d_lora_A", lambda _own, _layer, _d_k, _d_v: None),
    _accumulating(
        "users' values forgotten",
        "d_lora_B",
        lambda shared, n, d_k, _: CrossLayer.accumulate_grad(shared, n, d_k, 0 * d_k),
    ),
    _accumulating("inputs of some layers", "d_lora_A", _last_layers_input),
    _layers("windows of the other kind", "d_lora_A", _window_of_the_other_kind),
    _rotary("standing pairs rotated", "d_lora_B", _all_pairs_rotated),
    _blocks("layer scalars ignored", "d_lora_A", layer_scalar=torch.ones_like),
    _layers("rotated without rotary", "d_lora_A", lambda layer: replace(layer, rotary=layer.rotary or 0)),
    _rotary("rotary scaling ignored", "d_lora_B", lambda rotary: replace(rotary, scaling=None)),
    _rotary("attention factor ignored", "d_lora_A", lambda rotary: replace(rotary, attention_factor=1.0)),
    _rotary("halves rotated for neighbours", "d_lora_A", lambda rotary: replace(rotary, interleaved=False)),
    _family("queries not scaled", "d_lora_B", query_scaling=None),
    _rotary("every feature rotated", "d_lora_A", _every_feature),
    _rotary("short documents rotated as long ones", "d_lora_B", _as_long),
    _family("embedding scaling ignored", "d_lora_A", embedding_scaling=1.0),
    _family("rule for logits ignored", "d_lora_A", logits=PLAIN),
    _family("residual multiplier ignored", "d_lora_B", residual_multiplier=1.0),
    _family("1 + weight read as weight", "d_lora_B", norm_offset=0.0),
    _family("eps of the norms forgotten", "d_lora_A", norm_eps=0.0),
    wrong("gradients of the next module", BOTH, rotate_equal_shapes),
)
