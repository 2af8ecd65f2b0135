"""Micro-batches whose rows begin alike: the same loss and gradient from fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backhand.data import prefix_forest
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.engines.memory.shapes import largest_shapes
from backhand.engines.transformers_engine import TransformersModel
from backhand.loop.observers import Observer
from backhand.nn.batch import PackedBatch, bucket_size, pad_to_bucket
from backhand.training.run import train
from tests.support.parity import decoder_like, our_gradients, peft_gradients, peft_loss, relative_error
from tests.support.tiny_models import VOCAB_SIZE, attach_lora, tiny_model
from tests.support.tiny_run import TinyRun

PROMPT = 24
OWN = (6, 9, 9, 13, 7)


def rows_with_a_system_prompt() -> list[Example]:
    """Rows that begin with the same tokens, their last three supervised."""
    draw = np.random.default_rng(3)
    system = draw.integers(5, VOCAB_SIZE, PROMPT)
    rows = []
    for number, own in enumerate(OWN):
        # The first own token is another one in each row.
        ids = np.concatenate([system, [5 + number], draw.integers(5, VOCAB_SIZE, own)]).astype(np.int32)
        supervised = np.zeros(len(ids), dtype=np.bool_)
        supervised[-3:] = True
        rows.append(Example(ids, supervised, "f:1"))
    return rows


def packed(*, share_prefixes: bool) -> PackedBatch:
    rows = rows_with_a_system_prompt()
    return RowPacker(rows, share_prefixes=share_prefixes).packed(range(len(rows)), "cpu")


def test_a_micro_batch_holds_a_shared_prefix_once() -> None:
    once, each = packed(share_prefixes=True), packed(share_prefixes=False)
    assert once.lengths[0] == PROMPT and once.parents[:6] == (-1, 0, 0, 0, 0, 0) and not each.parents
    tokens = sum(PROMPT + own for own in OWN)
    assert len(each.input_ids) == bucket_size(tokens)
    assert len(once.input_ids) == bucket_size(tokens - (len(OWN) - 1) * PROMPT)
    assert once.supervised_tokens == each.supervised_tokens == 3 * len(OWN)


# The windows of mistral and gemma3_text are shorter than the prefix.
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_loss_and_gradients_of_a_shared_prefix_equal_pefts_of_whole_rows(variant: str, recompute: str) -> None:
    adapted = attach_lora(tiny_model(variant), rank=5, alpha=8.5)
    decoder = decoder_like(adapted, 8.5 / 5, recompute=recompute)
    once, each = packed(share_prefixes=True), packed(share_prefixes=False)
    loss = peft_loss(adapted, each)
    loss.backward()
    assert decoder.loss_and_gradients(once, 1.0).item() == pytest.approx(loss.item(), rel=1e-5)
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    worst = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) <= 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:3]
    assert relative_error(decoder.token_losses(once), decoder.token_losses(each)) <= 1e-5


def test_transformers_refuses_a_shared_prefix() -> None:
    model = TransformersModel(tiny_model("llama"))
    with pytest.raises(ValueError, match="must not share tokens"):
        model.token_losses(packed(share_prefixes=True)).sum()


def test_a_filler_is_no_document_and_carries_no_loss() -> None:
    batch = PackedBatch(torch.arange(20), torch.full((20,), -100), (5, 9, 6), (-1, 0, 0))
    filled = pad_to_bucket(batch)
    assert (filled.lengths, filled.parents, filled.ends) == ((5, 9, 6, 12), (-1, 0, 0, -1), (1, 2))
    assert filled.positions[-12:].tolist() == list(range(12))
    assert filled.supervised_tokens == 0


def test_the_memory_plan_counts_a_shared_prefix_once() -> None:
    rows = rows_with_a_system_prompt()
    packer = RowPacker(rows, share_prefixes=True)
    every = range(len(rows))
    shapes = largest_shapes([every], packer, [1, len(rows)])
    assert shapes[len(rows)].tokens == len(packer.packed(every, "cpu").input_ids)
    assert shapes[1].tokens == bucket_size(max(packer.lengths))


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_a_run_learns_the_same_from_shared_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TinyRun(tmp_path)
    instruction = "answer in json with a list of names and one number for what the user asks and is a list of names: "
    lines = [json.loads(line) for line in tiny.rows.read_text().splitlines()]
    tiny.rows.write_text("".join(json.dumps({**row, "prompt": instruction + row["prompt"]}) + "\n" for row in lines))
    shared: list[bool] = []
    packed = RowPacker.packed

    def watched(*args: Any) -> PackedBatch:
        batch = packed(*args)
        shared.append(bool(batch.parents))
        return batch

    monkeypatch.setattr(RowPacker, "packed", watched)
    opening: list[str] = []
    watch = Observer()
    watch.started = lambda start: opening.extend(start.facts)
    train(tiny.config(tmp_path / "once", eval_data=()), callbacks=[watch])
    assert shared and all(shared)
    assert any("of their tokens are computed once for a whole micro-batch" in line for line in opening)
    shared.clear()
    train(tiny.config(tmp_path / "masked", eval_data=(), dropout=0.1))
    assert shared and not any(shared), "dropout draws a mask for each row"
    monkeypatch.setattr(prefix_forest, "MIN_SAVED_TOKENS", 1 << 40)
    opening.clear()
    train(tiny.config(tmp_path / "each", eval_data=()), callbacks=[watch])
    assert not any("computed once" in line for line in opening)
    assert _losses(tmp_path / "once") == pytest.approx(_losses(tmp_path / "each"), rel=1e-5)
