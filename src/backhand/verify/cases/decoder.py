"""A tiny decoder of every family: the loss and every adapter gradient of the engine's own training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.carried import Carried
from backhand.nn.decoder.decoder import HEAD, Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.linear_cross_entropy import PLAIN
from backhand.verify.block_case import DROPOUT_SEED, lora_parameters, rotated_where_alike
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants
from backhand.verify.reference_adapter import ReferenceAdapter
from backhand.verify.reference_decoder import reference_loss
from backhand.verify.tiny_decoders import (
    FAMILIES,
    WINDOW,
    adapter_slots,
    engine_weights,
    random_batch,
    random_factors,
    random_weights,
)

DOCUMENTS = (9, 5, 5, 1, 11)
LOSS_SCALING = 0.043
ALL_LINEAR_AND_HEAD = ("_proj", HEAD)


class DecoderInputs(NamedTuple):
    """What one training step is given."""

    decoder: Decoder
    lora: LoRAParameters
    batch: PackedBatch
    loss_scaling: float
    dropout_seed: int | None


class DecoderGrads(NamedTuple):
    """d_lora_A and d_lora_B of every adapted module, in the order of the slots, and the step's loss."""

    loss: Tensor
    d_lora_A: tuple[Tensor, ...]
    d_lora_B: tuple[Tensor, ...]


def _backward(_d_y: Tensor, inputs: DecoderInputs) -> DecoderGrads:
    """The engine's training step; the loss's gradient is the loss scaling."""
    decoder, lora, batch, loss_scaling, dropout_seed = inputs
    lora.gradients.zero_()
    loss = decoder.loss_and_gradients(batch, loss_scaling, dropout_seed)
    return DecoderGrads(
        loss,
        tuple(lora.d_lora_A(name).clone() for name in lora.slots),
        tuple(lora.d_lora_B(name).clone() for name in lora.slots),
    )


def _case(
    name: str,
    family: str,
    *,
    documents: tuple[int, ...] = DOCUMENTS,
    targets: tuple[str, ...] | None = None,
    dropout: float = 0.0,
    recompute: str = "none",
    supervised: bool = True,
    shared: int = 0,
) -> Case:
    draw = Draw(f"decoder: {name}")
    config = FAMILIES[family]
    slots = adapter_slots(config, targets, dropout)
    batch = random_batch(config, documents, draw, shared)
    if not supervised:
        batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))
    tensors = {
        **random_weights(config, draw),
        **random_factors(slots, draw),
        "d_y": torch.tensor(LOSS_SCALING, dtype=torch.float64),
    }
    seed = DROPOUT_SEED if dropout else None

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        table = t["model.embed_tokens.weight"]
        decoder = Decoder(config, engine_weights(config, t), recompute=recompute)
        lora = lora_parameters(slots, t, table.dtype)
        decoder.attach(lora)
        on_device = batch.to(table.device)
        grads = backward(t["d_y"], DecoderInputs(decoder, lora, on_device, float(t["d_y"]), seed))
        gradients: Tensors = {}
        for key, d_lora_A, d_lora_B in zip(slots, grads.d_lora_A, grads.d_lora_B, strict=True):
            gradients |= {f"{key}.lora_A": d_lora_A, f"{key}.lora_B": d_lora_B}
        return ByHand(grads.loss, gradients)

    def reference(t: Tensors) -> Tensor:
        on_device = batch.to(t["model.embed_tokens.weight"].device)
        return reference_loss(t, config, on_device, ReferenceAdapter(slots, t, seed))

    return Case(name, tensors, by_hand, reference, pooled=True)


CASES = (
    *(_case(family, family) for family in FAMILIES),
    *(
        _case(f"{family}; dropout, recompute {recompute}", family, dropout=0.2, recompute=recompute)
        for family, recompute in zip(FAMILIES, ("mlp", "block") * len(FAMILIES), strict=False)
    ),
    _case("llama; head adapted", "llama", targets=ALL_LINEAR_AND_HEAD),
    _case("gemma3; tied head adapted", "gemma3", targets=ALL_LINEAR_AND_HEAD),
    _case("granite; tied head adapted", "granite, four multipliers", targets=ALL_LINEAR_AND_HEAD, dropout=0.2),
    _case("head adapted, dropout", "llama", targets=ALL_LINEAR_AND_HEAD, dropout=0.2),
    _case("tied head alone, dropout", "gemma3", targets=(HEAD,), dropout=0.3),
    _case("head alone", "llama 3, tied head", targets=(HEAD,)),
    _case("fused q, k and v alone", "phi3, fused, longrope, part of the features", targets=("qkv_proj",), dropout=0.2),
    _case("q and v, dropout", "qwen2, qkv bias, tied head", targets=("q_proj", "v_proj"), dropout=0.2),
    _case("top block's down alone", "gemma3", targets=("2.mlp.down_proj",)),
    _case("upper block's o and up", "llama", targets=("1.self_attn.o_proj", "1.mlp.up_proj"), recompute="block"),
    _case("one document", "gemma3", documents=(13,)),
    _case("one-token documents", "llama", documents=(1, 1)),
    _case("shared prefix", "llama", shared=5),
    _case("shared prefix, recompute block", "gemma3", shared=7, recompute="block"),
    _case("shared prefix, recompute mlp", "mistral, window", shared=6, recompute="mlp"),
    _case("shared prefix, scaled queries", "ministral3, scaled queries", shared=5),
    _case("shared prefix, capped", "gemma2, capped", targets=ALL_LINEAR_AND_HEAD, shared=5),
    _case("shared prefix of one document", "qwen3, q/k norm", documents=(6,), shared=3),
    _case("shared prefix, short convolutions", "lfm2, short convolutions", shared=5, recompute="block"),
    _case("shared prefix shorter than the taps", "lfm2, biases, attention above", shared=2),
    _case("documents shorter than the taps", "lfm2, biases, attention above", documents=(2, 1, 7, 2), shared=4),
    _case("short convolutions, out of one alone", "lfm2, short convolutions", targets=("2.conv.out_proj",)),
    _case(
        "short convolutions, w2 and in of one",
        "lfm2, short convolutions",
        targets=("1.feed_forward.w2", "2.conv.in_proj"),
    ),
    _case(
        "shared keys, k of the lender alone", "gemma4, shared keys, inputs of layers", targets=("0.self_attn.k_proj",)
    ),
    _case(
        "shared keys, v of the lender alone, recompute block",
        "gemma4, shared keys, inputs of layers",
        targets=("1.self_attn.v_proj",),
        recompute="block",
    ),
    _case("shared prefix, shared keys", "gemma4, shared keys, inputs of layers", shared=5, recompute="block"),
    _case("users of lent keys alone", "gemma4, shared keys, inputs of layers", targets=("4.self_attn.q_proj",)),
    _case(
        "inputs of layers, their gates and projections alone",
        "gemma4, shared keys, inputs of layers",
        targets=("per_layer_input_gate", "per_layer_projection"),
        dropout=0.2,
    ),
    _case(
        "inputs of layers, last projection alone",
        "gemma4, shared keys, inputs of layers",
        targets=("5.per_layer_projection",),
    ),
    _case(
        "inputs of layers, what makes them alone",
        "gemma4, shared keys, inputs of layers",
        targets=("per_layer_model_projection",),
        dropout=0.2,
        recompute="mlp",
    ),
    _case("shared prefix, attention with sinks", "gpt-oss, sinks, biased experts", shared=5, recompute="mlp"),
    _case("values made of keys, shared prefix", "gemma4, values made of keys", shared=3),
    _case("shared prefix, delta rule", "qwen3.5, delta rule and gated attention", shared=5, recompute="block"),
    _case("shared prefix shorter than the delta rule's taps", "qwen3.5, delta rule and gated attention", shared=1),
    _case("several chunks of the delta rule", "qwen3.5, delta rule and gated attention", documents=(70, 5), shared=3),
    _case(
        "delta rule, in_proj_a of the top one alone",
        "qwen3.5, delta rule and gated attention",
        targets=("2.linear_attn.in_proj_a",),
    ),
    _case("no supervised token", "qwen3, q/k norm", supervised=False, recompute="mlp"),
    _case("no tokens", "gemma3", documents=(0,), dropout=0.2),
)


def _redo(inputs: DecoderInputs, **changes: Any) -> DecoderGrads:
    """The right training step in a changed setting."""
    return _backward(torch.empty(0), inputs._replace(**changes))


def _by(inputs: DecoderInputs, decoder: Decoder) -> DecoderGrads:
    """The step of another decoder."""
    decoder.attach(inputs.lora)
    grads = _redo(inputs, decoder=decoder)
    inputs.decoder.attach(inputs.lora)
    return grads


def _as_family(inputs: DecoderInputs, change: Callable[[DecoderConfig], DecoderConfig]) -> DecoderGrads:
    """The step of a decoder with the same weights that takes itself for something else."""
    right = inputs.decoder
    return _by(inputs, Decoder(change(right.config), right.weights, recompute=right.recompute))


def _batch(inputs: DecoderInputs, **changes: Any) -> PackedBatch:
    return replace(inputs.batch, **changes)


def _one_document(inputs: DecoderInputs) -> PackedBatch:
    return _batch(inputs, document_lengths=(sum(inputs.batch.document_lengths),))


def _prefix_apart(inputs: DecoderInputs) -> PackedBatch:
    """The shared prefix as a document that nobody else sees."""
    lengths = (inputs.batch.shared_prefix, *inputs.batch.document_lengths)
    return _batch(inputs, document_lengths=lengths, shared_prefix=0)


def _all_supervised(inputs: DecoderInputs) -> PackedBatch:
    """Masked positions given the next token of the pack as their target."""
    labels = inputs.batch.labels
    return _batch(inputs, labels=torch.where(labels == IGNORE_INDEX, inputs.batch.input_ids.roll(-1), labels))


def _next_seed(inputs: DecoderInputs) -> int | None:
    return None if inputs.dropout_seed is None else inputs.dropout_seed + 1


def _head_without_dropout(inputs: DecoderInputs) -> DecoderGrads:
    """The step with dropout everywhere but on the head's adapter."""
    slots = [replace(slot, dropout=0.0) if name == HEAD else slot for name, slot in inputs.lora.slots.items()]
    lora = LoRAParameters(slots, device=inputs.lora.values.device, dtype=inputs.lora.values.dtype)
    lora.values.copy_(inputs.lora.values)
    inputs.decoder.attach(lora)
    grads = _redo(inputs, lora=lora)
    inputs.decoder.attach(inputs.lora)
    return grads


def _wider(config: DecoderConfig) -> DecoderConfig:
    """Every window one token wider."""
    layers = tuple(replace(layer, window=layer.window and layer.window + 1) for layer in config.layers)
    return replace(config, layers=layers)


def _bases_swapped(config: DecoderConfig) -> DecoderConfig:
    return replace(config, rotary=config.rotary[::-1])


def _flipped(inputs: DecoderInputs) -> DecoderGrads:
    """The step with the taps of every convolution in reverse."""
    weights = inputs.decoder.weights
    blocks = [block if block.conv is None else replace(block, conv=block.conv.flip(2)) for block in weights.blocks]
    config, recompute = inputs.decoder.config, inputs.decoder.recompute
    return _by(inputs, Decoder(config, replace(weights, blocks=blocks), recompute=recompute))


def _turned_everywhere(config: DecoderConfig) -> DecoderConfig:
    return replace(config, layers=tuple(replace(layer, rotary=layer.rotary or 0) for layer in config.layers))


def _unscaled_rotary(config: DecoderConfig) -> DecoderConfig:
    return replace(config, rotary=tuple(replace(rotary, scaling=None) for rotary in config.rotary))


def _not_lengthened(config: DecoderConfig) -> DecoderConfig:
    return replace(config, rotary=tuple(replace(rotary, attention_factor=1.0) for rotary in config.rotary))


def _in_halves(config: DecoderConfig) -> DecoderConfig:
    return replace(config, rotary=tuple(replace(rotary, interleaved=False) for rotary in config.rotary))


def _not_scaled(config: DecoderConfig) -> DecoderConfig:
    return replace(config, query_scaling=None)


def _all_turned(config: DecoderConfig) -> DecoderConfig:
    """Every feature by the plain rule, which has a frequency for each pair."""
    plain = (
        rotary if rotary.features is None else replace(rotary, features=None, scaling=None) for rotary in config.rotary
    )
    return replace(config, rotary=tuple(plain))


def _as_long(config: DecoderConfig) -> DecoderConfig:
    """The list of factors for long documents for all."""
    sets = []
    for rotary in config.rotary:
        scaling = dict(rotary.scaling or ())
        if "long_factor" in scaling:
            scaling |= {"original_max_position_embeddings": 0}
        sets.append(replace(rotary, scaling=tuple(scaling.items()) or None))
    return replace(config, rotary=tuple(sets))


class _LastUserAlone(Carried):
    """Takes the gradient of one user of keys and values, the one that comes last, for that of all."""

    def give_back(self, layer: int, d_k: Tensor, d_v: Tensor) -> None:
        self.returned(layer)
        super().give_back(layer, d_k, d_v)


class _FirstUserAlone(Carried):
    """Likewise the one that comes first."""

    def give_back(self, layer: int, d_k: Tensor, d_v: Tensor) -> None:
        if self.held(layer) is None:
            super().give_back(layer, d_k, d_v)


class _NoUser(Carried):
    """The layer that made keys and values is taken for the only one that uses them."""

    def give_back(self, layer: int, d_k: Tensor, d_v: Tensor) -> None:
        pass


class _KeysAlone(Carried):
    """The gradient of shared values is forgotten."""

    def give_back(self, layer: int, d_k: Tensor, d_v: Tensor) -> None:
        super().give_back(layer, d_k, torch.zeros_like(d_v))


class _LastLayersInput(Carried):
    """The gradient of the layers' inputs is kept of one layer alone."""

    def give_back(self, layer: int, d_k: Tensor, d_v: Tensor) -> None:
        super().give_back(layer, d_k, d_v)
        if self.d_inputs is not None:
            self.d_inputs[:, layer + 1 :] = 0.0


def _carrying(inputs: DecoderInputs, kind: type[Carried]) -> DecoderGrads:
    """The step with another way to carry what layers share."""

    class Other(Decoder):
        def carried(self, token_ids: Tensor, dropout_seed: int | None = None) -> tuple[Carried | None, Any]:
            right, begin = super().carried(token_ids, dropout_seed)
            return (None if right is None else kind(right.lenders, right.inputs)), begin

    right = inputs.decoder
    return _by(inputs, Other(right.config, right.weights, recompute=right.recompute))


def _other_lender(config: DecoderConfig) -> DecoderConfig:
    """Layers that share take the windows of the other kind."""
    layers = tuple(
        layer if layer.keys_of is None else replace(layer, window=WINDOW if layer.window is None else None)
        for layer in config.layers
    )
    return replace(config, layers=layers)


def _all_standing_turned(config: DecoderConfig) -> DecoderConfig:
    """Pairs that stand still by the rule `proportional` turn like the others."""
    whole = (("rope_type", "proportional"), ("share", 1.0), ("factor", 1.0))
    standing = [dict(rotary.scaling or ()).get("rope_type") == "proportional" for rotary in config.rotary]
    rules = zip(config.rotary, standing, strict=True)
    return replace(
        config, rotary=tuple(replace(rotary, scaling=whole) if stands else rotary for rotary, stands in rules)
    )


def _layers_unscaled(inputs: DecoderInputs) -> DecoderGrads:
    """The step without the layers' scalars."""
    weights = inputs.decoder.weights
    blocks = [
        block if block.layer_scalar is None else replace(block, layer_scalar=torch.ones_like(block.layer_scalar))
        for block in weights.blocks
    ]
    config, recompute = inputs.decoder.config, inputs.decoder.recompute
    return _by(inputs, Decoder(config, replace(weights, blocks=blocks), recompute=recompute))


def _per_token(gradients: tuple[Tensor, ...], inputs: DecoderInputs) -> tuple[Tensor, ...]:
    return tuple(gradient / max(inputs.batch.supervised_tokens, 1) for gradient in gradients)


MUTANTS = (
    *standard_mutants("d_lora_A", "d_lora_B"),
    Mutant("loss scaling forgotten", "d_lora_A", lambda _g, s, _right: _redo(s, loss_scaling=1.0).d_lora_A),
    Mutant("mean for sum", "d_lora_B", lambda _g, s, right: _per_token(right.d_lora_B, s)),
    Mutant("documents see each other", "d_lora_A", lambda _g, s, _right: _redo(s, batch=_one_document(s)).d_lora_A),
    Mutant("documents see each other", "d_lora_B", lambda _g, s, _right: _redo(s, batch=_one_document(s)).d_lora_B),
    Mutant("mask of the labels ignored", "d_lora_A", lambda _g, s, _right: _redo(s, batch=_all_supervised(s)).d_lora_A),
    Mutant(
        "labels shifted by one",
        "d_lora_B",
        lambda _g, s, _right: _redo(s, batch=_batch(s, labels=s.batch.labels.roll(1))).d_lora_B,
    ),
    Mutant("prefix unseen", "d_lora_A", lambda _g, s, _right: _redo(s, batch=_prefix_apart(s)).d_lora_A),
    Mutant("prefix unseen", "d_lora_B", lambda _g, s, _right: _redo(s, batch=_prefix_apart(s)).d_lora_B),
    Mutant("dropout ignored", "d_lora_A", lambda _g, s, _right: _redo(s, dropout_seed=None).d_lora_A),
    Mutant("dropout of another seed", "d_lora_B", lambda _g, s, _right: _redo(s, dropout_seed=_next_seed(s)).d_lora_B),
    Mutant("head's dropout ignored", "d_lora_A", lambda _g, s, _right: _head_without_dropout(s).d_lora_A),
    Mutant("head's dropout ignored", "d_lora_B", lambda _g, s, _right: _head_without_dropout(s).d_lora_B),
    Mutant("window off by one", "d_lora_A", lambda _g, s, _right: _as_family(s, _wider).d_lora_A),
    Mutant("rotary bases swapped", "d_lora_A", lambda _g, s, _right: _as_family(s, _bases_swapped).d_lora_A),
    Mutant("taps reversed", "d_lora_A", lambda _g, s, _right: _flipped(s).d_lora_A),
    Mutant("last user of keys alone", "d_lora_A", lambda _g, s, _right: _carrying(s, _LastUserAlone).d_lora_A),
    Mutant("last user of keys alone", "d_lora_B", lambda _g, s, _right: _carrying(s, _LastUserAlone).d_lora_B),
    Mutant("first user of keys alone", "d_lora_B", lambda _g, s, _right: _carrying(s, _FirstUserAlone).d_lora_B),
    Mutant("keys without users", "d_lora_A", lambda _g, s, _right: _carrying(s, _NoUser).d_lora_A),
    Mutant("users' values forgotten", "d_lora_B", lambda _g, s, _right: _carrying(s, _KeysAlone).d_lora_B),
    Mutant("inputs of some layers", "d_lora_A", lambda _g, s, _right: _carrying(s, _LastLayersInput).d_lora_A),
    Mutant("windows of the other kind", "d_lora_A", lambda _g, s, _right: _as_family(s, _other_lender).d_lora_A),
    Mutant("standing pairs turned", "d_lora_B", lambda _g, s, _right: _as_family(s, _all_standing_turned).d_lora_B),
    Mutant("layer scalars ignored", "d_lora_A", lambda _g, s, _right: _layers_unscaled(s).d_lora_A),
    Mutant("turned without rotary", "d_lora_A", lambda _g, s, _right: _as_family(s, _turned_everywhere).d_lora_A),
    Mutant("rotary scaling ignored", "d_lora_B", lambda _g, s, _right: _as_family(s, _unscaled_rotary).d_lora_B),
    Mutant("attention factor ignored", "d_lora_A", lambda _g, s, _right: _as_family(s, _not_lengthened).d_lora_A),
    Mutant("halves turned for neighbours", "d_lora_A", lambda _g, s, _right: _as_family(s, _in_halves).d_lora_A),
    Mutant("queries not scaled", "d_lora_B", lambda _g, s, _right: _as_family(s, _not_scaled).d_lora_B),
    Mutant("every feature turned", "d_lora_A", lambda _g, s, _right: _as_family(s, _all_turned).d_lora_A),
    Mutant("short documents turned as long ones", "d_lora_B", lambda _g, s, _right: _as_family(s, _as_long).d_lora_B),
    Mutant(
        "embedding scaling ignored",
        "d_lora_A",
        lambda _g, s, _right: _as_family(s, lambda config: replace(config, embedding_scaling=1.0)).d_lora_A,
    ),
    Mutant(
        "rule for logits ignored",
        "d_lora_A",
        lambda _g, s, _right: _as_family(s, lambda config: replace(config, logits=PLAIN)).d_lora_A,
    ),
    Mutant(
        "residual multiplier ignored",
        "d_lora_B",
        lambda _g, s, _right: _as_family(s, lambda config: replace(config, residual_multiplier=1.0)).d_lora_B,
    ),
    Mutant(
        "1 + weight read as weight",
        "d_lora_B",
        lambda _g, s, _right: _as_family(s, lambda config: replace(config, norm_offset=0.0)).d_lora_B,
    ),
    Mutant(
        "eps of the norms forgotten",
        "d_lora_A",
        lambda _g, s, _right: _as_family(s, lambda config: replace(config, norm_eps=0.0)).d_lora_A,
    ),
    Mutant("gradients of the next module", "d_lora_A", lambda _g, _s, right: rotated_where_alike(right.d_lora_A)),
    Mutant("gradients of the next module", "d_lora_B", lambda _g, _s, right: rotated_where_alike(right.d_lora_B)),
)

PROOFS = (OpProof("decoder", _backward, CASES, MUTANTS),)
