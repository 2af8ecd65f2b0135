"""The study of a search: its trials in Optuna's journal, which several processes share under one lock.

    search.toml     every option of the search, including those of the runs
    rows.json       digests of the rows, which must stay the same
    study.journal   Optuna's journal: values of each trial, and its held-out loss at each stage
    trials/NAME/    one run directory per trial
    adapter/        adapter of the best trial
    search.json     result

A process that trains a trial has a lock on `trials/NAME.lock`, which the system drops when the process ends. An
unfinished trial without such a lock belongs to a process that was killed or stopped. It is continued first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backhand.errors import BackhandError, UsageError, first_line
from backhand.files import directory_errors, make_directory
from backhand.search.journal import Journal, damaged_study
from backhand.search.space import Dimension, Values
from backhand.system import PLAIN, install, lock
from backhand.words import name_list

STUDY = "study.journal"
TRIALS = "trials"
RESULT = "search.json"
_NAME = "backhand"


@dataclass(frozen=True)
class Trial:
    """One run of a search, as stored in the journal."""

    number: int  # counted from 0; the first trial has the options as given
    values: Values  # of the dimensions; an option that has no value as given is missing
    seed: int  # of the run
    repeats: int | None = None  # number of the trial that this one repeats with another seed, or None
    goal: int = 1  # stage to train to, counted from 1
    done: int = 0  # stage reached; 0 for none
    losses: tuple[float, ...] = ()  # best held-out loss until each stage
    steps: int = 0  # optimizer steps done
    spent_s: float = 0.0  # seconds spent so far
    failed: str | None = None  # reason why it cannot continue, or None
    adapter: Mapping[str, str] = field(default_factory=dict)  # digest of each file of its adapter, once it is finished

    @property
    def name(self) -> str:
        """Name of its directory."""
        return trial_name(self.number)

    @property
    def label(self) -> str:
        """Name for the report, with the trial that it repeats."""
        more = "" if self.repeats is None else f" (as {self.repeats:03d}, seed {self.seed})"
        return f"{self.name}{' as given' if self.number == 0 else ''}{more}"

    @property
    def due(self) -> bool:
        """True if it has steps left until its goal."""
        return self.failed is None and self.done < self.goal

    def loss_at(self, stage: int) -> float:
        """Return the best held-out loss until a stage; infinite if it failed or has not reached the stage."""
        return self.losses[stage - 1] if self.failed is None and len(self.losses) >= stage else math.inf


class Study:
    """The trials of one search. Except for `release`, its methods are called inside `locked`.

    Args:
        given: values of the options as given, which may lie outside the dimensions. An option without a value is
            missing.
        last: number of the last stage.

    Raises:
        UsageError: Optuna is not installed.
        ArtifactError: the journal cannot be read, or is not one that a search of these dimensions wrote.
    """

    def __init__(self, directory: Path, dimensions: Sequence[Dimension], given: Values, last: int) -> None:
        self.directory = directory
        self._dimensions, self._given, self._last = {one.name: one for one in dimensions}, given, last
        self._distributions = distributions(dimensions, given)
        self._optuna = optuna_installed()
        self._claims: dict[int, int] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from reading or writing the study."""
        make_directory(self.directory / TRIALS)
        descriptor = _open(self.directory / "search.lock")
        try:
            lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    def _study(self) -> Any:
        """Return Optuna's study, created if the journal does not contain it."""
        path = self.directory / STUDY
        try:
            storage = self._optuna.storages.journal.JournalStorage(Journal(path))
            exists = any(study.study_name == _NAME for study in storage.get_all_studies())
            open_study = self._optuna.load_study if exists else self._optuna.create_study
            return open_study(storage=storage, study_name=_NAME)
        except BackhandError:
            raise
        except Exception as error:  # noqa: BLE001 - Optuna trusts its records, and wrong ones may raise anything
            raise damaged_study(path, f"{type(error).__name__}: {first_line(error)}") from None

    def trials(self) -> list[Trial]:
        """Return all trials by number. Raises ArtifactError for one that a search did not write."""
        return [self._trial(one) for one in self._study().get_trials(deepcopy=False)]

    def _trial(self, frozen: Any) -> Trial:
        """Return a trial of the journal after a check of every field."""
        where, attributes = self.directory / STUDY, frozen.user_attrs
        if not isinstance(attributes, dict):
            raise damaged_study(where, f"trial {frozen.number}: its attributes are not an object")
        if wrong := [name for name, value in attributes.items() if not _well_typed(name, value)]:
            raise damaged_study(where, f"trial {frozen.number}: {name_list(wrong)} is unknown or has a wrong type")
        if missing := {"seed", "goal"} - attributes.keys():
            raise damaged_study(where, f"trial {frozen.number}: {name_list(sorted(missing))} is missing")
        losses = tuple(attributes.get("losses", ()))
        trial = Trial(frozen.number, dict(frozen.params), **{**attributes, "losses": losses})
        if not self._is_consistent(trial, finished=frozen.state.is_finished()):
            raise damaged_study(where, f"trial {frozen.number}: its fields contradict each other or the options")
        return trial

    def _is_consistent(self, trial: Trial, *, finished: bool) -> bool:
        """Return True if a search can have written these fields together."""
        as_given = 0 in (trial.number, trial.repeats)
        expected = self._given.keys() if as_given else self._dimensions.keys()
        return (
            trial.values.keys() == expected
            and all(
                value == self._given.get(name) or self._dimensions[name].allows(value)
                for name, value in trial.values.items()
            )
            and 1 <= trial.goal <= self._last
            and trial.done <= self._last
            and (trial.repeats is None or trial.repeats < trial.number)
            and (trial.failed is not None or trial.done == 0 or bool(trial.losses))
            and not (finished and trial.due)
        )

    def add(self, values: Values, seed: int, goal: int, repeats: int | None = None) -> Trial:
        """Add a trial and claim it.

        Raises:
            ArtifactError: its directory exists, so that the journal must have lost trials.
        """
        optuna, study = self._optuna, self._study()
        directory = self.directory / TRIALS / trial_name(len(study.get_trials(deepcopy=False)))
        if os.path.lexists(directory):
            raise damaged_study(self.directory / STUDY, f"{directory} exists, and the study does not know this trial")
        distributions = {name: kind for name, kind in self._distributions.items() if name in values}
        parameters = {"params": values, "distributions": distributions, "state": optuna.trial.TrialState.RUNNING}
        attributes = {"seed": seed, "goal": goal, "repeats": repeats}
        study.add_trial(optuna.trial.create_trial(**parameters, user_attrs=attributes))
        trial = self._trial(study.get_trials(deepcopy=False)[-1])
        self.claim(trial)
        return trial

    def write(self, number: int, attributes: Mapping[str, Any], *, finished: bool = False) -> None:
        """Set fields of a trial.

        Args:
            finished: whether the trial has reached its last step. Optuna does not change a finished trial any more, so
                that a trial which stopped early must stay a running one.
        """
        study, states = self._study(), self._optuna.trial.TrialState
        storage = study._storage
        trial = study.get_trials(deepcopy=False)[number]
        if trial.state.is_finished():
            return
        for name, value in attributes.items():
            storage.set_trial_user_attr(trial._trial_id, name, value)
        for stage, loss in enumerate(attributes.get("losses", ()), 1):
            storage.set_trial_intermediate_value(trial._trial_id, stage, loss)
        if "failed" in attributes:
            storage.set_trial_state_values(trial._trial_id, states.FAIL)
        elif finished:
            storage.set_trial_state_values(trial._trial_id, states.COMPLETE, [min(attributes["losses"])])

    def claim(self, trial: Trial) -> bool:
        """Lock a trial for this process; return False if another process has it."""
        descriptor = _open(self.directory / TRIALS / f"{trial.name}.lock")
        if not lock(descriptor):
            os.close(descriptor)
            return False
        self._claims[trial.number] = descriptor
        return True

    def release(self, trial: Trial) -> None:
        """Unlock a trial that `claim` or `add` locked."""
        os.close(self._claims.pop(trial.number))


def distributions(dimensions: Sequence[Dimension], values: Values | None = None) -> dict[str, Any]:
    """Return Optuna's distributions of the dimensions, extended to contain `values`."""
    kinds = optuna_installed().distributions
    result: dict[str, Any] = {}
    for one in dimensions:
        given = () if values is None or one.name not in values else (values[one.name],)
        if one.choices:
            result[one.name] = kinds.CategoricalDistribution(tuple(dict.fromkeys((*one.choices, *given))))
            continue
        low, high = min(one.low, *map(float, given), one.high), max(one.high, *map(float, given), one.low)
        log = one.log and low > 0
        if one.whole:
            result[one.name] = kinds.IntDistribution(int(low), int(high), log=log)
        else:
            result[one.name] = kinds.FloatDistribution(low, high, log=log)
    return result


def optuna_installed() -> Any:
    """Return the package `optuna`, set to print errors only. Raises UsageError if it is not installed."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise UsageError("Optuna is not installed", where="search", next_step=install("'backhand[search]'")) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def trial_name(number: int) -> str:
    """Return the name of a trial's directory."""
    return f"{number:03d}"


def _well_typed(name: str, value: Any) -> bool:
    """Return True if an attribute in the journal has the type of the field of `Trial` with its name."""
    match name:
        case "seed" | "goal" | "done" | "steps":
            return _is_count(value)
        case "repeats":
            return value is None or _is_count(value)
        case "losses":
            return isinstance(value, list) and all(map(_is_figure, value))
        case "spent_s":
            return _is_figure(value) and value >= 0
        case "failed":
            return value is None or isinstance(value, str)
        case "adapter":
            return isinstance(value, dict) and all(
                Path(file).name == file and "\0" not in file and isinstance(digest, str)
                for file, digest in value.items()
            )
    return False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_figure(value: Any) -> bool:
    """Return True for a loss or a time: a number whose square does not overflow."""
    return type(value) in (int, float) and abs(value) < 1e100


def _open(path: Path) -> int:
    with directory_errors(path.parent):
        return os.open(path, os.O_RDWR | os.O_CREAT | PLAIN, 0o666)
