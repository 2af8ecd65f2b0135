"""The engine on the real model: loss, every adapter gradient, twenty optimizer steps and bfloat16, against PEFT."""

from __future__ import annotations

import pytest
import torch

from backhand.nn.loading.compute_dtype import default_dtype
from backhand.train.config import OptimizationOptions
from backhand.train.optimizer import AdapterOptimizer
from support.no_autograd import autograd_raises
from support.parity import our_gradients, peft_gradients, peft_loss, relative_error, supervise
from support.smollm2 import smollm2_decoder, smollm2_peft, text_documents

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
