from __future__ import annotations

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.lab.paper import merging as paper_merging
from backhand.lab.paper.merging import Ratio, measure_merging
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.saved_adapters import resolve_slots
from tests.support.tiny_run import TinyRun


def decoder(tiny: TinyRun) -> Decoder:
    return Decoder.from_source(open_model(tiny.model), dtype=torch.float32)


def random_adapter(model: Decoder, targets: tuple[str, ...]) -> LoRAParameters:
    config = LoRAConfig(rank=3, alpha=5.0, target_modules=targets)
    lora = LoRAParameters(resolve_slots(config, model.module_shapes()))
    lora.values.copy_(torch.randn(lora.element_count, generator=torch.Generator().manual_seed(0)) / 4)
    return lora


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_measurement_has_every_size_and_sees_the_adapter(tiny: TinyRun) -> None:
    base, merged = decoder(tiny), decoder(tiny)
    result = measure_merging(base, merged, random_adapter(base, ALL), sizes=((1, 1), (3, 8)), rounds=4)
    assert [(times.documents, times.tokens) for times in result.times] == [(1, 1), (3, 8)]
    assert result.difference < 1e-5
    assert base.lora is None
    for times in result.times:
        for ratio in (times.adapter, times.merged):
            assert 0 < ratio.lower <= ratio.median <= ratio.upper
        assert times.base_s > 0


def test_each_round_times_the_base_the_adapter_on_it_and_the_merged_weights(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merged = decoder(tiny), decoder(tiny)
    lora = random_adapter(base, ALL)
    timed = []

    def watching(model: Decoder, batch: PackedBatch) -> float:
        assert batch.lengths == (5, 5)
        timed.append((model is merged, model.lora))
        return float(len(timed))

    monkeypatch.setattr(paper_merging, "_timed", watching)
    result = measure_merging(base, merged, lora, sizes=((2, 5),), rounds=3)
    rounds = 3 + paper_merging.WARM_UP_ROUNDS
    assert timed == [(False, None), (False, lora), (True, None)] * rounds
    first = 3 * paper_merging.WARM_UP_ROUNDS + 1  # what the first round took that counts: the calls are numbered
    (times,) = result.times
    assert times.base_s == first + 3
    assert times.adapter.median == (first + 4) / (first + 3) and times.merged.median == (first + 5) / (first + 3)


def test_ratio_is_taken_round_by_round() -> None:
    ratio = Ratio.of([2.0, 40.0, 6.0], [1.0, 20.0, 2.0])
    assert ratio.median == 2.0 and ratio.lower == 2.0 and ratio.upper == 3.0
