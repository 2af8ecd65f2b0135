"""All that the engine trains other than plain LoRA, against transformers and PEFT: logits and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from backhand.nn.decoder import group_extras
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, TrainedTensor
from tests.support.any_models import their_factors
from tests.support.in_memory import InMemoryModel
from tests.support.no_autograd import autograd_raises
from tests.support.parity import peft_loss, relative_error, supervise
from tests.support.saved_adapters import load_adapter
from tests.support.tiny_models import attach_lora, tiny_documents, tiny_model

LENGTHS = (23, 9, 9, 1, 18)
SEEN = tiny_documents(LENGTHS)[0][[4, 0, 9]].tolist()
"""Tokens that occur, in no order."""
LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]

# name: model, PEFT's options
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA, q/k norm": ("qwen3", {"use_dora": True, "target_modules": LINEAR}),
    "DoRA, sandwich norms, rsLoRA": ("gemma3_text", {"use_dora": True, "use_rslora": True}),
    "DoRA, biases": ("llama-biases", {"use_dora": True, "target_modules": ["k_proj", "gate_proj", "o_proj"]}),
    "DoRA, head": ("llama", {"use_dora": True, "target_modules": ["lm_head", "down_proj"]}),
    "lora_bias": ("llama", {"lora_bias": True, "target_modules": [*LINEAR, "lm_head"]}),
    "lora_bias, biases": ("qwen2", {"lora_bias": True, "target_modules": ["v_proj", "gate_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding, tied, with head": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding, DoRA": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head in full": ("llama", {"modules_to_save": ["lm_head"]}),
    "tied head in full": ("llama-tied", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "embedding in full": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "tied embedding in full": ("qwen2", {"modules_to_save": ["embed_tokens"], "target_modules": ["v_proj"]}),
    "norms": ("llama", {"modules_to_save": ["norm"], "target_modules": ["layers.1.mlp.down_proj"]}),
    "sandwich norms": ("gemma3_text", {"modules_to_save": ["norm", "layernorm"], "target_modules": ["2.mlp.up_proj"]}),
    "norms after, q/k norms over all heads": (
        "olmo2",
        {"modules_to_save": ["norm", "layernorm", "q_norm", "k_norm"], "target_modules": ["2.mlp.up_proj"]},
    ),
    "DoRA, norms after": ("olmo3", {"use_dora": True}),
    "norms by GLM's names": ("glm4", {"modules_to_save": ["norm", "layernorm"], "target_modules": ["gate_up_proj"]}),
    "norms by LFM2's names": (
        "lfm2",
        {"modules_to_save": ["_norm", "_layernorm"], "target_modules": ["1.feed_forward.w2", "3.conv.out_proj"]},
    ),
    "modules around a convolution in full": (
        "lfm2-biases",
        {"modules_to_save": ["conv.in_proj", "conv.out_proj"], "target_modules": ["w1"]},
    ),
    "DoRA, convolutions": ("lfm2", {"use_dora": True}),
    "norms, the delta rule's too": (
        "qwen3_5_text",
        {"modules_to_save": ["norm", "layernorm", "q_norm", "k_norm"], "target_modules": ["1.linear_attn.in_proj_qkv"]},
    ),
    "modules of the delta rule in full": (
        "qwen3_5_text",
        {"modules_to_save": ["in_proj_qkv", "in_proj_b", "out_proj"], "target_modules": ["in_proj_z"]},
    ),
    "DoRA, delta rules": ("qwen3_5_text", {"use_dora": True}),
    "norms, of lenders and users of keys": (
        "gemma4_text",
        {
            "modules_to_save": ["layernorm", "q_norm", "k_norm", "post_per_layer_input_norm"],
            "target_modules": ["6.per_layer_projection"],
        },
    ),
    "keys and gates of the layers' inputs in full": (
        "gemma4_text",
        {"modules_to_save": ["2.self_attn.k_proj", "per_layer_input_gate"], "target_modules": ["q_proj"]},
    ),
    "tied embedding in full, from which the inputs of layers come": (
        "gemma4_text",
        {"modules_to_save": ["embed_tokens"], "target_modules": ["v_proj"]},
    ),
    "DoRA, inputs of layers": ("gemma4_text", {"use_dora": True}),
    "DoRA, fused": ("phi3-longrope", {"use_dora": True}),
    "lora_bias, fused": ("phi3", {"lora_bias": True, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "fused in full": ("phi3", {"modules_to_save": ["qkv_proj", "gate_up_proj"], "target_modules": ["down_proj"]}),
    "q/k norms": ("qwen3", {"modules_to_save": ["q_norm", "k_norm"], "target_modules": ["2.mlp.down_proj"]}),
    "linear modules in full": (
        "llama-biases",
        {"modules_to_save": ["k_proj", "gate_proj", "1.self_attn.o_proj"], "target_modules": ["q_proj", "up_proj"]},
    ),
    "tokens": ("llama", {"trainable_token_indices": SEEN}),
    "tied tokens": ("llama-tied", {"trainable_token_indices": [*SEEN, 200]}),
    "tied tokens, padding among them": ("llama3", {"trainable_token_indices": [41, 2], "target_modules": ["q_proj"]}),
    "many kinds": (
        "qwen2",
        {"use_dora": True, "trainable_token_indices": [17, 5], "modules_to_save": ["model.norm"]},
    ),
}


def their_model(variant: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with PEFT's adapter, everything trained in it moved away from where it starts."""
    adapted = attach_lora(tiny_model(variant, dtype=dtype), rank=5, alpha=8.5, **options)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif "lora_B" in name and name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


PEFTs = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def pefts(tmp_path_factory: pytest.TempPathFactory) -> PEFTs:
    """PEFT's model of a kind, without gradients, and the directory of its adapter; made when first asked for."""

    @cache
    def made(name: str) -> tuple[Any, Path]:
        adapted, directory = their_model(*KINDS[name]), tmp_path_factory.mktemp("kind")
        adapted.save_pretrained(str(directory))
        return adapted, directory

    def given(name: str) -> tuple[Any, Path]:
        adapted, directory = made(name)
        adapted.zero_grad()
        return adapted, directory

    return given


def our_decoder(name: str, pefts: PEFTs, **options: Any) -> Decoder:
    """The engine with the same base, and the adapter from PEFT's own files."""
    base, (_, directory) = tiny_model(KINDS[name][0]), pefts(name)
    decoder = Decoder.from_source(
        InMemoryModel(base.config.to_dict(), dict(base.state_dict())), dtype=torch.float32, **options
    )
    decoder.attach(load_adapter(directory, decoder.module_shapes()).parameters())
    return decoder


def their_gradients(adapted: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in their_factors(adapted).items():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_logits_loss_and_every_gradient_equal_pefts(name: str, pefts: PEFTs) -> None:
    adapted, _ = pefts(name)
    decoder = our_decoder(name, pefts)
    documents = tiny_documents(LENGTHS)
    batch = supervise(documents)
    with torch.no_grad():
        theirs = torch.cat([adapted(input_ids=document[None]).logits[0] for document in documents])
    with autograd_raises():
        assert relative_error(decoder.logits(batch.input_ids, batch.lengths), theirs) <= 1e-5
    loss = peft_loss(adapted, batch)
    (loss / batch.supervised_tokens).backward()
    with autograd_raises():
        ours = decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens)
    assert abs(ours.item() / loss.item() - 1) <= 1e-5
    assert abs(decoder.loss(batch).item() / loss.item() - 1) <= 1e-5
    lora = decoder.lora
    assert lora is not None
    expected = their_gradients(adapted)
    assert set(expected) == {trained for trained, _ in lora.named_tensors()}
    for trained, gradient in expected.items():
        mine = lora.gradient(trained)
        assert float(gradient.abs().max()) > 0, trained
        assert relative_error(mine, gradient.view(mine.shape)) <= 2e-5, trained


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("name", ["DoRA, q/k norm", "sandwich norms", "linear modules in full", "lora_bias"])
def test_recomputed_equals_kept(name: str, recompute: str, pefts: PEFTs) -> None:
    batch, gradients = supervise(tiny_documents(LENGTHS)), []
    for mode in ("none", recompute):
        decoder = our_decoder(name, pefts, recompute=mode)
        assert decoder.lora is not None
        decoder.lora = with_dropout(decoder.lora, 0.3)
        decoder.attach(decoder.lora)
        decoder.loss_and_gradients(batch, 0.1, dropout_seed=7)
        gradients.append(decoder.lora.gradients.clone())
    assert torch.equal(*gradients) and math.isfinite(float(gradients[0].norm()))


def with_dropout(lora: LoRAParameters, probability: float) -> LoRAParameters:
    slots = [replace(slot, dropout=0.0 if slot.embedding else probability) for slot in lora.slots.values()]
    dropped = LoRAParameters(slots, full_tensors=lora.full_tensors.values())
    dropped.values.copy_(lora.values)
    return dropped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_generation_token_by_token_equals_all_at_once(name: str, pefts: PEFTs) -> None:
    decoder = our_decoder(name, pefts)
    (document,) = tiny_documents((13,))
    whole = decoder.logits(document)
    state = IncrementalDecoder(decoder)
    state.cache.add_rows(1)
    steps = [state.extend([0], [document[:6].tolist()])]
    steps += [state.step([int(token)]) for token in document[6:]]
    assert relative_error(torch.cat(steps), whole[5:]) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DoRA, head", "lora_bias", "tied tokens", "head in full"])
def test_exact_candidates_in_bfloat16_know_the_adapter(name: str, pefts: PEFTs) -> None:
    """The likeliest tokens' logits are multiplied again in float32: with everything that the head has."""
    decoder, base = our_decoder(name, pefts), tiny_model(KINDS[name][0])
    low = Decoder.from_source(InMemoryModel(base.config.to_dict(), dict(base.state_dict())), dtype=torch.bfloat16)
    assert decoder.lora is not None
    low.attach(with_dropout(decoder.lora, 0.0))
    (document,) = tiny_documents((9,))
    found = []
    for model in (decoder, low):
        state = IncrementalDecoder(model)
        state.cache.add_rows(1)
        found.append(state.extend([0], [document.tolist()])[0])
    wide, narrow = found
    best = wide.topk(8).indices
    assert relative_error(narrow[best], wide[best]) <= 0.05


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_detached_it_is_the_base_and_fresh_it_changes_nothing(name: str, pefts: PEFTs) -> None:
    decoder = our_decoder(name, pefts)
    (document,) = tiny_documents((13,))
    changed, lora = decoder.logits(document), decoder.lora
    assert lora is not None
    bits = {tensor: view.clone() for tensor, view in decoder.frozen_tensors()}
    decoder.detach()
    base = decoder.logits(document)
    assert relative_error(changed, base) > 1e-3
    fresh = LoRAParameters(lora.slots.values(), full_tensors=lora.full_tensors.values())
    fresh.initialise(torch.Generator().manual_seed(0))
    decoder.start_values(fresh)
    decoder.attach(fresh)
    assert relative_error(decoder.logits(document), base) <= 1e-6
    assert all(torch.equal(view, bits[tensor]) for tensor, view in decoder.frozen_tensors())


def test_an_adapter_of_other_shapes_is_refused() -> None:
    base = tiny_model("llama")
    decoder = Decoder.from_source(InMemoryModel(base.config.to_dict(), dict(base.state_dict())), dtype=torch.float32)
    for lora in (
        LoRAParameters([LoRASlot("model.embed_tokens", 306, 60, 2, 1.0, embedding=True)]),
        LoRAParameters([], full_tensors=[TrainedTensor("model.norm.weight", (61,))]),
        LoRAParameters([], full_tensors=[TrainedTensor("model.embed_tokens.trainable_tokens", (3, 61), (1, 2, 3))]),
        LoRAParameters([], full_tensors=[TrainedTensor("nothing.weight", (60,))]),
    ):
        with pytest.raises(ValueError, match="model has"):
            decoder.attach(lora)


def test_the_comparison_notices_a_magnitude_gradient_left_out(pefts: PEFTs, monkeypatch: Any) -> None:
    right = group_extras.dora_linear_backward

    def wrong(d_y: torch.Tensor, saved: Any, **options: Any) -> Any:
        grads = right(d_y, saved, **options)
        return grads._replace(d_magnitude=grads.d_magnitude * 1.001)

    monkeypatch.setattr(group_extras, "dora_linear_backward", wrong)
    with pytest.raises(AssertionError, match="magnitude"):
        test_logits_loss_and_every_gradient_equal_pefts("DoRA", pefts)
