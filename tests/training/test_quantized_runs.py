"""Whole runs on a base that stays in its file's blocks: the same adapter, bit for bit, as on a dense one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.data.options import DataOptions
from backhand.distributed.communicator import Communicator
from backhand.engines.machine import resolve_machine
from backhand.engines.memory import plan as bases
from backhand.engines.memory.plan import HeldBase, MemoryPlan, choose_base, preferred_bases
from backhand.engines.memory.shapes import StepShape
from backhand.errors import CheckError, ResourceError, UsageError
from backhand.generation import held_base
from backhand.generation.held_base import stays_quantized
from backhand.kernels.builds import library, torch_form
from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.loop.evaluate import evaluate
from backhand.loop.guards import BaseGuard
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.loading.quantizing import QuantizingSource
from backhand.nn.model_options import BaseModelOptions
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions, PlanOptions, PlanRunOptions
from backhand.options.config import ModelOptions, TrainConfig
from backhand.runs.directory import Proof
from backhand.training.loaded_run import load_run
from backhand.training.plan_command import plan
from backhand.training.run import train
from backhand.verify.command import verify
from backhand.verify.options import VerifiedModelOptions, VerifyOptions, VerifyRunOptions
from backhand.verify.report import MODEL
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun, with_options

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    directory = tmp_path_factory.mktemp("quantized")
    run = TinyRun(directory)
    kinds = iter([StorageType.Q8_0, StorageType.Q4_0, StorageType.Q5_1] * 30)
    run.model = write_tiny_gguf(
        tiny_model("llama", num_hidden_layers=2, **_SIZES), directory / "tiny.gguf", storage=lambda _: next(kinds)
    )
    return run


def _adapter(config: TrainConfig) -> bytes:
    return (config.run.output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_adapter_is_the_same_to_the_bit(tiny: TinyRun, tmp_path: Path) -> None:
    adapters = []
    for base in ("dense", "quantized"):
        config = tiny.config(tmp_path / base, base=base, dropout=0.1)
        assert train(config).base == base
        adapters.append(_adapter(config))
        assert json.loads((config.run.output / "summary.json").read_text())["base"] == base
        proofs = (config.run.output / "proofs.jsonl").read_text()
        assert "the frozen base has not moved by one bit" in proofs
    assert adapters[0] == adapters[1]


def test_a_quantized_run_goes_on_to_the_same_bits(tiny: TinyRun, tmp_path: Path) -> None:
    whole = tiny.config(tmp_path / "whole", base="quantized")
    train(whole)
    part = tiny.config(tmp_path / "part", base="quantized", prove_resume=2)
    train(part)
    assert _adapter(part) == _adapter(whole)


def _looked_at(config: TrainConfig) -> PlanOptions:
    return PlanOptions(**vars(config), plan=PlanRunOptions(calibrate=False))


def test_the_plan_tells_both(tiny: TinyRun, tmp_path: Path) -> None:
    found = plan(_looked_at(tiny.config(tmp_path / "run"))).to_json()
    assert found["base"] in found["bases"] and set(found["bases"]) == {"dense", "quantized"}
    config = tiny.config(tmp_path / "run", base="quantized")
    quantized = plan(_looked_at(config)).to_json()
    assert quantized["base"] == "quantized"
    assert quantized["parts"]["base weights"] < found["bases"]["dense"]["peak_bytes"]


def test_a_mapped_base_is_there_once_for_all_processes(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", base="quantized", memory="15 GB")
    alone, three = (plan(_looked_at(with_options(config, workers=workers))).to_json() for workers in (1, 3))
    mapped = alone["parts"]["base weights"]
    assert 0 < mapped <= tiny.model.stat().st_size
    assert three["budget_bytes"] == (alone["budget_bytes"] + 2 * mapped) // 3


class Following(Communicator):
    """The second of several processes, whose first one says how the step is cut and the base is held."""

    is_main_process = False

    def broadcast(self, value: bytes) -> bytes:
        assert json.loads(value) is None
        return json.dumps([2, "mlp", "quantized"]).encode()


def test_a_process_holds_the_base_as_the_first_one_does(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "ENOUGH_TOKENS", 1 << 20)
    config = tiny.config(tmp_path / "run")
    assert load_run(config, resolve_machine(config)).plan.memory.base == "dense", "by its own rule"
    job = load_run(config, resolve_machine(config), processes=Following())
    found = job.plan.memory
    assert (found.micro_batch_rows, found.recompute, found.base) == (2, "mlp", "quantized")
    assert job.config.model.base == "quantized"


def _shapes(tokens: int) -> dict[int, StepShape]:
    return {1: StepShape(tokens=tokens, supervised_tokens=tokens, mean_tokens=tokens)}


@pytest.mark.skipif(library() is None, reason="the compiled library is not built")
def test_blocks_are_kept_where_unpacking_them_costs_little(tiny: TinyRun) -> None:
    source, cpu = open_model(tiny.model), torch.device("cpu")
    blocks, dense = ["quantized", "dense"], ["dense", "quantized"]
    assert preferred_bases("auto", source, cpu, _shapes(256)) == blocks
    assert preferred_bases("auto", source, cpu, _shapes(255)) == dense
    assert preferred_bases("auto", source, torch.device("meta"), _shapes(256)) == dense, "on a card"
    with torch_form():
        assert preferred_bases("auto", source, cpu, _shapes(256)) == dense, "unpacked slowly"
    assert preferred_bases("dense", source, cpu, _shapes(256)) == ["dense"]


@pytest.mark.parametrize(
    ("requested", "others", "fitting", "planned"),
    [
        (("dense", "quantized"), (), ("dense", "quantized"), [("dense", True)]),
        (("dense", "quantized"), (), ("quantized",), [("dense", True), ("quantized", True)]),
        (("quantized",), (), ("dense", "quantized"), [("quantized", True)]),
        (
            ("quantized",),
            ("dense", "quantized"),
            ("quantized",),
            [("quantized", True), ("dense", True), ("dense", False)],
        ),
    ],
)
def test_a_run_plans_no_base_that_decides_nothing(
    requested: tuple[HeldBase, ...],
    others: tuple[HeldBase, ...],
    fitting: tuple[HeldBase, ...],
    planned: list[tuple[HeldBase, bool]],
) -> None:
    """Planning measures passes: of a base that is not taken they cost time, and kernels that stay in the process."""
    found: list[tuple[HeldBase, bool]] = []

    def plan(base: HeldBase, limited: bool) -> MemoryPlan:
        found.append((base, limited))
        if limited and base not in fitting:
            raise ResourceError("too much")
        return MemoryPlan(1, "none", StepShape(16, 8), base=base)

    choice = choose_base(requested, plan, others)
    assert found == planned
    assert choice.chosen.base == next(base for base in requested if base in fitting)
    assert choice.fitting <= {*fitting} and set(choice.plans) == {
        base for base, _ in planned if others or base in fitting
    }


def test_the_quantized_base_says_what_would_fit() -> None:
    def plan(base: HeldBase, _limited: bool) -> MemoryPlan:
        raise ResourceError(f"{base} takes too much")

    for order in (("dense", "quantized"), ("quantized", "dense")):
        with pytest.raises(ResourceError, match="quantized takes too much"):
            choose_base(order, plan)


def test_what_answers_is_dense_where_that_fits(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    source, device = open_model(tiny.model), torch.device("cpu")
    options = BaseModelOptions(model=str(tiny.model))
    for free, expected in ((10**12, False), (1000, True)):
        monkeypatch.setattr(held_base, "available_bytes", lambda free=free: free)
        assert stays_quantized(options, source, torch.float32, device) is expected
        for base in ("dense", "quantized"):
            assert stays_quantized(replace(options, base=base), source, torch.float32, device) is (base == "quantized")


@pytest.mark.skipif(library() is None, reason="the compiled library is not built")
def test_a_prompt_at_a_time_is_answered_from_the_blocks() -> None:
    source = open_model("smollm2-135m")
    options = BaseModelOptions(model="smollm2-135m")
    kept = {
        (dtype, one): stays_quantized(options, source, dtype, torch.device("cpu"), one_at_a_time=one)
        for dtype in (torch.float32, torch.bfloat16)
        for one in (False, True)
    }
    assert kept == {key: key[1] for key in kept}
    with torch_form():
        assert not stays_quantized(options, source, torch.float32, torch.device("cpu"), one_at_a_time=True)


def test_a_directory_is_quantized_on_reading(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    run.model = save_tiny(tiny_model("llama", num_hidden_layers=2, **_SIZES), tmp_path / "other")
    config = run.config(tmp_path / "run", quantize="q8_0")
    assert train(config).base == "quantized"
    source = open_model(run.model, quantize="q8_0")
    assert isinstance(source, QuantizingSource) and source.quantized
    name = "model.layers.1.mlp.down_proj.weight"
    stored, read = source.load(name), source.source.load(name)
    assert 0 < float((stored - read).norm() / read.norm()) < 0.02
    assert source.stored_bytes(name) == sum(part.blocks.nbytes for part in source.stored_parts(name))


def test_the_loss_of_the_quantized_base_is_reported(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    run.model = save_tiny(tiny_model("llama", num_hidden_layers=2, **_SIZES), tmp_path / "other")
    reported = []
    for kind in ("q8_0", "q4_0"):
        config = run.config(tmp_path / kind, quantize=kind)
        (note,) = [note for note in load_run(config, resolve_machine(config)).notes if "on reading" in note]
        after, before, change = map(float, re.findall(r"[-+]?\d+\.\d{4}", note))
        reported.append((before, abs(change)))
        assert change == pytest.approx(after - before, abs=1.1e-4)
    assert reported[0][0] == reported[1][0] and 0 < reported[0][1] < reported[1][1]


def test_contradictions_are_reported(tiny: TinyRun) -> None:
    with pytest.raises(UsageError, match="quantize"):
        ModelOptions(quantize="q4_0", base="dense").validate()
    with pytest.raises(UsageError, match="backhand engine"):
        ModelOptions(base="quantized", engine="transformers").validate()
    with pytest.raises(UsageError, match="GGUF file"):
        open_model(tiny.model, quantize="q4_0")


def test_evaluation_and_answers_are_the_same(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", base="quantized")
    train(config)
    found = []
    for base in ("dense", "quantized"):
        model = replace(config.model, base=base)
        run = EvaluateRunOptions(adapter=str(config.run.output / "adapter"), max_new_tokens=4)
        found.append(evaluate(EvaluateOptions(model, config.data, run)))
    assert found[0] == found[1] and found[0].adapted is not None
    assert found[0].adapted.loss < found[0].base.loss


def test_the_gradients_of_a_quantized_model_are_proved(tiny: TinyRun) -> None:
    model = VerifiedModelOptions(model=str(tiny.model), dtype="float32", device="cpu", base="quantized")
    report = verify(VerifyOptions(VerifyRunOptions(max_tokens=40), model, DataOptions(data=(str(tiny.rows),))))
    assert report.of(MODEL) and not report.failed(MODEL)


def test_a_block_that_moves_is_noticed(tiny: TinyRun) -> None:
    model = Decoder.from_source(open_model(tiny.model), dtype=torch.float32, quantized=True)
    found: list[Proof] = []
    guard = BaseGuard(model, found.append)
    guard.check()
    stored = dict(model.frozen_tensors())["model.layers.1.mlp.down_proj.weight"]
    assert isinstance(stored, QuantizedMatrix)
    stored.parts[0].blocks[3, 5] ^= 1
    with pytest.raises(CheckError, match="1 frozen base weights have changed"):
        guard.check()
    stored.parts[0].blocks[3, 5] ^= 1
    guard.check()


def test_a_block_that_is_no_number_is_noticed(tiny: TinyRun) -> None:
    model = Decoder.from_source(open_model(tiny.model), dtype=torch.float32, quantized=True)
    stored = dict(model.frozen_tensors())["model.layers.1.mlp.down_proj.weight"]
    assert isinstance(stored, QuantizedMatrix)
    stored.parts[0].blocks[3, :2] = 0xFF  # the scale of the row's first block
    with pytest.raises(CheckError, match="NaN or infinity"):
        BaseGuard(model, lambda _: None)
