"""The study of a search: Optuna's journal in the output directory, which processes take work from under one lock.

    config.toml     every option of the search, the run's included
    study.journal   Optuna's: one trial a line of work, its values, and its held-out loss at each stage
    trials/NAME/    a run directory each
    adapter/        of the best trial
    search.json     what came of it

Whoever works on a trial holds `trials/NAME.lock` open, which the system lets go when the process ends, however it ends.
A trial that was begun, is not done with and is held by nobody is somebody's who was killed: it is gone on with first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backhand.errors import ArtifactError, UsageError
from backhand.files import make_directory, taking_directory
from backhand.search.space import Dimension, Values
from backhand.system import PLAIN, install, lock

STUDY = "study.journal"
TRIALS = "trials"
RESULT = "search.json"
_NAME = "backhand"


@dataclass(frozen=True)
class Trial:
    """One run of a search, as the journal has it."""

    number: int  # of the trial, from 0; the first has the options as they are given
    values: Values  # of what is varied
    seed: int  # of the run
    repeats: int | None = None  # the trial whose values it has with another seed; None for one of its own
    goal: int = 1  # the stage it is to come to, from 1
    done: int = 0  # the stage it has come to; 0 for none
    losses: tuple[float, ...] = ()  # the best held-out loss until each stage
    steps: int = 0  # optimizer steps done
    spent_s: float = 0.0  # time it took so far
    failed: str | None = None  # why it cannot go on, or None

    @property
    def name(self) -> str:
        """Its directory's."""
        return f"{self.number:03d}"

    @property
    def label(self) -> str:
        """Its name for people, with what it repeats."""
        more = "" if self.repeats is None else f" (as {self.repeats:03d}, seed {self.seed})"
        return f"{self.name}{' as given' if self.number == 0 else ''}{more}"

    @property
    def due(self) -> bool:
        """Whether there is something to do."""
        return self.failed is None and self.done < self.goal

    def loss_at(self, stage: int) -> float:
        """The best held-out loss until this stage; infinite for one that failed or has not come to it."""
        return self.losses[stage - 1] if self.failed is None and len(self.losses) >= stage else math.inf


class Study:
    """The trials of one search; every method is to be called inside `locked`.

    Args:
        given: the values of the options as they are given, which may lie outside.

    Raises:
        UsageError: Optuna is not installed.
        ArtifactError: the journal cannot be read.
    """

    def __init__(self, directory: Path, dimensions: Sequence[Dimension], given: Values) -> None:
        self.directory = directory
        self._distributions = distributions(dimensions, given)
        self._optuna = optuna_installed()
        self._held: dict[int, int] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process reads or writes the study."""
        make_directory(self.directory / TRIALS)
        descriptor = _open(self.directory / "search.lock")
        try:
            lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    def _study(self) -> Any:
        """Optuna's study, made where it is not there."""
        path = self.directory / STUDY
        _mend(path)
        journal = self._optuna.storages.journal
        try:
            storage = journal.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=_Held()))
            return self._optuna.create_study(storage=storage, study_name=_NAME, load_if_exists=True)
        except (ValueError, KeyError, AssertionError) as error:
            raise ArtifactError(
                "the study cannot be read", where=str(path), why=str(error), next_step="give another --output"
            ) from None

    def trials(self) -> list[Trial]:
        """All of them, by number."""
        return [_trial(one) for one in self._study().get_trials(deepcopy=False)]

    def begin(self, values: Values, seed: int, goal: int, repeats: int | None = None) -> Trial:
        """Add a trial, and hold it."""
        optuna, study = self._optuna, self._study()
        made = {"params": values, "distributions": self._distributions, "state": optuna.trial.TrialState.RUNNING}
        attributes = {"seed": seed, "goal": goal, "repeats": repeats}
        study.add_trial(optuna.trial.create_trial(**made, user_attrs=attributes))
        trial = _trial(study.get_trials(deepcopy=False)[-1])
        self.hold(trial)
        return trial

    def write(self, number: int, attributes: Mapping[str, Any], *, over: bool = False) -> None:
        """Set what a trial's fields of these names are.

        Args:
            over: whether it has come to its end. One that stopped early has not, and Optuna has it as running: nothing
                of a trial that is over can be changed any more.
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
        elif over:
            storage.set_trial_state_values(trial._trial_id, states.COMPLETE, [min(attributes["losses"])])

    def hold(self, trial: Trial) -> bool:
        """Keep other processes from this trial; False where one has it."""
        descriptor = _open(self.directory / TRIALS / f"{trial.name}.lock")
        if not lock(descriptor):
            os.close(descriptor)
            return False
        self._held[trial.number] = descriptor
        return True

    def let_go(self, trial: Trial) -> None:
        """Leave it to whoever comes."""
        os.close(self._held.pop(trial.number))


def distributions(dimensions: Sequence[Dimension], values: Values | None = None) -> dict[str, Any]:
    """Optuna's distributions; wide enough for these values too, where some are given."""
    kinds = optuna_installed().distributions
    found: dict[str, Any] = {}
    for one in dimensions:
        given = () if values is None else (values[one.name],)
        if one.choices:
            found[one.name] = kinds.CategoricalDistribution(tuple(dict.fromkeys((*one.choices, *given))))
            continue
        low, high = min(one.low, *map(float, given), one.high), max(one.high, *map(float, given), one.low)
        log = one.log and low > 0
        if one.whole:
            found[one.name] = kinds.IntDistribution(int(low), int(high), log=log)
        else:
            found[one.name] = kinds.FloatDistribution(low, high, log=log)
    return found


def optuna_installed() -> Any:
    """The package, with only its errors printed. Raises UsageError where it is not installed."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise UsageError("Optuna is not installed", where="search", next_step=install("'backhand[search]'")) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _trial(frozen: Any) -> Trial:
    attributes = dict(frozen.user_attrs)
    attributes["losses"] = tuple(attributes.get("losses", ()))
    return Trial(number=frozen.number, values=dict(frozen.params), **attributes)


def _open(path: Path) -> int:
    with taking_directory(path.parent):
        return os.open(path, os.O_RDWR | os.O_CREAT | PLAIN, 0o666)


class _Held:
    """Optuna's own lock, in place of one that outlives a killed process: `Study.locked` is held already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _mend(path: Path) -> None:
    """Cut off half a line: a process was killed in it, or the machine went down."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        text = file.read()
        if not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
