"""An injected model in Hugging Face's Trainer, which does not know about it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import inject, inject_from
from backhand.adapters.trainer_callback import AdapterCallback
from backhand.nn.modules import functions as lora_functions


def rows(count: int) -> list[dict[str, Tensor]]:
    """Sequences whose class is that of their first token, which a frozen random encoder does not know."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 20, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def trainer(model: nn.Module, directory: Path, callbacks: Any = None, held_out: Any = None, **arguments: Any) -> Any:
    return transformers.Trainer(
        model=cast("Any", model),
        callbacks=callbacks,
        args=transformers.TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=16,
            learning_rate=2e-2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
            **{"save_strategy": "no", "max_steps": 40, **arguments},
        ),
        train_dataset=cast("Any", rows(64)),
        eval_dataset=held_out,
    )


def losses(done: Any) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_falls_and_only_the_adapter_moves(checkpointing: bool, tmp_path: Path) -> None:
    model = classifier()
    adapter = inject(model, LoRAConfig(rank=4, alpha=8, dropout=0.05))
    before = copy.deepcopy(model.state_dict())
    done = trainer(
        model,
        tmp_path,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=40,
    )
    done.train()
    run = losses(done)
    assert sum(run[-5:]) < 0.5 * sum(run[:5])
    own = {name for name, _ in adapter.named_parameters()}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == own
    # The Trainer stores the whole model under the base model's names, and the factors in addition.
    stored = load_file(tmp_path / "checkpoint-40" / "model.safetensors")
    assert set(stored) == set(before)
    adapter.save(tmp_path / "adapter")
    again = inject_from(classifier(), tmp_path / "adapter")
    ids = torch.stack([row["input_ids"] for row in rows(8)])
    with torch.no_grad():
        assert torch.equal(again.module.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_with_the_callback_checkpoints_are_the_adapter_and_resume_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(directory: Path, resume: bool = False, **arguments: Any) -> tuple[Any, list[float]]:
        model = classifier()
        adapter = inject(model, LoRAConfig(rank=4, alpha=8))
        given = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20, **arguments}
        done = trainer(model, directory, [AdapterCallback(adapter, base_model="any/bert")], **given)
        done.train(resume_from_checkpoint=resume)
        return adapter, losses(done)

    whole, all_losses = run(tmp_path / "whole")
    parts = tmp_path / "parts"
    run(parts)
    shutil.rmtree(parts / "checkpoint-20")
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    resumed, later = run(parts, resume=True)
    assert not [record for record in said if "missing keys" in record.getMessage()]
    assert later[-10:] == all_losses[-10:]
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    checkpoint = parts / "checkpoint-20"
    assert set(load_file(checkpoint / "model.safetensors")) == {name for name, _ in resumed.named_parameters()}
    again = inject_from(classifier(), checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), resumed.parameters(), strict=True))
    assert json.loads((parts / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "any/bert"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_learns_by_our_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backward that returns zeros, the same run changes nothing."""
    right = lora_functions.lora_linear.backward

    def zeros(d_y: Tensor, saved: Any, **options: Any) -> Any:
        grads = right(d_y, saved, **options)
        return grads._replace(d_lora_A=0 * grads.d_lora_A, d_lora_B=0 * grads.d_lora_B)

    monkeypatch.setattr(lora_functions.lora_linear, "backward", zeros)
    model = classifier()
    adapter = inject(model, LoRAConfig(rank=4))
    trainer(model, tmp_path, weight_decay=0.0).train()
    assert not any(parameter.any() for name, parameter in adapter.named_parameters() if name.endswith("lora_B"))
