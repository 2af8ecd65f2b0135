"""Resume a run: merge the stored configuration with new options, refuse differences, and prove resuming."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from backhand.adapters.targets import in_numbers
from backhand.data.raw_rows import IN_MEMORY
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
from backhand.runs.directory import ADAPTER, CONFIG, Proof, ProofLog, free_name
from backhand.training.contexts import with_context_text
from backhand.training.identity import FREE_OPTIONS, Identity, decisive_settings
from backhand.words import name_list, shorten

_NOT_TO_CHOOSE = {"run.output", "run.resume", "run.overwrite", "run.from_adapter"}
_CHANGEABLE = sorted("--" + name.split(".")[1].replace("_", "-") for name in FREE_OPTIONS - _NOT_TO_CHOOSE)
_UNRESOLVED = (None, "auto")

_FACTS = {
    "tokenizer_digest": "tokenizer: its tokens or merges have changed",
    "chat_template_digest": "chat template: it has changed",
}
_ROWS = (("data_digest", "rows", "data"), ("held_out_digest", "held_out_rows", "held-out data"))
"""The digest of rows, their number, and their name."""

_BASE_PREFIX = "base model: "
_BASE_CHANGED = f"{_BASE_PREFIX}the adapted weights are not those the run began with"
_CONFIG_CHANGED = f"{_BASE_PREFIX}its configuration is not the one the run began with"
_FROZEN_CHANGED = f"{_BASE_PREFIX}weights other than the adapted ones are not those the run began with"


def resumed_config(given: TrainConfig, directory: Path, typed: frozenset[str] = frozenset()) -> TrainConfig:
    """Return the stored configuration with new values of the options in `FREE_OPTIONS`.

    An option with its default value counts as not given unless it was typed. Layers given in words are compared by
    their numbers in the run's model.

    Args:
        given: the options of this command.
        directory: the run directory.
        typed: names of the typed options.

    Raises:
        UsageError: options differ that determine the result of the run. Lists all of them.
    """
    stored = _with_explicit_base(load_config(directory / CONFIG))
    objective = given.objective
    if objective.context_column is None:  # the stored column says whether `context` is a file or a directory
        objective = replace(objective, context_column=stored.objective.context_column)
    given = replace(given, objective=with_context_text(objective))
    given_now, free = _with_layer_numbers(given, stored, typed), lambda part, name: f"{part}.{name}" in FREE_OPTIONS
    config, differences = merge_options(given_now, stored, typed, free)
    if differences:
        lines = [f"{name}: {before!r} in the run, {value!r} given" for name, before, value in differences]
        raise _refused(lines, directory)
    # Rows in memory are equal to their name in the file, and only the given name carries them.
    rows = {name: value for name in ("data", "eval_data") if (value := getattr(given.data, name))}
    config = replace(config, data=replace(config.data, **rows))
    # These options belong to the command, not to the run.
    of_command = {name: getattr(given.run, name) for name in ("output", "workers", "quiet", "debug", "prove_resume")}
    # A checkpoint contains the values of the adapter that the run started from. Without one, see `original_adapter`.
    return replace(config, run=replace(config.run, resume=True, overwrite=False, from_adapter=None, **of_command))


Config = TypeVar("Config", bound=TrainConfig)


def merge_options(
    given: Config, stored: Config, typed: frozenset[str], may_change: Callable[[str, str], bool]
) -> tuple[Config, list[tuple[str, Any, Any]]]:
    """Return the stored configuration with the given values of options that may change, and all other differences.

    An option with its default value counts as not given unless it was typed. The stored configuration has a resolved
    value for every option, so None and `auto` count as not given as well.

    Args:
        given: the options of this command.
        stored: the configuration of the run.
        typed: names of the typed options.
        may_change: returns True if the option of this part and name may change.

    Returns:
        the configuration; and (name, stored value, given value) of every differing option that may not change.
    """
    differences, parts = [], {}
    for part, defaults in vars(type(stored)()).items():
        given_part, stored_part = getattr(given, part), getattr(stored, part)
        changed: dict[str, Any] = {}
        for name, default in vars(defaults).items():
            value, before = getattr(given_part, name), getattr(stored_part, name)
            if value in (before, *_UNRESOLVED) or (value == default and name not in typed):
                continue
            if may_change(part, name):
                changed[name] = value
            else:
                differences.append((name, before, value))
        parts[part] = replace(stored_part, **changed)
    return replace(stored, **parts), differences


def _with_layer_numbers(given: TrainConfig, stored: TrainConfig, typed: frozenset[str]) -> TrainConfig:
    """Return the given options with layers as numbers instead of words, for the run's model."""
    adapter, model = given.adapter, given.model.model
    if not adapter.layers:
        return given
    if model == ModelOptions().model and "model" not in typed:
        model = stored.model.model
    source = open_model(model, quantize=stored.model.quantize)
    engine = choose_engine(stored.model, source, torch.float32)  # layers do not depend on the dtype
    parameters = adapter.target_parameters or stored.adapter.target_parameters
    in_words = replace(stored.adapter, layers=adapter.layers, layers_to_transform=None, target_parameters=parameters)
    resolved = in_numbers(in_words, [slot.name for slot in engine.layout(in_words).slots])
    numbers, named = resolved.layers_to_transform, resolved.target_parameters if adapter.target_parameters else ()
    numbered = replace(adapter, layers="", layers_to_transform=numbers, target_parameters=named)
    return replace(given, adapter=numbered)


def _with_explicit_base(stored: TrainConfig) -> TrainConfig:
    """Set the base to dense if it is unresolved, as in runs of versions that had no quantized base."""
    if stored.model.base != "auto":
        return stored
    return replace(stored, model=replace(stored.model, base="dense"))


def original_adapter(directory: Path) -> str | None:
    """Return the adapter that a run started from. A run without a checkpoint starts from it again."""
    return load_config(directory / CONFIG).run.from_adapter


def run_differences(facts: Mapping[str, Any], identity: Identity) -> list[str]:
    """Return the differences between a checkpoint's digests and settings and the current ones.

    Args:
        facts: the facts in the checkpoint's manifest.
        identity: the current identity of the run.
    """
    today = identity.facts
    differences = [] if facts.get("base_digest") == today["base_digest"] else [_BASE_CHANGED]
    if (before_config := facts.get("model_config")) is not None:  # checkpoints of earlier versions lack it
        changed = config_differences(before_config if isinstance(before_config, dict) else {}, today["model_config"])
        differences += [] if changed is None else [f"{_CONFIG_CHANGED}: {changed}"]
    differences += [what for name, what in _FACTS.items() if facts.get(name) != today[name]]
    data = identity.config.data
    for digest, count, what in _ROWS:
        if facts.get(digest) != today[digest]:
            files = name_list(map(shorten, data.eval_data if what != "data" and data.eval_data else data.data))
            counts = f": {facts[count]:,} rows then, {today[count]:,} now" if isinstance(facts.get(count), int) else ""
            differences.append(f"{what}: the rows of {files}, or their tokens, have changed{counts}")
    # A resumed run uses config.toml, which may have been edited. An option that the checkpoint lacks did not exist in
    # the version that wrote it, which behaved like the option's default.
    before, now = decisive_settings(_with_explicit_base(TrainConfig())), today["settings"]
    stored = facts.get("settings")
    before |= stored if isinstance(stored, dict) else {}
    changed_names = (name for name in sorted({*before, *now} - FREE_OPTIONS) if before.get(name) != now.get(name))
    return differences + [
        f"{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} in {CONFIG}" for name in changed_names
    ]


def frozen_differences(facts: Mapping[str, Any], frozen_digest: str) -> list[str]:
    """Return the difference in the digest of the loaded frozen tensors, if there is one."""
    return [] if facts.get("frozen_digest") == frozen_digest else [_FROZEN_CHANGED]


def refuse_differences(differences: list[str], directory: Path, force: bool, warn: Callable[[str], None]) -> None:
    """Raise UsageError for the differences. If all are about the base and `force` is set, pass them to `warn`."""
    if force and all(difference.startswith(_BASE_PREFIX) for difference in differences):
        for difference in differences:
            warn(f"{difference}; continuing all the same, as --force-base says")
    elif differences:
        raise _refused(differences, directory)


def _refused(differences: list[str], directory: Path) -> UsageError:
    adapter = directory / ADAPTER
    other = f"start another run from this adapter: --from-adapter {shlex.quote(str(adapter))}"
    if not adapter.is_dir():  # the run ended before its first checkpoint
        other = f"start the run anew with --overwrite instead of --resume, or give --output {free_name(directory)}"
    return UsageError(
        "the run cannot be continued to the same result: " + "; ".join(differences),
        where=str(directory),
        why=f"only these may change: {', '.join(_CHANGEABLE)}, as long as rows and base stay the same",
        next_step=f"put them back, or {other}",
    )


def unread_sources(given: TrainConfig, directory: Path) -> list[str]:
    """Return a note for each option that names other rows than a finished run has, whose rows are not read again.

    Raises:
        UsageError: the rows are in memory and differ from those of the run.
    """
    stored, notes = load_config(directory / CONFIG).data, []
    for name in ("data", "eval_data"):
        before, now = getattr(stored, name), getattr(given.data, name)
        if not now or list(map(os.path.abspath, now)) == list(map(os.path.abspath, before)):
            continue
        if before and all(source.startswith(IN_MEMORY) for source in (*before, *now)):
            raise _refused([f"{name}: the rows have changed"], directory)
        trained = f"has {name_list(map(shorten, before))}" if before else "has none"
        notes.append(f"the run is finished and {trained}: --{name.replace('_', '-')} is not read")
    return notes


def proof_begin(
    store: CheckpointStore, checkpoint: Checkpoint | None, steps: int | None, total_steps: int
) -> int | None:
    """Return the step at which the proof of resuming begins, or None for no proof.

    It is `steps` before the end. If a resumed run is past this step, it is the newest earlier step with a checkpoint.

    Args:
        store: the checkpoints of the run.
        checkpoint: the checkpoint from which the run is resumed, or None.
        steps: number of steps to repeat; None for no proof.
        total_steps: number of steps of the run.

    Raises:
        UsageError: the run has fewer steps, or a resumed run has no checkpoint that is early enough.
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
    """Repeat the steps after a checkpoint and compare the final states bit by bit. Nothing is written.

    Args:
        finished: the loop of the finished run. Its state is restored afterwards.
        checkpoint: the checkpoint from which to repeat.
        log: receives the proof.

    Returns:
        False if a signal stopped the repetition, so that nothing is proved.

    Raises:
        CheckError: the repetition ends in other bits.
    """
    expected = state_digests(finished.state)
    steps = finished.state.progress.step - checkpoint.step
    lora = finished.state.lora
    values, gradients = lora.values.clone(), lora.gradients.clone()
    optimizer = finished.state.optimizer
    repeated = RunState(lora, AdapterOptimizer(lora, optimizer.options, optimizer.average_rate), Progress())
    repeated.restore(checkpoint, finished.model.dtype)
    model, plan, processes = finished.model, finished.plan, finished.processes
    evaluator = Evaluator(model, repeated, plan, held_out=finished.evaluator.held_out, processes=processes)
    loop = TrainingLoop(
        model,
        repeated,
        finished.packer,
        finished.sampler,
        plan,
        evaluator,
        processes=processes,
        objective=finished.objective,
        sampled=finished.sampled and finished.sampled.repeated(),
    )
    try:
        completed = loop.run()
        digests = state_digests(repeated)
    finally:
        lora.values.copy_(values)
        lora.gradients.copy_(gradients)
        lora.refresh_compute(finished.model.dtype)
    if not completed:
        return False
    different = [name for name, digest in expected.items() if digests[name] != digest]
    claim = f"the last {steps} steps, repeated from a checkpoint, end in the same bits"
    log(Proof(claim, not different, len(different), 0, kind="resume"))
    if different:
        raise CheckError(
            f"the last {steps} steps, repeated from the checkpoint of step {checkpoint.step}, end in other bits",
            where=", ".join(different),
            why="a kernel on this machine does not repeat its results",
            next_step="try --threads 1; the adapter is saved, only its repetition differs",
        )
    return True


def state_digests(state: RunState) -> dict[str, str]:
    """Return the SHA-256 of the adapter, each moment and the counters without times."""
    tensors = {"adapter": state.lora.values, **state.optimizer.moments()}
    digests = {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).numpy().data).hexdigest()
        for name, tensor in tensors.items()
    }
    digests["progress"] = hashlib.sha256(replace(state.progress, train_s=0.0).to_json()).hexdigest()
    return digests
