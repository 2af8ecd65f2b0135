"""Continuing a run: its stored configuration, and everything that must be as it was, in one list of differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backhand.errors import UsageError
from backhand.train.config import TrainConfig
from backhand.train.config_file import load_config
from backhand.train.identity import FREE_OPTIONS, Identity
from backhand.train.run_directory import CONFIG

_CHANGEABLE = ("keep", "save-every", "log-every", "memory", "model", "data", "eval-data", "quiet")
_FACTS = {
    "base_digest": "base model: the adapted weights are not those the run began with",
    "tokenizer_digest": "tokenizer: its tokens or merges have changed",
    "chat_template_digest": "chat template: it has changed",
    "data_digest": "data: the rows, or their tokens, have changed",
    "held_out_digest": "held-out data: the rows, or their tokens, have changed",
    "settings_digest": "config.toml: options that decide the result have been changed in it",
}


def resumed_config(given: TrainConfig, directory: Path) -> TrainConfig:
    """The stored configuration, with the options that may change taken from what is given now.

    What has its default value counts as not given.

    Args:
        given: of this command.
        directory: of the run.

    Raises:
        UsageError: options are given that differ from the run's and decide its result; lists them all.
    """
    stored = load_config(directory / CONFIG)
    default = TrainConfig()
    differences = []
    parts: dict[str, Any] = {}
    for part in dataclasses.fields(TrainConfig):
        here, there, usual = (getattr(config, part.name) for config in (given, stored, default))
        changed: dict[str, Any] = {}
        for option in dataclasses.fields(there):
            value, before = getattr(here, option.name), getattr(there, option.name)
            if value in (getattr(usual, option.name), before):
                continue
            if f"{part.name}.{option.name}" in FREE_OPTIONS:
                changed[option.name] = value
            else:
                differences.append(f"{option.name}: {before!r} in the run, {value!r} given")
        parts[part.name] = dataclasses.replace(there, **changed)
    if differences:
        raise _refused(differences, directory)
    # What this command is about is its own: the run's file says how the run began.
    run = dataclasses.replace(
        parts["run"],
        output=given.run.output,
        resume=True,
        overwrite=False,
        from_adapter=None,  # its values are in the checkpoint
        quiet=given.run.quiet,
        debug=given.run.debug,
        prove_resume=given.run.prove_resume,
    )
    return dataclasses.replace(stored, **{**parts, "run": run})


def check_same_run(facts: Mapping[str, Any], identity: Identity, directory: Path) -> None:
    """Compare a checkpoint's digests with those of today.

    Raises:
        UsageError: lists everything that is not as it was.
    """
    today = identity.facts()
    differences = [what for name, what in _FACTS.items() if facts.get(name) != today[name]]
    if differences:
        raise _refused(differences, directory)


def _refused(differences: list[str], directory: Path) -> UsageError:
    return UsageError(
        "the run cannot be continued to the same result: " + "; ".join(differences),
        where=str(directory),
        why=f"only these may change: {', '.join(f'--{name}' for name in _CHANGEABLE)}, as long as rows and base stay",
        next_step=f"put them back, or start another run from this adapter: --from-adapter {directory / 'adapter'}",
    )
