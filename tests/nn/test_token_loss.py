"""A loss of the tokens' log-probabilities: `Decoder.loss_and_gradients(…, token_loss=…)`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.head_factors import HeadFactors
from backhand.ops.linear_cross_entropy import linear_cross_entropy_reference
from backhand.ops.logits_rule import LogitsRule
from backhand.ops.target_logits import exact_targets_forward
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error, supervise
from tests.support.tiny_models import attach_lora, tiny_documents, tiny_model

RANK, ALPHA = 5, 8.5
LENGTHS = (23, 9, 9, 1, 18)
SCALING = 0.37


def _curved(log_p: torch.Tensor) -> torch.Tensor:
    """Any function of the log-probabilities whose weights differ in size and sign."""
    places = torch.arange(1, len(log_p) + 1, dtype=log_p.dtype)
    return (torch.sin(places) * log_p + 0.01 * log_p**2).sum()


def _token_loss(log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(1, len(log_p) + 1, dtype=log_p.dtype)
    return _curved(log_p).double(), torch.sin(places) + 0.02 * log_p


def _peft_log_p(adapted, batch) -> torch.Tensor:
    found = []
    ids, labels = batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)
    for document, targets in zip(ids, labels, strict=True):
        log_p = torch.log_softmax(adapted(input_ids=document[None]).logits[0].float(), -1)
        there = targets != -100
        found.append(log_p[there].gather(1, targets[there][:, None]).squeeze(1))
    return torch.cat(found)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite", "qwen3"])
def test_every_gradient_equals_autograd(variant):
    adapted = attach_lora(tiny_model(variant), rank=RANK, alpha=ALPHA)
    decoder, batch = decoder_like(adapted, ALPHA / RANK), supervise(tiny_documents(LENGTHS))
    loss = _curved(_peft_log_p(adapted, batch))
    (SCALING * loss).backward()
    ours = decoder.loss_and_gradients(batch, SCALING, token_loss=_token_loss)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    theirs = peft_gradients(adapted)
    worst = {name: relative_error(gradient, theirs[name]) for name, gradient in our_gradients(decoder.lora).items()}
    assert worst.keys() == theirs.keys()
    assert max(worst.values()) <= 2e-5, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_weights_of_one_are_the_cross_entropy(dropout):
    """Both passes of the head see the same dropout masks, or the second would differ from the fused one."""
    adapted = attach_lora(
        tiny_model("llama"), rank=RANK, alpha=ALPHA, target_modules=("q_proj", "down_proj", "lm_head")
    )
    decoder, batch = decoder_like(adapted, ALPHA / RANK), supervise(tiny_documents(LENGTHS))
    lora = LoRAParameters(replace(slot, dropout=dropout) for slot in decoder.lora.slots.values())
    lora.values.copy_(decoder.lora.values)
    decoder.attach(lora)
    seed = 7 if dropout else None
    seen = []

    def ones(log_p):
        seen.append(log_p)
        return -log_p.sum(dtype=torch.float64), -torch.ones_like(log_p)

    fused = decoder.loss_and_gradients(batch, SCALING, seed)
    expected = decoder.lora.gradients.clone()
    decoder.lora.gradients.zero_()
    weighted = decoder.loss_and_gradients(batch, SCALING, seed, ones)
    assert weighted.item() == fused.item()
    assert relative_error(decoder.lora.gradients, expected) <= 1e-6
    assert len(seen) == 1
    assert seen[0].shape == (batch.supervised_tokens,)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("adapted", [False, True])
def test_losses_in_bfloat16_tell_targets_apart_whose_logits_are_rounded_alike(cap: float | None, adapted: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 64, generator=draw), 0.02 * torch.randn(40, 64, generator=draw)
    weight[:8] += 20 * x / x.square().sum()  # their logits are near 20
    x, weight = x.bfloat16(), weight.bfloat16()
    factors = 0.1 * torch.randn(4, 64, generator=draw), 0.1 * torch.randn(40, 4, generator=draw)
    head = HeadFactors(*(one.bfloat16() for one in factors), scaling=0.5) if adapted else None
    rule, targets = LogitsRule(1.5, cap), torch.arange(40)
    losses = exact_targets_forward(x.expand(40, -1), weight, targets, head, rule)
    wide = None if head is None else HeadFactors(head.lora_A.double(), head.lora_B.double(), head.scaling)
    exact = linear_cross_entropy_reference(x.double().expand(40, -1), weight.double(), targets, wide, rule)
    assert len({*losses.tolist()}) == 40 and bool((losses > 0).all())
    assert float((losses - exact).abs().max()) < 0.05
