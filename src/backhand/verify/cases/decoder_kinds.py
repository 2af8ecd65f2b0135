"""A tiny decoder with everything that can be trained besides plain LoRA: the loss and every gradient of a step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from backhand.nn.decoder.decoder import Decoder
from backhand.verify.case import OpProof, again, rotated_where_alike, standard_mutants, wrong
from backhand.verify.decoder_case import (
    KINDS,
    DecoderInputs,
    decoder_case,
    decoder_step,
    per_token,
    step_of,
)
from backhand.verify.tiny_decoders import FAMILIES

DOCUMENTS = (9, 5, 1, 11)
_case = partial(decoder_case, "decoder_kinds", documents=DOCUMENTS, targets="_proj")

TIED = "llama 3"

CASES = (
    *(_case(f"{family}; DoRA", family, use_dora=True) for family in FAMILIES),
    _case("shared prefix, DoRA, tied token rows", TIED, use_dora=True, tokens=(3, 8, 11), shared=6),
    _case("shared prefix, norms", "gemma3", whole="norm.weight", shared=7),
    _case("shared prefix, lora_bias, biases", "qwen2", lora_bias=True, whole=".bias", shared=4),
    _case("DoRA, dropout, recompute mlp", "qwen3, q/k norm", use_dora=True, dropout=0.2, recompute="mlp"),
    _case("DoRA, dropout, recompute block", "gemma3", use_dora=True, dropout=0.2, recompute="block"),
    _case("DoRA, some modules, head too", "llama", use_dora=True, targets="k_proj gate_proj o_proj lm_head"),
    _case("DoRA, scaled logits", "granite, four", use_dora=True, targets="v_proj lm_head"),
    _case("scaled logits, tied token rows", "granite, four", tokens=(7, 2, 11), targets="v_proj"),
    _case("DoRA, capped logits", "gemma2", use_dora=True, targets="v_proj lm_head"),
    _case("lora_bias", "llama", lora_bias=True, targets="_proj lm_head"),
    _case("lora_bias, biases, dropout", "qwen2", lora_bias=True, dropout=0.2),
    _case("embedding", "gemma3", targets="embed_tokens v_proj"),
    _case("tied embedding and head, DoRA", TIED, targets="embed_tokens lm_head up_proj", use_dora=True),
    _case("head and table in full", "llama", whole="lm_head.weight embed_tokens.weight"),
    _case("tied head in full", TIED, whole="lm_head.weight", targets="q_proj"),
    _case("tied table in full", TIED, whole="embed_tokens.weight", targets="q_proj"),
    _case("every norm", "gemma3", whole="norm.weight", targets="1.mlp.up_proj"),
    _case("every norm, after the halves alone", "olmo2", whole="norm.weight", targets="1.mlp.up_proj"),
    _case(
        "norm after the top block's attention",
        "olmo3",
        whole="1.post_attention_layernorm.weight",
        targets="1.mlp.down_proj",
    ),
    _case("every norm by GLM's names", "glm4", whole="norm.weight", targets="1.mlp.down_proj"),
    _case(
        "fused modules in full",
        "phi3",
        whole="0.self_attn.qkv_proj.weight 1.mlp.gate_up_proj.weight",
        targets="down_proj",
    ),
    _case(
        "delta rule, DoRA, dropout",
        "qwen3.5",
        targets="in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj q_proj",
        use_dora=True,
        dropout=0.2,
    ),
    _case("every norm, the delta rule's too", "qwen3.5", whole="norm.weight", targets="2.mlp.up_proj", shared=4),
    _case(
        "modules of the delta rule in full",
        "qwen3.5",
        whole="0.linear_attn.in_proj_qkv.weight 2.linear_attn.in_proj_b.weight 2.linear_attn.out_proj.weight",
        targets="in_proj_z",
    ),
    _case("every norm by LFM2 names", "lfm2, short", whole="norm.weight", targets="2.feed_forward.w2"),
    _case(
        "modules around a convolution in full",
        "lfm2, biases",
        whole="0.conv.in_proj.weight 0.conv.out_proj.bias 1.self_attn.out_proj.weight",
        targets="w2",
    ),
    _case(
        "embedding, from which the inputs of layers come",
        "gemma4, shared",
        targets="embed_tokens 0.self_attn.k_proj per_layer_model_projection",
        dropout=0.2,
    ),
    _case(
        "token rows, from which the inputs of layers come",
        "gemma4, shared",
        tokens=(7, 2, 11),
        targets="4.self_attn.q_proj",
        recompute="block",
    ),
    _case(
        "every norm, of lenders and users of keys",
        "gemma4, shared",
        whole="norm.weight",
        targets="5.mlp.up_proj",
        shared=4,
    ),
    _case(
        "keys and gates of the layers' inputs in full",
        "gemma4, shared",
        whole="0.self_attn.k_proj.weight 1.self_attn.v_proj.weight 3.per_layer_input_gate.weight",
        targets="2.per_layer_projection",
    ),
    _case("norms of the top block", "llama", whole="1.input_layernorm.weight", targets="1.mlp.down_proj"),
    _case("linear modules in full", "qwen2", whole="k_proj.weight k_proj.bias 0.mlp.up_proj.weight"),
    _case("token rows", "llama", tokens=(7, 2, 11), targets="v_proj"),
    _case("tied token rows", TIED, tokens=(7, 2, 11), targets="v_proj", recompute="block"),
    _case("tied token rows, one document", "gemma3", tokens=(3,), targets="v_proj", documents=(13,), use_dora=True),
    _case("no tokens", TIED, tokens=(3,), whole="model.norm.weight", use_dora=True, documents=(0,)),
)


def _as(s: DecoderInputs, **changes: Any) -> Decoder:
    """A decoder with the same weights that takes itself for something else."""
    return Decoder(replace(s.decoder.config, **changes), s.decoder.weights, recompute=s.decoder.recompute)


def _unscaled_bias(s: DecoderInputs, whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scalings = [slot.scaling for slot in s.lora.slots.values() if slot.lora_bias]
    return tuple(gradient / scaling for gradient, scaling in zip(whole, scalings, strict=True))


MUTANTS = (
    *standard_mutants(*KINDS),
    *wrong("mean for sum", " ".join(KINDS), lambda s, whole: per_token(whole, s)),
    *again("loss scaling forgotten", "d_weight", decoder_step, loss_scaling=1.0),
    *wrong("gradients of the next module", "d_lora_magnitude d_weight", lambda whole: rotated_where_alike(whole)),
    *wrong("scaling forgotten", "d_lora_bias", _unscaled_bias),
    *again("dropout ignored", "d_lora_magnitude d_lora_B", decoder_step, dropout_seed=None),
    *again("padding token left out", "d_lora_A d_weight", lambda _g, s: step_of(s, _as(s, padding_id=3))),
    *again("of the embedding alone", "d_trainable_tokens", lambda _g, s: step_of(s, _as(s, tied_head=False))),
    *wrong("order lost", "d_trainable_tokens", lambda d: d.flip(0)),
    *wrong("rows reversed", "d_bias", lambda d: d.flip(0)),
)

PROOFS = (OpProof("decoder_kinds", decoder_step, CASES, MUTANTS),)
