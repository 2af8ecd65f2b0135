"""Trained rows of an embedding with a tied output head: one parameter that both use."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import InjectedAdapter, inject
from tests.support.any_models import distance, outputs, randomise, state, word_ids
from tests.support.tiny_models import tiny_model

ROWS = "model.embed_tokens.trainable_tokens"
CONFIG = LoRAConfig(rank=2, target_modules=("q_proj",), trainable_token_indices=(3, 5))


def tied() -> tuple[Any, InjectedAdapter]:
    model = tiny_model("llama-tied")
    adapter = inject(model, CONFIG)
    randomise(adapter)
    return model, adapter


def test_the_rows_are_one_parameter_under_one_name() -> None:
    model, adapter = tied()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "tokens" in name.split(".")[-1]]
    assert names == [ROWS]
    assert [key for key in model.state_dict() if key.endswith("trainable_tokens")] == [ROWS]
    assert model.lm_head.rows is model.model.embed_tokens.trainable_tokens is dict(adapter.named_parameters())[ROWS]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_rows_of_their_own(duplicate: Any) -> None:
    model, _ = tied()
    x = word_ids()
    with torch.no_grad():
        expected = outputs(model, x)
        copied = duplicate(model)
        assert copied.lm_head.rows is copied.model.embed_tokens.trainable_tokens
        copied.model.embed_tokens.trainable_tokens.mul_(2)
        assert torch.equal(outputs(model, x), expected)
        assert not torch.equal(outputs(copied, x), expected)


def test_a_moved_model_a_state_dict_merging_and_removing() -> None:
    model, adapter = tied()
    other, _ = tied()
    x = word_ids()
    before = state(tiny_model("llama-tied"))
    with torch.no_grad():
        expected = outputs(model, x)
        other.model.embed_tokens.trainable_tokens.zero_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(outputs(other, x), expected)
        adapter.merge()
        assert distance(outputs(model, x), expected) <= 1e-5
        adapter.unmerge()
        model.double()
        assert distance(outputs(model, x).float(), expected) <= 1e-5
        model.float()
        adapter.remove()
        assert torch.equal(outputs(model, x), outputs(tiny_model("llama-tied"), x))
    after = state(model)
    assert after["types"] == before["types"] and after["attributes"] == before["attributes"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_head_takes_fp32_states_inside_autocast() -> None:
    """Norms leave fp32 there, which the head multiplies in bf16 as a plain one does."""
    model, adapter = tied()
    rows = dict(adapter.named_parameters())[ROWS]
    x, d_y = torch.randn(3, 60), torch.randn(3, 307)
    mine, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
    (d_rows,) = torch.autograd.grad(model.lm_head(x), rows, d_y)
    model.lm_head(exact).backward(d_y)
    rows.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = model.lm_head(mine)
    assert y.dtype == torch.bfloat16
    y.backward(d_y.bfloat16())
    for got, expected in ((rows.grad, d_rows), (mine.grad, exact.grad)):
        assert got is not None and expected is not None
        assert got.dtype == torch.float32 and distance(got, expected) <= 1e-2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hugging_faces_trainer_stores_a_checkpoint(tmp_path: Path) -> None:
    model, adapter = tied()
    rows = dict(adapter.named_parameters())[ROWS]
    before = rows.detach().clone()
    examples: list[dict[str, Tensor]] = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 8
    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        train_dataset=cast("Any", examples),
    ).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert not torch.equal(rows, before)
