"""A tiny decoder with everything that can be trained in addition to LoRA: the loss and every gradient of a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backhand.verify.decoder_op import KINDS, DecoderInputs, decoder_op, per_token, rebuilt
from backhand.verify.mutants import rotate_equal_shapes, wrong
from backhand.verify.scaffold import Case
from backhand.verify.tiny_decoders import FAMILIES

GEMMA4 = "gemma4, shared"
OP = decoder_op("decoder_kinds", (9, 5, 1, 11), "_proj query value dense Wqkv Wo Wi")
TIED = "llama 3"


def _dora(name: str, family: str, *trained: str, **options: Any) -> Case:
    return OP.case(name, family, *trained, use_dora=True, exempt=("lora_A", "lora_B"), **options)


CASES = (
    *(_dora(f"{family}; DoRA", family) for family in FAMILIES),
    _dora("shared prefix, DoRA, tied token rows", TIED, tokens=(3, 8, 11), shared=6),
    OP.case("shared prefix, norms", "gemma3", whole="norm.weight", shared=7),
    OP.case("shared prefix, lora_bias, biases", "qwen2", lora_bias=True, whole=".bias", shared=4),
    _dora("DoRA, dropout, recompute mlp", "qwen3, q/k norm", dropout=0.2, recompute="mlp"),
    _dora("DoRA, dropout, recompute block", "gemma3", dropout=0.2, recompute="block"),
    _dora("DoRA, some modules, head too", "llama", "k_proj gate_proj o_proj lm_head"),
    _dora("DoRA, scaled logits", "granite, four", "v_proj lm_head"),
    OP.case("scaled logits, tied token rows", "granite, four", "v_proj", tokens=(7, 2, 11)),
    _dora("DoRA, capped logits", "gemma2", "v_proj lm_head"),
    OP.case("lora_bias", "llama", "_proj lm_head", lora_bias=True),
    OP.case("lora_bias, biases, dropout", "qwen2", lora_bias=True, dropout=0.2),
    OP.case("embedding", "gemma3", "embed_tokens v_proj"),
    _dora("tied embedding and head, DoRA", TIED, "embed_tokens lm_head up_proj"),
    OP.case("head and table in full", "llama", whole="lm_head.weight embed_tokens.weight"),
    OP.case("tied head in full", TIED, "q_proj", "lm_head.weight"),
    OP.case("tied table in full", TIED, "q_proj", "embed_tokens.weight"),
    OP.case("every norm", "gemma3", "1.mlp.up_proj", "norm.weight"),
    OP.case("every norm, after the halves alone", "olmo2", "1.mlp.up_proj", "norm.weight"),
    OP.case("norm after the top block's attention", "olmo3", "1.mlp.down_proj", "1.post_attention_layernorm.weight"),
    OP.case("every norm by GLM's names", "glm4", "1.mlp.down_proj", "norm.weight"),
    OP.case("fused modules in full", "phi3", "down_proj", "0.self_attn.qkv_proj.weight 1.mlp.gate_up_proj.weight"),
    _dora(
        "delta rule, DoRA, dropout", "qwen3.5", "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj q_proj", dropout=0.2
    ),
    OP.case("every norm, the delta rule's too", "qwen3.5", "2.mlp.up_proj", "norm.weight", shared=4),
    OP.case(
        "modules of the delta rule in full",
        "qwen3.5",
        "in_proj_z",
        "0.linear_attn.in_proj_qkv.weight 2.linear_attn.in_proj_b.weight 2.linear_attn.out_proj.weight",
    ),
    OP.case("every norm, mamba's too", "bamba", "1.feed_forward.up_proj", "norm.weight", shared=4),
    OP.case(
        "modules of mamba in full", "bamba", "down_proj", "0.mamba.in_proj.weight 0.mamba.out_proj.bias", dropout=0.2
    ),
    _dora("mamba next to attention, DoRA, dropout", "falcon-h1, mamba", "o_proj out_proj in_proj", dropout=0.2),
    _dora("one sublayer a block, DoRA, dropout", "nemotron", "up_proj down_proj in_proj o_proj", dropout=0.2),
    OP.case("every norm of one sublayer a block", "nemotron", "1.mixer.up_proj", "norm.weight norm_f.weight"),
    OP.case("every norm, also before the gate", "falcon-h1, norm", "0.feed_forward.up_proj", "norm.weight"),
    OP.case("every norm by LFM2 names", "lfm2, short", "2.feed_forward.w2", "norm.weight"),
    OP.case(
        "modules around a convolution in full",
        "lfm2, biases",
        "w2",
        "0.conv.in_proj.weight 0.conv.out_proj.bias 1.self_attn.out_proj.weight",
    ),
    OP.case(
        "embedding, from which the inputs of layers come",
        GEMMA4,
        "embed_tokens 0.self_attn.k_proj per_layer_model_projection",
        dropout=0.2,
    ),
    OP.case(
        "token rows, from which the inputs of layers come",
        GEMMA4,
        "4.self_attn.q_proj",
        tokens=(7, 2, 11),
        recompute="block",
    ),
    OP.case("every norm, of lenders and users of keys", GEMMA4, "5.mlp.up_proj", "norm.weight", shared=4),
    OP.case(
        "keys and gates of the layers' inputs in full",
        GEMMA4,
        "2.per_layer_projection",
        "0.self_attn.k_proj.weight 1.self_attn.v_proj.weight 3.per_layer_input_gate.weight",
    ),
    OP.case("norms of the top block", "llama", "1.mlp.down_proj", "1.input_layernorm.weight"),
    OP.case("linear modules in full", "qwen2", whole="k_proj.weight k_proj.bias 0.mlp.up_proj.weight"),
    OP.case("token rows", "llama", "v_proj", tokens=(7, 2, 11)),
    OP.case("tied token rows", TIED, "v_proj", tokens=(7, 2, 11), recompute="block"),
    _dora("tied token rows, one document", "gemma3", "v_proj", tokens=(3,), documents=(13,)),
    _dora("no tokens", TIED, tokens=(3,), whole="model.norm.weight", documents=(0,)),
)


def _unscaled_bias(s: DecoderInputs, whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scalings = [slot.scaling for slot in s.lora.slots.values() if slot.lora_bias]
    return tuple(gradient / scaling for gradient, scaling in zip(whole, scalings, strict=True))


MUTANTS = (
    wrong("mean for sum", " ".join(KINDS), lambda s, whole: per_token(whole, s)),
    OP.perturb("loss scaling forgotten", "d_weight", loss_scaling=1.0),
    wrong("gradients of the next module", "d_lora_magnitude d_weight", rotate_equal_shapes),
    wrong("scaling forgotten", "d_lora_bias", _unscaled_bias),
    OP.perturb("dropout ignored", "d_lora_magnitude d_lora_B", dropout_seed=None),
    OP.perturb("padding token left out", "d_lora_A d_weight", decoder=lambda s: rebuilt(s.decoder, padding_id=3)),
    OP.perturb("of the embedding alone", "d_trainable_tokens", decoder=lambda s: rebuilt(s.decoder, tied_head=False)),
    wrong("order lost", "d_trainable_tokens", lambda d: d.flip(0)),
    wrong("rows reversed", "d_bias", lambda d: d.flip(0)),
)
