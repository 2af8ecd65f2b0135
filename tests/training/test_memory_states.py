"""Whether hidden states are kept and where, and what `plan` says of them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.cli.main import main
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.engines.decoder_engine import DecoderEngine
from backhand.engines.engine import MoreBlocks, ShortModel
from backhand.engines.memory.hidden_states import FrozenLayers, cached_tokens, plan_hidden_states
from backhand.engines.memory.plan import MemoryPlan
from backhand.engines.memory.shapes import StepShape
from backhand.errors import ResourceError, UsageError
from backhand.kernels.builds import library, torch_form
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.options.config import ModelOptions
from backhand.training import calibration
from backhand.training.calibration import mean_block, whole
from tests.support.tiny_models import WINDOW, save_tiny, tiny_model
from tests.support.tiny_run import TinyRun

BELOW, STEP = FrozenLayers(20, 576, 1152), MemoryPlan(4, "none", StepShape(16, 8), {"process": 1 << 30})
NEEDED = 1152 << 20


def choice(
    asked: Any, *, below: FrozenLayers = BELOW, tokens: int = 1 << 20, budget: int | None = None, disk: int = 0
) -> Any:
    return plan_hidden_states(asked, below, tokens, STEP, budget_bytes=budget, disk_bytes=disk)


def test_auto_takes_memory_while_it_lasts_then_the_disk() -> None:
    assert choice("auto").where == "memory"
    enough = int(((1 << 30) + NEEDED) / 0.95) + 1
    assert (choice("auto", budget=enough).where, choice("auto", budget=enough).bytes) == ("memory", NEEDED)
    assert choice("auto", budget=enough - 2, disk=2 * NEEDED).where == "disk"
    off = choice("auto", budget=enough - 2, disk=2 * NEEDED - 1)
    assert (off.where, off.bytes) == ("off", 0) and "neither memory nor disk" in str(off.note)


def test_auto_keeps_nothing_where_there_is_nothing_to_keep() -> None:
    assert choice("auto", below=FrozenLayers()).note is None
    assert choice("auto", tokens=0).where == "off"
    dependent = choice("auto", below=FrozenLayers(20, 576, 1152, "its rows meet"))
    assert dependent.where == "off" and "its rows meet" in str(dependent.note)


def test_what_is_asked_for_and_cannot_be_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing to cache") as found:
        choice("memory", below=FrozenLayers())
    assert "--layers last:8" in str(found.value.next_step)
    with pytest.raises(UsageError, match="nothing to cache"):
        choice("disk", below=FrozenLayers(20, 576, 1152, "its rows meet"))
    with pytest.raises(ResourceError, match="may be used") as short:
        choice("memory", budget=1 << 30)
    assert "--cache-frozen disk" in str(short.value.next_step)
    with pytest.raises(ResourceError, match="are free"):
        choice("disk", disk=NEEDED - 1)
    with pytest.raises(UsageError, match="backhand engine only"):
        ModelOptions(engine="transformers", cache_frozen="memory").validate()
    assert choice("off", below=FrozenLayers()).where == "off"


@pytest.mark.parametrize(
    ("variant", "longest", "loops", "why"),
    [
        ("llama-tied", 99, True, None),
        ("llama-tied", 99, False, "without the compiled kernels"),
        ("gemma2", 5, True, "capped attention scores"),
        ("gemma3_text", WINDOW, True, None),
        ("gemma3_text", WINDOW + 1, True, f"longer than a window of {WINDOW} tokens"),
    ],
)
def test_where_the_engine_promises_states_of_a_rows_own(
    variant: str, longest: int, loops: bool, why: str | None, tmp_path: Path
) -> None:
    if loops and library() is None:
        pytest.skip("the compiled library is not built")
    source = open_model(str(save_tiny(tiny_model(variant, num_hidden_layers=4), tmp_path / "model")))
    engine = DecoderEngine(source, torch.bfloat16)
    layout = engine.layout(LoRAConfig(rank=2, layers="last:1"))
    with nullcontext() if loops else torch_form():
        below = engine.frozen_layers(layout, longest)
    assert (below.layer, below.width, below.token_bytes) == (3, 60, 120)
    assert below.batch_dependent is None if why is None else why in str(below.batch_dependent)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--layers", "last:2"), None),
        ((), "the lowest adapted layer is the first one"),
        (("--layers", "last:2", "--trainable-token-indices", "5"), "the lowest adapted layer is the first one"),
    ],
)
def test_plan_says_what_is_kept(
    words: tuple[str, ...], why: str | None, four: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["plan", "--model", str(four.model), "--dtype", "float32", "--threads", "1", "--data", str(four.rows)]
    base += ["--eval-data", str(four.held_out), "--no-calibrate", "--json", *words]
    assert main(base) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*base, "--cache-frozen", "memory"]) == (0 if why is None else 2)
    said = capsys.readouterr()
    if why is not None:
        assert found["kept_states"] == {"where": "off", "layer": 0, "bytes": 0}
        assert why in said.err
        return
    assert json.loads(said.out)["kept_states"] == found["kept_states"]
    assert found["kept_states"]["where"] == "memory" and found["kept_states"]["layer"] == 2
    assert found["kept_states"]["bytes"] == found["parts"]["hidden states of frozen layers"] > 0
    assert found["kept_states"]["bytes"] % (4 * 60) == 0, "float32, 60 wide"


def test_what_all_rows_begin_with_is_counted_once() -> None:
    ids = np.arange(60, dtype=np.int32)
    supervised = np.zeros(60, dtype=np.bool_)
    supervised[55:] = True
    rows = [Example(ids[:length], supervised[:length], "f:1") for length in (60, 57)]
    packer = RowPacker(rows, share_prefixes=True)
    # The shorter one is the beginning of the longer, its answer included.
    assert (packer.common_prefix, packer.lengths.tolist()) == (56, [59, 56])
    assert cached_tokens(packer) == 59
    assert cached_tokens(RowPacker(rows, share_prefixes=False)) == 59 + 56


def test_blocks_below_take_half_of_those_above() -> None:
    """Ten adapted blocks above twenty: each takes 0.5 s of a step."""
    model: Any = object()
    short = ShortModel(model, [MoreBlocks(model, 10, 9)], 20)
    assert whole(short, (1.0, 1.5)) == pytest.approx(1.0 + 9 * 0.5)
    assert mean_block(short, (1.0, 1.5)) == pytest.approx(0.5)
    assert whole(ShortModel(model), (1.0,)) == 1.0 and mean_block(ShortModel(model), (1.0,)) == 0.0


def test_speed_counts_what_is_spared(
    four: TinyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own: a block takes 2 ms of a token in a step, and so 1 ms of one in a forward pass."""
    now = [0.0]

    def takes(block_s: float) -> Any:
        def model(decoder: Decoder, batch: PackedBatch, *_: object) -> None:
            now[0] += len(batch.input_ids) * (0.002 + block_s * len(decoder.config.layers))

        return model

    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(calibration.calibrate, "__kwdefaults__", {"budget_s": 100.0})
    monkeypatch.setattr(Decoder, "loss_and_gradients", takes(0.002))
    base = ["plan", "--model", str(four.model), "--dtype", "float32", "--threads", "1", "--data", str(four.rows)]
    found = {}
    for words in ("auto", "off"):
        assert main([*base, "--layers", "last:2", "--json", "--cache-frozen", words]) == 0
        found[words] = json.loads(capsys.readouterr().out)
    assert found["off"]["kept_s"] == 0
    assert found["off"]["train_s"] - found["auto"]["train_s"] == pytest.approx(found["auto"]["kept_s"], rel=1e-9)
    # Two more epochs of 267 tokens through two blocks; fillers are measured with them.
    assert found["auto"]["kept_s"] == pytest.approx(2 * 267 * 2 * 0.001, rel=0.05)
