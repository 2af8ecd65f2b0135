"""Whole runs on another device: the losses of the processor, resumed exactly, and adapters that answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from backhand.data.packing import RowPacker
from backhand.engines import machine
from backhand.options.config import TrainConfig
from backhand.training.run import train
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options, write_pairs

KINDS: dict[str, dict[str, Any]] = {
    "rows": {},
    "DoRA": {"use_dora": True},
    "dropout": {"dropout": 0.1},
    "upper layers": {"layers": "last:1"},
    "quantized": {"base": "quantized", "quantize": "q8_0"},
    "recomputed": {"recompute": "block"},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
    "rewards": {"objective": "grpo", "group": 4, "max_new_tokens": 6, "eval_data": ()},
}
REWARD = (
    "def even(completion_ids, **_):\n    return [sum(one % 2 for one in ids) / len(ids) for ids in completion_ids]\n"
)


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Runs are on the device of these tests, but for those on the processor."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(machine, "resolve_device", lambda model: cpu if model.device == "cpu" else device)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_losses_of_the_processor(
    kind: str, tiny: TinyRun, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(KINDS[kind])
    if kind in ("dpo", "kto"):
        rows = write_pairs(tmp_path / "pairs.jsonl", 12, labelled=kind == "kto")
        options |= {"data": (str(rows),), "eval_data": ()}
    if kind == "rewards":
        (tmp_path / "reward.py").write_text(REWARD)
        options["reward"] = (f"{tmp_path / 'reward.py'}:even",)
    found: list[list[float]] = []
    places: list[str] = []
    packed = RowPacker.packed

    def noted(self: RowPacker, rows: Any, place: Any) -> Any:
        places.append(torch.device(place).type)
        return packed(self, rows, place)

    monkeypatch.setattr(RowPacker, "packed", noted)
    for where in ("cpu", "cuda"):
        output = tmp_path / where
        train(tiny.config(output, device=where, max_steps=3, eval_every=3, **options))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        found.append([line.get("reward", line["loss"]) for line in lines if "loss" in line])
    assert set(places) == {"cpu", device.type}, "what is computed on one alone would prove nothing"
    # A sampled answer may be another one where two tokens are nearly as probable.
    assert found[1] == pytest.approx(found[0], rel=1e-3) or (kind == "dropout" and len(found[1]) == len(found[0]))


def test_a_stopped_run_goes_on_to_the_same_bits(tiny: TinyRun, tmp_path: Path) -> None:
    straight, stopped = (
        tiny.config(tmp_path / name, device="cuda", max_steps=4, eval_every=4, save_every=2)
        for name in ("straight", "stopped")
    )
    train(straight)
    with pytest.raises(StopAfter.Stopped):
        train(stopped, callbacks=[StopAfter(3)])
    train(with_options(TrainConfig(), output=tmp_path / "stopped", resume=True, quiet=True))
    ours, theirs = (final_bits(config.run.output)["adapter_model.safetensors"] for config in (stopped, straight))
    assert ours == theirs
