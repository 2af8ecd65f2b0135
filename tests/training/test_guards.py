"""Each guard fires on a run that is broken on purpose, and on no healthy one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backhand.errors import CheckError
from backhand.generation.completer import complete_greedily
from backhand.loop.forgetting import ForgettingMeter
from backhand.loop.guards import is_finite, smoothed
from backhand.loop.observers import Observer
from backhand.loop.state import STATE_FILE
from backhand.loop.step import AdapterOptimizer
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.options.config import TrainConfig
from backhand.runs.checkpoint import load_checkpoint
from backhand.training.run import train
from tests.support.fault_table import documented
from tests.support.held_runs import in_a_step
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun, with_options


class Notes(Observer):
    """The notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, text: str) -> None:
        self.notes.append(text)


def after_updates(patch: pytest.MonkeyPatch, change: Callable[[AdapterOptimizer, int], None]) -> None:
    """Let `change` do as it likes after each optimizer update that moves anything, counted from 1."""
    original, count = AdapterOptimizer.step, 0

    def step(self: AdapterOptimizer, rate: float) -> None:
        nonlocal count
        original(self, rate)
        if rate > 0:  # the first call of all, with a rate of zero, wakes the optimizer before the heap is measured
            count += 1
            change(self, count)

    patch.setattr(AdapterOptimizer, "step", step)


def before_steps(patch: pytest.MonkeyPatch, change: Callable[[Decoder, int, Tensor], Tensor | None]) -> None:
    """Let `change` see the model and the loss of each step, counted from 1, and give another loss."""
    original, count = Decoder.loss_and_gradients, 0

    def loss_and_gradients(self: Decoder, *arguments: Any, **options: Any) -> Tensor:
        nonlocal count
        nats = original(self, *arguments, **options)
        if not in_a_step():
            return nats
        count += 1
        changed = change(self, count, nats)
        return nats if changed is None else changed

    patch.setattr(Decoder, "loss_and_gradients", loss_and_gradients)


def keep_lora_B_at_zero(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    def zero(optimizer: AdapterOptimizer, _: int) -> None:
        for name in optimizer.lora.slots:
            optimizer.lora.lora_B(name).zero_()

    after_updates(patch, zero)
    return config


def hold(prefix: str) -> Callable[[pytest.MonkeyPatch, TrainConfig], TrainConfig]:
    """Put the factors of this name back after every update."""

    def hold_them(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
        held: dict[str, Tensor] = {}
        original = AdapterOptimizer.__init__

        def init(self: AdapterOptimizer, lora: Any, *options: Any) -> None:
            original(self, lora, *options)
            held.update({name: tensor.clone() for name, tensor in lora.named_tensors() if name.startswith(prefix)})

        def put_back(optimizer: AdapterOptimizer, _: int) -> None:
            for name, tensor in optimizer.lora.named_tensors():
                if name in held:
                    tensor.copy_(held[name])

        patch.setattr(AdapterOptimizer, "__init__", init)
        after_updates(patch, put_back)
        return config

    return hold_them


def leave_out_of_the_optimizer(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    original = AdapterOptimizer.__init__

    def init(self: AdapterOptimizer, lora: Any, *options: Any) -> None:
        original(self, lora, *options)
        last = list(lora.slots)[-1]
        left_out = lora.lora_A(last).numel() + lora.lora_B(last).numel()
        self.values, self.gradients = lora.values[:-left_out], lora.gradients[:-left_out]

    patch.setattr(AdapterOptimizer, "__init__", init)
    return config


def copy_in_the_optimizer(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    original = AdapterOptimizer.__init__

    def init(self: AdapterOptimizer, lora: Any, *options: Any) -> None:
        original(self, lora, *options)
        self.values = lora.values.clone()

    patch.setattr(AdapterOptimizer, "__init__", init)
    return config


def nan_in_the_file(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    model = tiny_model("llama-tied", num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] = float("nan")
    path = save_tiny(model, config.run.output.parent / "model")
    return with_options(config, model=str(path))


def nan_in_the_base_during_the_run(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    def damage(model: Decoder, step: int, _: Tensor) -> None:
        if step == 3:
            dict(model.frozen_tensors())["model.layers.1.self_attn.o_proj.weight"].view(-1)[7] = float("nan")

    before_steps(patch, damage)
    return config


def nan_in_the_adapter(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    def damage(optimizer: AdapterOptimizer, update: int) -> None:
        if update == 4:
            optimizer.lora.lora_A("model.layers.0.self_attn.k_proj")[1, 2] = float("nan")

    after_updates(patch, damage)
    return with_options(config, save_every=100, eval_data=())


def nan_in_the_adapter_by_the_last_step(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    def damage(optimizer: AdapterOptimizer, update: int) -> None:
        if update == 6:
            optimizer.lora.lora_A("model.layers.0.self_attn.k_proj")[1, 2] = float("inf")

    after_updates(patch, damage)
    return with_options(config, eval_data=())


def base_modified(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    def nudge(model: Decoder, step: int, _: Tensor) -> None:
        if step == 5:
            dict(model.frozen_tensors())["model.layers.1.mlp.down_proj.weight"].view(-1)[7] += 1e-3

    before_steps(patch, nudge)
    return config


def first_tensor_modified_early(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    def nudge(model: Decoder, step: int, _: Tensor) -> None:
        next(tensor for _, tensor in model.frozen_tensors()).view(-1)[7] += 1e-3

    before_steps(patch, nudge)
    return with_options(config, eval_data=(), max_steps=500)


def loss_not_finite(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    before_steps(patch, lambda _model, step, nats: nats * float("nan") if step >= 4 else None)
    return with_options(config, max_bad_steps=3, max_steps=20)


def gradient_not_finite(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    def damage(model: Decoder, step: int, _: Tensor) -> None:
        if step >= 4:
            assert model.lora is not None
            model.lora.gradients[11] = float("inf")

    before_steps(patch, damage)
    return with_options(config, max_bad_steps=3, max_steps=20)


def forgets(patch: pytest.MonkeyPatch, config: TrainConfig) -> TrainConfig:
    # A random base has little to forget but its own greedy words: these are its neutral text here.
    decoder = Decoder.from_source(open_model(config.model.model), dtype=torch.float32)
    started = [5, 9]
    words = complete_greedily(decoder, [started], max_new_tokens=40, stop_ids=())[0]
    document = torch.tensor(started + words)
    patch.setattr(ForgettingMeter, "for_tokenizer", classmethod(lambda meter, _tokenizer: meter([document])))
    after_updates(patch, lambda optimizer, _: optimizer.lora.values.mul_(5.0))
    return with_options(config, eval_every=1, max_forgetting=0.5)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch, TrainConfig], TrainConfig], str]] = {
    "lora_B kept at zero": (keep_lora_B_at_zero, r"had no gradient in 3 steps(.|\n)*lora_B is kept at zero"),
    "one module held fixed": (
        hold("model.layers.1.self_attn.v_proj"),
        r"layers\.1\.self_attn\.v_proj: 1 of \d+ adapter factors have had no gradient in 3 steps",
    ),
    "one lora_A held fixed": (
        hold("model.layers.1.self_attn.v_proj.lora_A"),
        r"layers\.1\.self_attn\.v_proj: 1 of \d+ adapter factors have a gradient but have not moved in 3 steps",
    ),
    "an adapter left out of the optimizer": (leave_out_of_the_optimizer, r"the optimizer's .* elements are not"),
    "a copy in the optimizer": (copy_in_the_optimizer, r"the optimizer's .* elements are not"),
    "NaN in the base's file": (
        nan_in_the_file,
        r"layers\.1\.self_attn\.q_proj\.weight: 1 of \d+ base weights hold NaN",
    ),
    "NaN in the base during the run": (
        nan_in_the_base_during_the_run,
        r"2 steps in a row(.|\n)*NaN or infinity in base weight model\.layers\.1\.self_attn\.o_proj\.weight",
    ),
    "NaN in the adapter": (
        nan_in_the_adapter,
        r"2 steps in a row(.|\n)*NaN or infinity in model\.layers\.0\.self_attn\.k_proj\.lora_A",
    ),
    "infinity in the adapter by the last step": (
        nan_in_the_adapter_by_the_last_step,
        r"k_proj\.lora_A: 1 adapter factors hold NaN or infinity after step 6",
    ),
    "the base modified": (base_modified, r"down_proj\.weight: 1 frozen base weights have changed"),
    "the base modified early, nothing held out": (first_tensor_modified_early, r"frozen base weights have changed"),
    "a loss that is not finite": (loss_not_finite, r"3 steps in a row .*; stopped after step 6"),
    "a gradient that is not finite": (gradient_not_finite, r"3 steps in a row .*; stopped after step 6"),
    "forgetting beyond the limit": (forgets, r"risen by .* nats per token, above the limit of 0\.5"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_run_ends_with_exit_code_6(
    kind: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it, message = BROKEN[kind]
    config = break_it(monkeypatch, tiny.config(tmp_path / "run", max_steps=6, save_every=2, max_bad_steps=2))
    with pytest.raises(CheckError, match=message) as caught:
        train(config)
    assert caught.value.exit_code == 6
    check_what_is_left(tmp_path / "run")


def check_what_is_left(run: Path) -> None:
    """Every checkpoint and the adapter are whole, and hold finite numbers only."""
    from safetensors.torch import load

    for checkpoint in (run / "checkpoints").glob("step-*"):
        contents = load_checkpoint(checkpoint, int(checkpoint.name.removeprefix("step-"))).contents
        assert all(is_finite(tensor) for tensor in load(contents[STATE_FILE]).values())
    for file in (run / "adapter").glob("*.safetensors"):
        assert all(is_finite(tensor) for tensor in load(file.read_bytes()).values())


def test_the_page_counts_the_broken_runs() -> None:
    assert documented("a run that does not learn, learns NaN, moves its base or forgets") == len(BROKEN)


def test_bad_steps_leave_the_last_good_adapter(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good: list[Tensor] = []
    after_updates(monkeypatch, lambda optimizer, _: good.append(optimizer.lora.values.clone()))
    config = loss_not_finite(monkeypatch, tiny.config(tmp_path / "run"))
    with pytest.raises(CheckError):
        train(with_options(config, eval_data=()))
    # The memory plan's warm-up updates a small optimizer of its own before the run's.
    good = [values for values in good if values.shape == good[-1].shape]
    assert len(good) == 3
    from safetensors.torch import load

    run = tmp_path / "run"
    checkpoint = load_checkpoint(run / "checkpoints" / "step-6", 6)
    assert torch.equal(load(checkpoint.contents[STATE_FILE])["values"], good[-1])
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter == checkpoint.contents["adapter_model.safetensors"]


def test_one_bad_step_is_skipped_counted_and_not_judged(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_steps(monkeypatch, lambda _model, step, nats: nats * float("nan") if step in (1, 2) else None)
    notes = Notes()
    summary = train(tiny.config(tmp_path / "run", max_steps=6), callbacks=[notes])
    assert (summary.steps, summary.skipped_steps) == (6, 2)
    proofs = [json.loads(line) for line in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()]
    assert any(proof["proof"] == "every adapter factor has moved" and proof["passed"] for proof in proofs)


def test_a_spike_of_the_loss_is_a_warning(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_steps(monkeypatch, lambda _model, step, nats: nats * 10 if step == 5 else None)
    terminal: list[str] = []
    monkeypatch.setattr("backhand.training.console.TerminalObserver.noted", lambda _self, text: terminal.append(text))
    assert train(tiny.config(tmp_path / "run", max_steps=6)).steps == 6
    assert len(terminal) == 1 and terminal[0].startswith("step 5: the loss jumped to ")


def test_a_spike_from_a_loss_of_zero() -> None:
    smooth, warning = smoothed(2.0, 0.0)
    assert smooth == pytest.approx(0.2) and warning is not None


def test_modules_whose_gradient_is_zero_by_nature_are_named(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("user", "answer", "list", "name")))
    terminal: list[str] = []
    monkeypatch.setattr("backhand.training.console.TerminalObserver.noted", lambda _self, text: terminal.append(text))
    options = {"data": (str(rows),), "eval_data": (), "max_length": 2, "max_steps": 4}
    assert train(tiny.config(tmp_path / "run", **options)).steps == 4
    (note,) = [text for text in terminal if "no gradient so far" in text]
    assert "q_proj" in note and "k_proj" in note and "v_proj" not in note


HEALTHY: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"rank": 1},
    "rank above a module's size": {"rank": 32},
    "rank-stabilised": {"use_rslora": True},
    "one target": {"target_modules": ("q_proj",)},
    "keys only": {"target_modules": ("k_proj",)},
    "a pattern of ranks": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 1.0}},
    "dropout": {"dropout": 0.5},
    "weight decay": {"weight_decay": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "cosine": {"schedule": "cosine", "warmup_steps": 3},
    "a small rate": {"learning_rate": 1e-6},
    "a large rate": {"learning_rate": 0.05, "schedule": "constant"},
    "one row a step": {"batch_rows": 1},
    "accumulation": {"batch_rows": 6, "micro_batch_rows": 2},
    "one step": {"max_steps": 1},
    "bfloat16": {"dtype": "bfloat16"},
    "recompute": {"recompute": "block"},
    "transformers": {"engine": "transformers"},
    "nothing held out": {"eval_data": ()},
    "all tokens supervised": {"train_on": "all"},
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_is_left_alone(kind: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal: list[str] = []
    monkeypatch.setattr("backhand.training.console.TerminalObserver.noted", lambda _self, text: terminal.append(text))
    options = {"max_steps": 4, "eval_every": 2, **HEALTHY[kind]}
    summary = train(tiny.config(tmp_path / "run", **options))
    assert summary.steps == options["max_steps"] and summary.skipped_steps == 0
    assert terminal == []
    proofs = [json.loads(line) for line in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()]
    assert len(proofs) == 5 and all(proof["passed"] for proof in proofs)


def test_the_page_counts_the_healthy_runs() -> None:
    assert documented("a healthy run, of different settings") == len(HEALTHY) >= 20
