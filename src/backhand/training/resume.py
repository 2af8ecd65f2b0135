"""Continuing a run: its stored configuration, and everything that must be as it was, in one list of differences."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from backhand.adapters.targets import in_numbers
from backhand.engines.decoder_engine import choose_engine
from backhand.errors import CheckError, UsageError
from backhand.loop.evaluator import Evaluator
from backhand.loop.loop import TrainingLoop
from backhand.loop.state import Progress, RunState
from backhand.loop.step import AdapterOptimizer
from backhand.nn.decoder.config_facts import config_differences
from backhand.nn.loading import open_model
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.config_file import load_config
from backhand.runs.checkpoint import Checkpoint, CheckpointStore
from backhand.runs.directory import CONFIG, Proof, ProofLog
from backhand.training.identity import FREE_OPTIONS, Identity, decisive_settings

_NOT_TO_CHOOSE = {"run.output", "run.resume", "run.overwrite", "run.from_adapter"}
_CHANGEABLE = sorted("--" + name.split(".")[1].replace("_", "-") for name in FREE_OPTIONS - _NOT_TO_CHOOSE)
_LEFT_OPEN = (None, "auto")

_FACTS = {
    "tokenizer_digest": "tokenizer: its tokens or merges have changed",
    "chat_template_digest": "chat template: it has changed",
    "data_digest": "data: the rows, or their tokens, have changed",
    "held_out_digest": "held-out data: the rows, or their tokens, have changed",
}

_OF_THE_BASE = "base model: "
_BASE_CHANGED = f"{_OF_THE_BASE}the adapted weights are not those the run began with"
_CONFIG_CHANGED = f"{_OF_THE_BASE}its configuration is not the one the run began with"
_FROZEN_CHANGED = f"{_OF_THE_BASE}weights beside the adapted ones are not those the run began with"


def resumed_config(given: TrainConfig, directory: Path, typed: frozenset[str] = frozenset()) -> TrainConfig:
    """The stored configuration, with the options that may change taken from what is given now.

    What has its default value counts as not given, unless it is among those that were typed. Layers in words are those
    that they come to in the run's model.

    Raises:
        UsageError: options are given that differ from the run's and decide its result; lists them all.
    """
    stored = _as_it_was(load_config(directory / CONFIG))
    given_now, free = _with_numbers(given, stored, typed), lambda part, name: f"{part}.{name}" in FREE_OPTIONS
    config, differences = taken_over(given_now, stored, typed, free)
    if differences:
        told = [f"{name}: {before!r} in the run, {value!r} given" for name, before, value in differences]
        raise _refused(told, directory)
    # What this command is about is its own: the run's file says how the run began.
    own = {name: getattr(given.run, name) for name in ("output", "workers", "quiet", "debug", "prove_resume")}
    # The values of an adapter to start from are in the checkpoint, if there is one: see `begun_from`.
    return replace(config, run=replace(config.run, resume=True, overwrite=False, from_adapter=None, **own))


Config = TypeVar("Config", bound=TrainConfig)


def taken_over(
    given: Config, stored: Config, typed: frozenset[str], may_change: Callable[[str, str], bool]
) -> tuple[Config, list[tuple[str, Any, Any]]]:
    """The stored configuration with what is given now of the options that may change, by their part and name.

    What has its default value counts as not given, unless it is among those that were typed. What was left open when
    the run began was chosen then; to leave it open again asks for nothing.

    Returns:
        with it name, stored and given value of every other option that is given otherwise.
    """
    differences, parts = [], {}
    for part, usual in vars(type(stored)()).items():
        here, there = getattr(given, part), getattr(stored, part)
        changed: dict[str, Any] = {}
        for name, normal in vars(usual).items():
            value, before = getattr(here, name), getattr(there, name)
            if value in (before, *_LEFT_OPEN) or (value == normal and name not in typed):
                continue
            if may_change(part, name):
                changed[name] = value
            else:
                differences.append((name, before, value))
        parts[part] = replace(there, **changed)
    return replace(stored, **parts), differences


def _with_numbers(given: TrainConfig, stored: TrainConfig, typed: frozenset[str]) -> TrainConfig:
    """What is given, as a run stores it: with the numbers that its words for layers come to in the run's model."""
    adapter, model = given.adapter, given.model.model
    if not adapter.layers:
        return given
    if model == ModelOptions().model and "model" not in typed:
        model = stored.model.model
    source = open_model(model, quantize=stored.model.quantize)
    engine = choose_engine(stored.model, source, torch.float32)  # layers are the same in any dtype
    parameters = adapter.target_parameters or stored.adapter.target_parameters
    asked = replace(stored.adapter, layers=adapter.layers, layers_to_transform=None, target_parameters=parameters)
    found = in_numbers(asked, [slot.name for slot in engine.layout(asked).slots])
    numbers, named = found.layers_to_transform, found.target_parameters if adapter.target_parameters else ()
    numbered = replace(adapter, layers="", layers_to_transform=numbers, target_parameters=named)
    return replace(given, adapter=numbered)


def _as_it_was(stored: TrainConfig) -> TrainConfig:
    """Of a run from before there were bases of two forms, what is left open in no other run: its base was dense."""
    if stored.model.base != "auto":
        return stored
    return replace(stored, model=replace(stored.model, base="dense"))


def begun_from(directory: Path) -> str | None:
    """The adapter that a run started from: one that has no checkpoint yet starts from it again."""
    return load_config(directory / CONFIG).run.from_adapter


def run_differences(facts: Mapping[str, Any], identity: Identity) -> list[str]:
    """What of a checkpoint's digests and settings is not as it is today."""
    today = identity.facts
    differences = [] if facts.get("base_digest") == today["base_digest"] else [_BASE_CHANGED]
    if (then := facts.get("model_config")) is not None:  # checkpoints of earlier versions lack it
        changed = config_differences(then if isinstance(then, dict) else {}, today["model_config"])
        differences += [] if changed is None else [f"{_CONFIG_CHANGED}: {changed}"]
    differences += [what for name, what in _FACTS.items() if facts.get(name) != today[name]]
    # config.toml is what a resumed run goes by: somebody may have written into it. An option that a checkpoint does not
    # name did not exist when it was written; what it says by default was done then.
    before, there, now = decisive_settings(_as_it_was(TrainConfig())), facts.get("settings"), today["settings"]
    before |= there if isinstance(there, dict) else {}
    other = (name for name in sorted({*before, *now}) if before.get(name) != now.get(name))
    return differences + [
        f"{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} in {CONFIG}" for name in other
    ]


def frozen_differences(facts: Mapping[str, Any], frozen_digest: str) -> list[str]:
    """The same of every frozen tensor, as loaded."""
    return [] if facts.get("frozen_digest") == frozen_digest else [_FROZEN_CHANGED]


def refuse_differences(differences: list[str], directory: Path, force: bool, warn: Callable[[str], None]) -> None:
    """Raise UsageError for the differences, unless they are of the base alone and forced: then `warn` of them."""
    if force and all(difference.startswith(_OF_THE_BASE) for difference in differences):
        for difference in differences:
            warn(f"{difference}; continuing all the same, as --force-base says")
    elif differences:
        raise _refused(differences, directory)


def _refused(differences: list[str], directory: Path) -> UsageError:
    adapter = shlex.quote(str(directory / "adapter"))
    return UsageError(
        "the run cannot be continued to the same result: " + "; ".join(differences),
        where=str(directory),
        why=f"only these may change: {', '.join(_CHANGEABLE)}, as long as rows and base stay the same",
        next_step=f"put them back, or start another run from this adapter: --from-adapter {adapter}",
    )


def proof_begin(
    store: CheckpointStore, checkpoint: Checkpoint | None, steps: int | None, total_steps: int
) -> int | None:
    """The step that the proof begins at: `steps` before the end, or the newest kept one before that.

    Args:
        checkpoint: that the run goes on from, if it does.
        steps: to repeat; None for no proof, and then None is returned.

    Raises:
        UsageError: more steps than the run has, or a continued run is past it and has kept no checkpoint.
    """
    if steps is None:
        return None
    begin = total_steps - steps
    if begin < 0:
        raise UsageError(
            f"prove_resume {steps} is more than the {total_steps} steps of the run",
            where="prove_resume",
            next_step=f"give --prove-resume {total_steps} or less",
        )
    if checkpoint is None or checkpoint.step <= begin:
        return begin
    earlier = store.newest_valid(before=begin)
    if earlier is None:
        raise UsageError(
            f"the run is past step {begin}, and no checkpoint from before is kept",
            where="prove_resume",
            next_step=f"give --prove-resume {total_steps - store.steps()[0]}, which begins at the oldest that is kept",
        )
    return earlier.step


def prove_resume(finished: TrainingLoop, checkpoint: Checkpoint, log: ProofLog) -> bool:
    """Repeat what came after the checkpoint, without writing anything; afterwards the loop's state is as it was.

    Returns:
        False if the repetition was asked to stop, and nothing is proved.

    Raises:
        CheckError: the repetition ends in other bits.
    """
    wanted = state_digests(finished.state)
    steps = finished.state.progress.step - checkpoint.step
    lora = finished.state.lora
    values, gradients = lora.values.clone(), lora.gradients.clone()
    again = RunState(lora, AdapterOptimizer(lora, finished.state.optimizer.options), Progress())
    again.restore(checkpoint, finished.model.dtype)
    model, plan, processes = finished.model, finished.plan, finished.processes
    evaluator = Evaluator(model, again, plan, held_out=finished.evaluator.held_out, processes=processes)
    loop = TrainingLoop(
        *(model, again, finished.packer, finished.sampler, plan, evaluator),
        processes=processes,
        objective=finished.objective,
        rewarded=finished.rewarded and finished.rewarded.repeated(),
    )
    try:
        completed = loop.run()
        found = state_digests(again)
    finally:
        lora.values.copy_(values)
        lora.gradients.copy_(gradients)
        lora.refresh_compute(finished.model.dtype)
    if not completed:
        return False
    different = [name for name, digest in wanted.items() if found[name] != digest]
    said = f"the last {steps} steps, repeated from a checkpoint, end in the same bits"
    log(Proof(said, not different, len(different), 0, kind="resume"))
    if different:
        raise CheckError(
            f"the last {steps} steps, repeated from the checkpoint of step {checkpoint.step}, end in other bits",
            where=", ".join(different),
            why="a kernel on this machine does not repeat its results",
            next_step="try --threads 1; the adapter is saved, only its repetition differs",
        )
    return True


def state_digests(state: RunState) -> dict[str, str]:
    """SHA-256 of adapter, moments and counters; times are left out."""
    tensors = {"adapter": state.lora.values, **state.optimizer.moments()}
    digests = {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).numpy().data).hexdigest()
        for name, tensor in tensors.items()
    }
    digests["progress"] = hashlib.sha256(replace(state.progress, train_s=0.0).to_json()).hexdigest()
    return digests
