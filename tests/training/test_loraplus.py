"""LoRA+: lora_B has a learning rate of its own, against torch's AdamW with two groups; and with PEFT's own grouping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backhand.errors import UsageError
from backhand.loop.step import AdapterOptimizer
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.options.config import OptimizationOptions, TrainConfig
from backhand.training.run import train
from tests.support.tiny_run import TinyRun, with_options

SLOTS = (
    LoRASlot("a", 6, 10, 3, 2.0),
    LoRASlot("b", 7, 5, 2, 1.0, use_dora=True),
    LoRASlot("tokens", 11, 4, 2, 1.0, embedding=True),
)
RATE = 3e-3


def drawn() -> LoRAParameters:
    lora = LoRAParameters(list(SLOTS))
    lora.values.copy_(torch.randn(lora.element_count, generator=torch.Generator().manual_seed(0)))
    return lora


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_equals_adamw_with_a_group_of_its_own_for_lora_b(ratio: float) -> None:
    lora = drawn()
    optimizer = AdapterOptimizer(lora, OptimizationOptions(loraplus_lr_ratio=ratio, weight_decay=0.1))
    copies = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in lora.named_tensors()}
    fast = ["a.lora_B", "b.lora_B"]
    reference = torch.optim.AdamW(
        [
            {"params": [copies[name] for name in fast], "lr": ratio * RATE},
            {"params": [copy for name, copy in copies.items() if name not in fast], "lr": RATE},
        ],
        weight_decay=0.1,
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        lora.gradients.copy_(torch.randn(lora.element_count, generator=draw))
        for name, copy in copies.items():
            copy.grad = lora.gradient(name).clone()
        optimizer.step(RATE)
        reference.step()
    assert float(optimizer.updates) == 4
    for name, tensor in lora.named_tensors():
        torch.testing.assert_close(tensor, copies[name].data, rtol=1e-6, atol=1e-7)


def test_a_run_with_it_resumes_to_the_same_bits_and_differs_from_one_without(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", loraplus_lr_ratio=8.0, prove_resume=3, answers=0)
    plus = train(config)
    plain = train(tiny.config(tmp_path / "plain", answers=0))
    assert plus.first_loss == plain.first_loss
    assert plus.last_loss != plain.last_loss
    with pytest.raises(UsageError, match=r"loraplus_lr_ratio: 8\.0 in the run, 4\.0 given"):
        train(with_options(config, resume=True, loraplus_lr_ratio=4.0))


def test_a_ratio_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="loraplus_lr_ratio"):
        with_options(TrainConfig(), loraplus_lr_ratio=0.0).validate()
