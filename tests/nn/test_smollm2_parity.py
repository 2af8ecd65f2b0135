"""The engine on the real model: loss, every adapter gradient, twenty optimizer steps and bfloat16, against PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backhand.loop.step import AdapterOptimizer
from backhand.nn.compute import default_dtype
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.options.config import OptimizationOptions
from tests.support.in_memory import InMemoryModel
from tests.support.no_autograd import autograd_raises
from tests.support.parity import our_gradients, peft_gradients, peft_loss, relative_error, supervise
from tests.support.smollm2 import NAME, smollm2_decoder, smollm2_peft, text_documents

pytestmark = pytest.mark.smollm2
# Where torch emulates bfloat16 a batch takes ten times as long.
BATCHES = 4 if default_dtype() == torch.bfloat16 else 2


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([gradient.flatten().float() for _, gradient in sorted(gradients.items())])


def test_loss_and_every_gradient_in_float32():
    adapted = smollm2_peft(round_to=torch.float32, dtype=torch.float32)
    decoder, batch = smollm2_decoder(adapted, torch.float32), supervise(text_documents())
    loss = peft_loss(adapted, batch)
    (loss / batch.supervised_tokens).backward()
    with autograd_raises():
        ours = decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens)
    assert abs(ours.item() / loss.item() - 1) <= 1e-4
    by_hand, autograd = our_gradients(decoder.lora), peft_gradients(adapted)
    assert by_hand.keys() == autograd.keys() and len(by_hand) == 30 * 7 * 2
    errors = {name: relative_error(by_hand[name], autograd[name]) for name in autograd}
    assert max(errors.values()) <= 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:3]


def _as_phi3(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """q, k and v fused, gate and up too."""
    config |= {"sliding_window": None}
    for layer in range(config["num_hidden_layers"]):
        for half, fused, parts in (("self_attn", "qkv_proj", "qkv"), ("mlp", "gate_up_proj", ("gate", "up"))):
            names = [f"model.layers.{layer}.{half}.{part}_proj.weight" for part in parts]
            weights[f"model.layers.{layer}.{half}.{fused}.weight"] = torch.cat([weights.pop(name) for name in names])


def _as_smollm3(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    """No layer without rotary embedding."""
    config |= {"no_rope_layers": [1] * config["num_hidden_layers"]}


def _as_granite(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Four multipliers, all powers of two, that the weights cancel."""
    config |= {
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.25,
        "attention_multiplier": 8 * config["head_dim"] ** -0.5,
    }
    for name, weight in weights.items():
        power = {"embed_tokens": 0.5, "o_proj": 4.0, "down_proj": 4.0, "q_proj": 0.125}.get(name.split(".")[-2], 1.0)
        weights[name] = weight * power


def _as_granitemoehybrid(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """The same with gate and up in one module, no Mamba layer and no expert."""
    _as_granite(config, weights)
    layers = config["num_hidden_layers"]
    config |= {"num_local_experts": 0, "layer_types": ["full_attention"] * layers, "position_embedding_type": "rope"}
    config |= {"shared_intermediate_size": config["intermediate_size"], "intermediate_size": 1}
    for layer in range(layers):
        gate, up, down = (
            weights.pop(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")
        )
        weights[f"model.layers.{layer}.shared_mlp.input_linear.weight"] = torch.cat([gate, up])
        weights[f"model.layers.{layer}.shared_mlp.output_linear.weight"] = down


def _as_ministral3(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    """yarn by a factor of one, and queries that grow beyond the document."""
    length = config["max_position_embeddings"]
    rule = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": length, "llama_4_scaling_beta": 0.3}
    config["rope_parameters"] = {"rope_theta": config["rope_parameters"]["rope_theta"], **rule}


def _as_mixtral(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Equal experts, of which any two together are one MLP, however a router weighs them."""
    config |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.mlp"
        for part in ("gate", "up", "down"):
            matrix = weights.pop(f"{block}.{part}_proj.weight")
            weights |= {f"{block}.experts.{expert}.{part}_proj.weight": matrix for expert in range(3)}
        generator = torch.Generator().manual_seed(layer)
        weights[f"{block}.gate.weight"] = 0.2 * torch.randn(3, config["hidden_size"], generator=generator)


def _as_gpt_oss(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Equal experts, sinks below all scores, no bias but -1 on up, to which the unit adds 1, and nothing clamped."""
    layers, hidden, width = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    heads, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    config |= {"num_local_experts": 3, "num_experts_per_tok": 2, "swiglu_alpha": 1.0, "swiglu_limit": 1e4}
    config |= {"layer_types": ["full_attention"] * layers, "rope_scaling": None}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for part, size in (("q", heads), ("k", keys), ("v", keys), ("o", hidden)):
            weights[f"{block}.self_attn.{part}_proj.bias"] = torch.zeros(size)
        weights[f"{block}.self_attn.sinks"] = torch.full((config["num_attention_heads"],), -1e4)
        gate, up, down = (weights.pop(f"{block}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        both, bias = torch.stack([gate, up], dim=1).flatten(0, 1), torch.tensor([0.0, -1.0]).repeat(width)
        experts = f"{block}.mlp.experts"
        weights |= {
            f"{experts}.gate_up_proj": both.T.expand(3, -1, -1),
            f"{experts}.down_proj": down.T.expand(3, -1, -1),
        }
        weights |= {
            f"{experts}.gate_up_proj_bias": bias.expand(3, -1),
            f"{experts}.down_proj_bias": torch.zeros(3, hidden),
        }
        generator = torch.Generator().manual_seed(layer)
        weights[f"{block}.mlp.router.weight"] = 0.2 * torch.randn(3, hidden, generator=generator)
        weights[f"{block}.mlp.router.bias"] = torch.randn(3, generator=generator)


_WORDS = (_as_phi3, _as_smollm3, _as_granite, _as_granitemoehybrid, _as_ministral3, _as_mixtral, _as_gpt_oss)


@pytest.mark.parametrize("say", _WORDS, ids=lambda say: say.__name__[4:])
def test_its_weights_said_in_another_familys_words_give_its_logits(say: Callable[..., None]) -> None:
    source = open_model(NAME)
    weights = {name: source.load(name).float() for name in source.tensor_names()}
    (document, *_) = text_documents()
    expected = Decoder.from_source(InMemoryModel(source.config, weights), dtype=torch.float32).logits(document)
    config = copy.deepcopy(source.config) | {"model_type": say.__name__[4:]}
    say(config, weights)
    found = Decoder.from_source(InMemoryModel(config, weights), dtype=torch.float32).logits(document)
    # With a residual multiplier the sum is taken after the product, which rounds otherwise.
    assert relative_error(found, expected) <= 1e-5


def test_twenty_adamw_steps_loss_by_loss():
    adapted = smollm2_peft(round_to=torch.float32, dtype=torch.float32, lora_B=0.0)
    decoder = smollm2_decoder(adapted, torch.float32)
    ours = AdapterOptimizer(decoder.lora, OptimizationOptions(learning_rate=2e-4, max_grad_norm=1.0))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    losses = []
    for step in range(20):
        batch = supervise(text_documents(step)[step % 3 : step % 3 + 2], seed=step)
        theirs.zero_grad()
        loss = peft_loss(adapted, batch) / batch.supervised_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        theirs.step()
        with autograd_raises():
            ours.clear()
            our_loss = decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens) / batch.supervised_tokens
            ours.clip()
            ours.step(2e-4)
            decoder.lora.refresh_compute(torch.float32)
        losses.append((our_loss.item(), loss.item()))
    assert losses[-1][1] < losses[0][1]
    assert max(abs(a / b - 1) for a, b in losses) <= 1e-4, losses


def test_bfloat16_is_as_exact_as_peft_in_bfloat16():
    exact = smollm2_peft(round_to=torch.bfloat16, dtype=torch.float32)
    peft_bf16 = smollm2_peft(round_to=torch.bfloat16, dtype=torch.bfloat16)
    decoder = smollm2_decoder(exact, torch.bfloat16)
    ours, theirs = [], []
    for index in range(BATCHES):
        batch = supervise(text_documents(index), share=(1.0, 0.3)[index % 2], seed=index)
        for model in (exact, peft_bf16):
            model.zero_grad(set_to_none=True)
            (peft_loss(model, batch) / batch.supervised_tokens).backward()
        decoder.lora.gradients.zero_()
        with autograd_raises():
            decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens)
        truth = flat(peft_gradients(exact))
        ours.append(relative_error(flat(our_gradients(decoder.lora)), truth))
        theirs.append(relative_error(flat(peft_gradients(peft_bf16)), truth))
    assert sum(ours) <= 1.2 * sum(theirs), (ours, theirs)
