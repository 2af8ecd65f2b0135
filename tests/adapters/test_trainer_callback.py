"""AdapterCallback in Hugging Face's Trainer: stopped, resumed, several adapters, and saving where that is not easy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import InjectedAdapter, inject, inject_from
from backhand.adapters.trainer_callback import AdapterCallback
from backhand.errors import ArtifactError, BackhandError, ResourceError, UsageError
from tests.adapters.test_inject_trainer import classifier, losses, rows, trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CONFIGS: dict[str, LoRAConfig] = {
    "plain": LoRAConfig(rank=4, alpha=8),
    "ranks by module": LoRAConfig(rank=4, rank_pattern={"query": 2, "value": 7}, alpha_pattern={"query": 3.0}),
    "rank-stabilised": LoRAConfig(rank=4, use_rslora=True),
    "DoRA": LoRAConfig(rank=4, use_dora=True),
    "with dropout": LoRAConfig(rank=4, dropout=0.2),
    "with biases": LoRAConfig(rank=4, lora_bias=True),
    "a module in full": LoRAConfig(rank=4, target_modules=("query",), modules_to_save=("classifier",)),
    "rows of tokens": LoRAConfig(rank=4, target_modules=("query",), trainable_token_indices=(4, 9)),
}


class At(transformers.TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act(control)


def stop(control: Any) -> None:
    control.should_training_stop = True


def stop_and_save(control: Any) -> None:
    control.should_training_stop = control.should_save = True


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


def fail(_: Any) -> None:
    raise RuntimeError("the loss is not what it should be")


def run(
    directory: Path,
    config: LoRAConfig = CONFIGS["plain"],
    *,
    resume: bool | str = False,
    at: At | None = None,
    **arguments: Any,
) -> tuple[InjectedAdapter, list[float]]:
    model = classifier()
    adapter = inject(model, config)
    given = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, **arguments}
    callbacks = [AdapterCallback(adapter, base_model="any/bert"), *([at] if at else [])]
    done = trainer(model, directory, callbacks, **given)
    done.train(resume_from_checkpoint=resume)
    return adapter, losses(done)


def same(one: InjectedAdapter, other: InjectedAdapter) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def loaded(directory: Path) -> InjectedAdapter:
    return inject_from(classifier(), directory)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_adapter_resumes_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    whole, straight = run(tmp_path / "whole", CONFIGS[kind])
    run(tmp_path / "parts", CONFIGS[kind])
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    resumed, later = run(tmp_path / "parts", CONFIGS[kind], resume=True)
    assert later[-4:] == straight[-4:] and same(whole, resumed)
    for place in (tmp_path / "parts" / "checkpoint-8", tmp_path / "parts" / "adapter"):
        assert same(loaded(place), resumed)


@pytest.mark.parametrize("act", [stop, stop_and_save])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_run_that_is_stopped_leaves_its_adapter(act: Any, step: int, tmp_path: Path) -> None:
    adapter, _ = run(tmp_path, at=At(step, act))
    assert same(loaded(tmp_path / "adapter"), adapter)
    assert (f"checkpoint-{step}" in {path.name for path in tmp_path.iterdir()}) == (act is stop_and_save or step == 4)
    assert f"| {step} |" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(("act", "error"), [(interrupt, KeyboardInterrupt), (fail, RuntimeError)])
def test_a_run_that_breaks_off_goes_on_from_its_checkpoint(act: Any, error: type, tmp_path: Path) -> None:
    whole, straight = run(tmp_path / "whole")
    with pytest.raises(error):
        run(tmp_path / "parts", at=At(6, act))
    assert not (tmp_path / "parts" / "adapter").exists()
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"checkpoint-4"}
    resumed, later = run(tmp_path / "parts", resume=True)
    assert same(whole, resumed) and later[-4:] == straight[-4:]


def test_a_run_that_is_stopped_and_resumed_at_every_step_is_one_run(tmp_path: Path) -> None:
    whole, straight = run(tmp_path / "whole", max_steps=5, save_steps=1)
    for step in range(1, 6):
        resumed, later = run(tmp_path / "parts", resume=step > 1, at=At(step, stop), max_steps=5, save_steps=1)
    assert same(whole, resumed) and later == straight


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    resumed, _ = run(tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("arguments", "checkpoints"),
    [
        ({"save_total_limit": 1}, {"checkpoint-8"}),
        ({"save_strategy": "epoch"}, {"checkpoint-4", "checkpoint-8"}),
        ({"save_strategy": "no"}, set()),
        ({"save_only_model": True}, {"checkpoint-4", "checkpoint-8"}),
        ({"save_steps": 3}, {"checkpoint-3", "checkpoint-6", "checkpoint-8"}),
        ({"gradient_accumulation_steps": 2}, {"checkpoint-4", "checkpoint-8"}),
    ],
)
def test_whatever_is_saved_holds_the_adapter(arguments: dict[str, Any], checkpoints: set[str], tmp_path: Path) -> None:
    adapter, _ = run(tmp_path, **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {*checkpoints, "adapter"}
    for name in checkpoints:
        saved = load_file(tmp_path / name / "model.safetensors")
        assert set(saved) == {name for name, _ in adapter.named_parameters()}
        loaded(tmp_path / name)
    assert same(loaded(tmp_path / "adapter"), adapter)


def test_the_best_adapter_is_the_one_that_is_kept(tmp_path: Path) -> None:
    """Held-out rows have the opposite labels, so the first evaluation is the best one."""
    model = classifier()
    adapter = inject(model, CONFIGS["plain"])
    given = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    held_out = [{**row, "labels": 1 - row["labels"]} for row in rows(64)]
    done = trainer(model, tmp_path, [AdapterCallback(adapter)], held_out, **given, **best)
    done.train()
    assert done.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert same(loaded(tmp_path / "adapter"), loaded(tmp_path / "checkpoint-4"))
    assert "best metric" in (tmp_path / "adapter" / "README.md").read_text()


def test_adapters_of_two_models_in_one_process_keep_apart(tmp_path: Path) -> None:
    alone = {kind: run(tmp_path / "alone" / kind, CONFIGS[kind])[0] for kind in ("plain", "DoRA")}
    models = {kind: classifier() for kind in alone}
    adapters = {kind: inject(model, CONFIGS[kind]) for kind, model in models.items()}
    given = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    for kind, model in models.items():
        trainer(model, tmp_path / kind, [AdapterCallback(adapters[kind])], **given).train()
        assert same(adapters[kind], alone[kind]) and same(loaded(tmp_path / kind / "adapter"), alone[kind])


def test_a_model_takes_one_adapter_and_another_one_after_it(tmp_path: Path) -> None:
    model = classifier()
    first = inject(model, CONFIGS["plain"])
    with pytest.raises(UsageError) as raised:
        inject(model, CONFIGS["DoRA"])
    assert raised.value.exit_code == 2
    first.remove()
    second = inject(model, CONFIGS["a module in full"])
    trainer(model, tmp_path, [AdapterCallback(second)], save_strategy="steps", save_steps=2, max_steps=2).train()
    saved = set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert saved == {name for name, _ in second.named_parameters()}
    assert same(loaded(tmp_path / "adapter"), second)


def test_a_second_run_into_the_same_directory_replaces_the_adapter(tmp_path: Path) -> None:
    run(tmp_path, CONFIGS["DoRA"])
    adapter, _ = run(tmp_path, CONFIGS["plain"])
    assert same(loaded(tmp_path / "adapter"), adapter)
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_dora"]


def test_a_file_where_the_adapter_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("notes")
    with pytest.raises(BackhandError) as raised:
        run(tmp_path)
    assert isinstance(raised.value, UsageError | ResourceError) and "adapter" in str(raised.value)
    assert (tmp_path / "adapter").read_text() == "notes"
    assert loaded(tmp_path / "checkpoint-8").parameter_count


@pytest.mark.parametrize("damage", ["cut", "gone", "of another rank"])
def test_a_damaged_checkpoint_is_no_adapter(damage: str, tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "checkpoint-8" / "adapter_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "gone":
        file.unlink()
    else:
        run(tmp_path / "other", LoRAConfig(rank=3))
        shutil.copy(tmp_path / "other" / "checkpoint-8" / file.name, file)
    with pytest.raises(ArtifactError) as raised:
        loaded(tmp_path / "checkpoint-8")
    assert raised.value.exit_code == 4


def test_an_adapter_that_is_off_or_merged_meanwhile_is_saved_as_it_is(tmp_path: Path) -> None:
    def run_with(act: Callable[[InjectedAdapter], None], directory: Path) -> InjectedAdapter:
        model = classifier()
        adapter = inject(model, CONFIGS["plain"])
        at = At(4, lambda _: act(adapter))
        given = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
        trainer(model, directory, [at, AdapterCallback(adapter)], **given).train()
        return adapter

    plain = run_with(lambda _: None, tmp_path / "plain")
    merged = run_with(InjectedAdapter.merge, tmp_path / "merged")
    off = run_with(lambda adapter: adapter.enable(False), tmp_path / "off")
    assert merged.merged and not off.enabled
    for name, adapter in (("merged", merged), ("off", off)):
        assert same(adapter, plain)
        for place in ("checkpoint-4", "adapter"):
            assert same(loaded(tmp_path / name / place), plain)


class Plain(nn.Module):
    """No PreTrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


def test_a_plain_module_saves_the_adapter_and_itself(tmp_path: Path) -> None:
    model = Plain()
    adapter = inject(model, LoRAConfig(rank=4, target_modules=("query",)))
    callbacks = [AdapterCallback(adapter)]
    trainer(model, tmp_path, callbacks, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert set(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) > {
        name for name, _ in adapter.named_parameters()
    }
    again = inject_from(Plain(), tmp_path / "checkpoint-2")
    assert same(again, adapter)
