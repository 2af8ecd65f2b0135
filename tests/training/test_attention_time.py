"""The predicted time of attention grows with the pairs of queries and keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.cli.main import main
from backhand.engines.decoder_engine import DecoderEngine
from backhand.nn.loading import open_model
from backhand.training.attention_time import Attention
from backhand.training.calibration import Seconds
from tests.support.tiny_run import TinyRun, write_rows


@pytest.fixture
def attention(tiny: TinyRun) -> Attention:
    engine = DecoderEngine(open_model(str(tiny.model)), torch.float32)
    return Attention(engine, engine.layout(LoRAConfig(rank=2)))


@pytest.mark.parametrize("window", [None, 3, 50])
def test_pairs_are_those_of_a_mask(attention: Attention, window: int | None) -> None:
    """Two documents share their first segment of four tokens; the third document is alone."""
    config = attention.engine.config
    attention.engine.config = replace(config, layers=tuple(replace(one, window=window) for one in config.layers))
    documents, shared = (4 + 5, 4 + 2, 7), 4
    visible = 0
    for number, length in enumerate(documents):
        query, key = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
        mask = (key <= query) & (query - key < (window or length))
        visible += int(mask[shared if number == 1 else 0 :].sum())  # the shared queries count once
    expected = visible * len(config.layers)
    assert attention.pairs((4, 5, 2, 7), (-1, 0, 0, -1)) == pytest.approx(expected)


def test_both_directions_have_twice_the_pairs(attention: Attention) -> None:
    causal = attention.pairs((6, 3), ())
    attention.engine.config = replace(attention.engine.config, causal=False)
    assert attention.pairs((6, 3), ()) == 2 * causal


def test_one_long_row_takes_longer_than_short_ones_of_as_many_tokens(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backhand.training.calibration._measure", lambda *_: Seconds(1e-3, 0.0, 0.0, 0.0, pair=1e-2))

    def planned(*words: str) -> Any:
        model = ("--model", str(tiny.model), "--dtype", "float32", "--threads", "1", "--json")
        assert main(["plan", *model, *words]) == 0
        return json.loads(capsys.readouterr().out)

    rates = []
    for length in (10, 20):
        rows = write_rows(tmp_path / f"{length}.jsonl", 8, seed=0, words=(length, length + 1), completion=3)
        rates.append(planned("--data", str(rows), "--batch-rows", "1")["tokens_per_s"])
    seconds = [1 / rate - 1e-3 for rate in rates]  # of attention, per token
    assert seconds[1] / seconds[0] == pytest.approx(2.0, rel=0.25)
