"""Continuing a run: its stored configuration, and everything that must be as it was, in one list of differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backhand.errors import UsageError
from backhand.train.config import TrainConfig
from backhand.train.config_file import load_config
from backhand.train.identity import FREE_OPTIONS, Identity
from backhand.train.run_directory import CONFIG

_NOT_TO_CHOOSE = {"run.output", "run.resume", "run.overwrite", "run.from_adapter"}
_CHANGEABLE = sorted("--" + name.split(".")[1].replace("_", "-") for name in FREE_OPTIONS - _NOT_TO_CHOOSE)
_LEFT_OPEN = (None, "auto")
_FACTS = {
    "tokenizer_digest": "tokenizer: its tokens or merges have changed",
    "chat_template_digest": "chat template: it has changed",
    "data_digest": "data: the rows, or their tokens, have changed",
    "held_out_digest": "held-out data: the rows, or their tokens, have changed",
}
_BASE_CHANGED = "base model: the adapted weights are not those the run began with"
_FROZEN_CHANGED = "base model: weights beside the adapted ones are not those the run began with"


def resumed_config(given: TrainConfig, directory: Path, typed: frozenset[str] = frozenset()) -> TrainConfig:
    """The stored configuration, with the options that may change taken from what is given now.

    What has its default value counts as not given, unless it is among those that were typed.

    Args:
        given: of this command.
        directory: of the run.
        typed: names of options that were given for certain.

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
            value, before, normal = (getattr(options, option.name) for options in (here, there, usual))
            # What was left open when the run began was chosen then; to leave it open again asks for nothing.
            if value in (before, *_LEFT_OPEN) or (value == normal and option.name not in typed):
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


@dataclass(frozen=True)
class BaseCheck:
    """What to do about a base model that is not the one the run began with.

    Attributes:
        directory: of the run.
        force: say so and go on.
        warn: told, in one sentence.
    """

    directory: Path
    force: bool
    warn: Callable[[str], None]

    def judge(self, differences: list[str]) -> None:
        """Raise UsageError for the differences, unless they are forced and of the base alone."""
        if self.force and all(difference in (_BASE_CHANGED, _FROZEN_CHANGED) for difference in differences):
            for difference in differences:
                self.warn(f"{difference}; continuing all the same, as --force-base says")
        elif differences:
            raise _refused(differences, self.directory)


def check_same_run(facts: Mapping[str, Any], identity: Identity, base: BaseCheck) -> None:
    """Compare a checkpoint's digests and settings with those of today.

    Raises:
        UsageError: lists everything that is not as it was.
    """
    today = identity.facts()
    differences = [] if facts.get("base_digest") == today["base_digest"] else [_BASE_CHANGED]
    differences += [what for name, what in _FACTS.items() if facts.get(name) != today[name]]
    differences += _changed_settings(facts.get("settings"), today["settings"])
    base.judge(differences)


def check_same_frozen(facts: Mapping[str, Any], frozen_digest: str, base: BaseCheck) -> None:
    """Compare every frozen tensor, as loaded, with those of the checkpoint. Raises UsageError."""
    base.judge([] if facts.get("frozen_digest") == frozen_digest else [_FROZEN_CHANGED])


def _changed_settings(before: object, today: Mapping[str, Any]) -> Iterator[str]:
    """config.toml is what a resumed run goes by: somebody may have written into it."""
    before = before if isinstance(before, dict) else {}
    for name in sorted({*before, *today}):
        if before.get(name) != today.get(name):
            yield f"{name}: {before.get(name)!r} in the checkpoint, {today.get(name)!r} in {CONFIG}"


def _refused(differences: list[str], directory: Path) -> UsageError:
    return UsageError(
        "the run cannot be continued to the same result: " + "; ".join(differences),
        where=str(directory),
        why=f"only these may change: {', '.join(_CHANGEABLE)}, as long as rows and base stay the same",
        next_step=f"put them back, or start another run from this adapter: --from-adapter {directory / 'adapter'}",
    )
