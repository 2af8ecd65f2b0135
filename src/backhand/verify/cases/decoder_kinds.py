"""A tiny decoder with everything that can be trained besides plain LoRA: the loss and every gradient of a step.

DoRA's norm is held constant in the gradient while the step takes it anew from the factors, so finite differences, which
would vary it, leave lora_A and lora_B out in those cases; `dora_linear` tries them with the norm as an input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import EMBEDDING
from backhand.nn.decoder.decoder import HEAD, Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot, TrainedTensor
from backhand.verify.block_case import DROPOUT_SEED, rotated_where_alike
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants
from backhand.verify.cases.decoder import LOSS_SCALING, DecoderInputs
from backhand.verify.reference_adapter import ReferenceAdapter
from backhand.verify.reference_decoder import reference_loss
from backhand.verify.tiny_decoders import FAMILIES, adapter_slots, engine_weights, random_batch, random_weights

DOCUMENTS = (9, 5, 1, 11)
PARTS = ("lora_A", "lora_B", "lora_bias", "lora_magnitude")


class KindGrads(NamedTuple):
    """The step's loss, and the gradients of each kind of trained tensor, in the order of the buffer."""

    loss: Tensor
    d_lora_A: tuple[Tensor, ...]
    d_lora_B: tuple[Tensor, ...]
    d_lora_bias: tuple[Tensor, ...]
    d_lora_magnitude: tuple[Tensor, ...]
    d_weight: tuple[Tensor, ...]
    d_bias: tuple[Tensor, ...]
    d_trainable_tokens: tuple[Tensor, ...]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _backward(_d_y: Tensor, inputs: DecoderInputs) -> KindGrads:
    """The engine's training step; the loss's gradient is the loss scaling."""
    decoder, lora, batch, loss_scaling, dropout_seed = inputs
    lora.gradients.zero_()
    loss = decoder.loss_and_gradients(batch, loss_scaling, dropout_seed)

    def gradients(kind: str) -> tuple[Tensor, ...]:
        return tuple(lora.gradient(name).clone() for name, _ in lora.named_tensors() if _kind(name) == kind)

    return KindGrads(loss, *(gradients(kind.removeprefix("d_")) for kind in KindGrads._fields[1:]))


def _slots(
    config: DecoderConfig, targets: tuple[str, ...], dropout: float, use_dora: bool, lora_bias: bool
) -> dict[str, LoRASlot]:
    slots = adapter_slots(config, targets, dropout)
    slots = {
        name: slot if slot.experts else replace(slot, use_dora=use_dora, lora_bias=lora_bias)
        for name, slot in slots.items()
    }
    if EMBEDDING.endswith(targets):
        vocab, hidden = config.vocab_size, config.hidden_size
        slots[EMBEDDING] = LoRASlot(EMBEDDING, vocab, hidden, 3, 1.3, 0.0, use_dora, embedding=True)
    return slots


def _random_values(
    slots: dict[str, LoRASlot], trained: tuple[TrainedTensor, ...], weights: Tensors, draw: Draw
) -> Tensors:
    """Everything trained, nothing of it where it starts."""
    values: Tensors = {}
    for name, slot in slots.items():
        for part, shape in slot.shapes().items():
            size = {"lora_A": 1.0 if slot.embedding else slot.in_features**-0.5, "lora_B": 0.4}.get(part, 0.3)
            values[f"{name}.{part}"] = draw.normal(*shape, size=size) + (1.0 if part == "lora_magnitude" else 0.0)
    for tensor in trained:
        base = weights.get(tensor.base_name, weights[f"{EMBEDDING}.weight"])
        start = base if tensor.token_ids is None else base[list(tensor.token_ids)]
        values[tensor.name] = start + draw.normal(*tensor.shape, size=0.2)
    return values


def _case(
    name: str,
    family: str,
    *,
    targets: tuple[str, ...] = ("_proj",),
    whole: tuple[str, ...] = (),
    tokens: tuple[int, ...] = (),
    use_dora: bool = False,
    lora_bias: bool = False,
    dropout: float = 0.0,
    recompute: str = "none",
    padding_id: int | None = None,
    documents: tuple[int, ...] = DOCUMENTS,
    shared: int = 0,
) -> Case:
    draw = Draw(f"decoder_kinds: {name}")
    config = replace(FAMILIES[family], padding_id=padding_id)
    parameters = module_shapes(config).parameters
    trained = tuple(TrainedTensor(key, shape) for key, shape in parameters.items() if key.endswith(whole))
    slots = _slots(config, targets, dropout, use_dora, lora_bias)
    slots = {key: slot for key, slot in slots.items() if f"{key}.weight" not in {tensor.name for tensor in trained}}
    if tokens:
        trained += (TrainedTensor(f"{EMBEDDING}.{TOKENS}", (len(tokens), config.hidden_size), tokens),)
    batch = random_batch(config, documents, draw, shared)
    weights = random_weights(config, draw)
    # A trained tensor takes the place of the base's in the decoder, so they are told apart by a prefix.
    tensors = {
        **{f"base {key}": value for key, value in weights.items()},
        **_random_values(slots, trained, weights, draw),
        "d_y": torch.tensor(LOSS_SCALING, dtype=torch.float64),
    }
    seed = DROPOUT_SEED if dropout else None

    def base(t: Tensors) -> Tensors:
        return {key.removeprefix("base "): value for key, value in t.items() if key.startswith("base ")}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        table = t[f"base {EMBEDDING}.weight"]
        decoder = Decoder(config, engine_weights(config, base(t)), recompute=recompute)
        dtype = torch.promote_types(table.dtype, torch.float32)
        lora = LoRAParameters(slots.values(), trained=trained, device=table.device, dtype=dtype)
        for key, view in lora.named_tensors():
            view.copy_(t[key])
        decoder.attach(lora)
        grads = backward(t["d_y"], DecoderInputs(decoder, lora, batch.to(table.device), float(t["d_y"]), seed))
        gradients: Tensors = {}
        for kind in KindGrads._fields[1:]:
            names = [key for key, _ in lora.named_tensors() if _kind(key) == kind.removeprefix("d_")]
            gradients |= dict(zip(names, getattr(grads, kind), strict=True))
        return ByHand(grads.loss, gradients)

    def reference(t: Tensors) -> Tensor:
        on_device = batch.to(t[f"base {EMBEDDING}.weight"].device)
        factors = {key: value for key, value in t.items() if not key.startswith("base ")}
        adapter = ReferenceAdapter(slots, factors, seed, {tensor.name: tensor for tensor in trained})
        return reference_loss(base(t), config, on_device, adapter)

    constant_norm = tuple(f"{key}.{part}" for key in slots for part in ("lora_A", "lora_B")) if use_dora else ()
    return Case(name, tensors, by_hand, reference, pooled=True, exempt=constant_norm)


TIED = "llama 3, tied head"

CASES = (
    *(_case(f"{family}; DoRA", family, use_dora=True) for family in FAMILIES),
    _case("shared prefix, DoRA, tied token rows", TIED, use_dora=True, tokens=(3, 8, 11), shared=6),
    _case("shared prefix, norms", "gemma3", whole=("norm.weight",), shared=7),
    _case("shared prefix, lora_bias, biases", "qwen2, qkv bias, tied head", lora_bias=True, whole=(".bias",), shared=4),
    _case("DoRA, dropout, recompute mlp", "qwen3, q/k norm", use_dora=True, dropout=0.2, recompute="mlp"),
    _case("DoRA, dropout, recompute block", "gemma3", use_dora=True, dropout=0.2, recompute="block"),
    _case("DoRA, some modules, head too", "llama", use_dora=True, targets=("k_proj", "gate_proj", "o_proj", HEAD)),
    _case("DoRA, scaled logits", "granite, four multipliers", use_dora=True, targets=("v_proj", HEAD)),
    _case("scaled logits, tied token rows", "granite, four multipliers", tokens=(7, 2, 11), targets=("v_proj",)),
    _case("DoRA, capped logits", "gemma2, capped", use_dora=True, targets=("v_proj", HEAD)),
    _case("lora_bias", "llama", lora_bias=True, targets=("_proj", HEAD)),
    _case("lora_bias, biases, dropout", "qwen2, qkv bias, tied head", lora_bias=True, dropout=0.2),
    _case("embedding", "gemma3", targets=("embed_tokens", "v_proj")),
    _case("tied embedding and head, DoRA", TIED, targets=("embed_tokens", HEAD, "up_proj"), use_dora=True),
    _case("head and table in full", "llama", whole=("lm_head.weight", "embed_tokens.weight")),
    _case("tied head in full", TIED, whole=("lm_head.weight",), targets=("q_proj",)),
    _case("tied table in full", TIED, whole=("embed_tokens.weight",), targets=("q_proj",)),
    _case("every norm", "gemma3", whole=("norm.weight",), targets=("1.mlp.up_proj",)),
    _case(
        "every norm, after the halves alone",
        "olmo2, norms after, q/k norm over all heads",
        whole=("norm.weight",),
        targets=("1.mlp.up_proj",),
    ),
    _case(
        "norm after the top block's attention",
        "olmo3, yarn",
        whole=("1.post_attention_layernorm.weight",),
        targets=("1.mlp.down_proj",),
    ),
    _case("every norm by GLM's names", "glm4, neighbours turned", whole=("norm.weight",), targets=("1.mlp.down_proj",)),
    _case(
        "fused modules in full",
        "phi3, fused, longrope, part of the features",
        whole=("0.self_attn.qkv_proj.weight", "1.mlp.gate_up_proj.weight"),
        targets=("down_proj",),
    ),
    _case(
        "delta rule, DoRA, dropout",
        "qwen3.5, delta rule and gated attention",
        targets=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj"),
        use_dora=True,
        dropout=0.2,
    ),
    _case(
        "every norm, the delta rule's too",
        "qwen3.5, delta rule and gated attention",
        whole=("norm.weight",),
        targets=("2.mlp.up_proj",),
        shared=4,
    ),
    _case(
        "modules of the delta rule in full",
        "qwen3.5, delta rule and gated attention",
        whole=("0.linear_attn.in_proj_qkv.weight", "2.linear_attn.in_proj_b.weight", "2.linear_attn.out_proj.weight"),
        targets=("in_proj_z",),
    ),
    _case(
        "every norm by LFM2 names", "lfm2, short convolutions", whole=("norm.weight",), targets=("2.feed_forward.w2",)
    ),
    _case(
        "modules around a convolution in full",
        "lfm2, biases, attention above",
        whole=("0.conv.in_proj.weight", "0.conv.out_proj.bias", "1.self_attn.out_proj.weight"),
        targets=("w2",),
    ),
    _case(
        "embedding, from which the inputs of layers come",
        "gemma4, shared keys, inputs of layers",
        targets=("embed_tokens", "0.self_attn.k_proj", "per_layer_model_projection"),
        dropout=0.2,
    ),
    _case(
        "token rows, from which the inputs of layers come",
        "gemma4, shared keys, inputs of layers",
        tokens=(7, 2, 11),
        targets=("4.self_attn.q_proj",),
        recompute="block",
    ),
    _case(
        "every norm, of lenders and users of keys",
        "gemma4, shared keys, inputs of layers",
        whole=("norm.weight",),
        targets=("5.mlp.up_proj",),
        shared=4,
    ),
    _case(
        "keys and gates of the layers' inputs in full",
        "gemma4, shared keys, inputs of layers",
        whole=("0.self_attn.k_proj.weight", "1.self_attn.v_proj.weight", "3.per_layer_input_gate.weight"),
        targets=("2.per_layer_projection",),
    ),
    _case("norms of the top block", "llama", whole=("1.input_layernorm.weight",), targets=("1.mlp.down_proj",)),
    _case(
        "linear modules in full",
        "qwen2, qkv bias, tied head",
        whole=("k_proj.weight", "k_proj.bias", "0.mlp.up_proj.weight"),
    ),
    _case("token rows", "llama", tokens=(7, 2, 11), targets=("v_proj",)),
    _case("tied token rows", TIED, tokens=(7, 2, 11), targets=("v_proj",), recompute="block"),
    _case("tied token rows, one document", "gemma3", tokens=(3,), targets=("v_proj",), documents=(13,), use_dora=True),
    _case("no tokens", TIED, tokens=(3,), whole=("model.norm.weight",), use_dora=True, documents=(0,)),
)


def _redo(inputs: DecoderInputs, **changes: Any) -> KindGrads:
    """The right training step in a changed setting."""
    return _backward(torch.empty(0), inputs._replace(**changes))


def _as_family(inputs: DecoderInputs, change: Callable[[DecoderConfig], DecoderConfig]) -> KindGrads:
    """The step of a decoder with the same weights that takes itself for something else."""
    decoder = Decoder(change(inputs.decoder.config), inputs.decoder.weights, recompute=inputs.decoder.recompute)
    decoder.attach(inputs.lora)
    return _redo(inputs, decoder=decoder)


def _untied(config: DecoderConfig) -> DecoderConfig:
    return replace(config, tied_head=False)


def _padded(config: DecoderConfig) -> DecoderConfig:
    return replace(config, padding_id=3)


def _per_token(gradients: tuple[Tensor, ...], inputs: DecoderInputs) -> tuple[Tensor, ...]:
    return tuple(gradient / max(inputs.batch.supervised_tokens, 1) for gradient in gradients)


def _unscaled_bias(inputs: DecoderInputs, right: KindGrads) -> tuple[Tensor, ...]:
    scalings = [slot.scaling for slot in inputs.lora.slots.values() if slot.lora_bias]
    return tuple(gradient / scaling for gradient, scaling in zip(right.d_lora_bias, scalings, strict=True))


KINDS = tuple(name for name in KindGrads._fields if name != "loss")

MUTANTS = (
    *standard_mutants(*KINDS),
    *(
        Mutant("mean for sum", kind, lambda _g, s, right, kind=kind: _per_token(getattr(right, kind), s))  # type: ignore[misc]
        for kind in KINDS
    ),
    Mutant("loss scaling forgotten", "d_weight", lambda _g, s, _right: _redo(s, loss_scaling=1.0).d_weight),
    Mutant(
        "gradients of the next module", "d_lora_magnitude", lambda _g, _s, r: rotated_where_alike(r.d_lora_magnitude)
    ),
    Mutant("gradients of the next module", "d_weight", lambda _g, _s, r: rotated_where_alike(r.d_weight)),
    Mutant("scaling forgotten", "d_lora_bias", lambda _g, s, right: _unscaled_bias(s, right)),
    Mutant("dropout ignored", "d_lora_magnitude", lambda _g, s, _right: _redo(s, dropout_seed=None).d_lora_magnitude),
    Mutant("dropout ignored", "d_lora_B", lambda _g, s, _right: _redo(s, dropout_seed=None).d_lora_B),
    Mutant("padding token left out", "d_lora_A", lambda _g, s, _right: _as_family(s, _padded).d_lora_A),
    Mutant("padding token left out", "d_weight", lambda _g, s, _right: _as_family(s, _padded).d_weight),
    Mutant(
        "of the embedding alone", "d_trainable_tokens", lambda _g, s, _right: _as_family(s, _untied).d_trainable_tokens
    ),
    Mutant("order lost", "d_trainable_tokens", lambda _g, _s, r: tuple(rows.flip(0) for rows in r.d_trainable_tokens)),
    Mutant("rows reversed", "d_bias", lambda _g, _s, right: tuple(bias.flip(0) for bias in right.d_bias)),
)

PROOFS = (OpProof("decoder_kinds", _backward, CASES, MUTANTS),)
