"""Saving a run as it stands: the checkpoint, the published adapter, and the checkpoints that are no longer needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backhand.errors import ArtifactError
from backhand.train.checkpoint import CheckpointStore
from backhand.train.run_directory import RunDirectory
from backhand.train.run_state import PROGRESS_FILE, STATE_FILE, RunState

NOT_ADAPTER = (STATE_FILE, PROGRESS_FILE)


class Saver:
    """Makes checkpoints of one run.

    Args:
        directory: of the run.
        store: its checkpoints.
        state: what to save.
        adapter_files: the adapter as PEFT reads it.
        facts: for the manifest, of so many steps.
        keep: how many checkpoints stay.
        best_only: whether `adapter/` is the best by held-out loss; else it is the newest.
        protected: further steps whose checkpoints stay.
    """

    def __init__(
        self,
        directory: RunDirectory,
        store: CheckpointStore,
        state: RunState,
        adapter_files: Callable[[], Mapping[str, bytes]],
        facts: Callable[[int], Mapping[str, Any]],
        *,
        keep: int,
        best_only: bool,
        protected: frozenset[int] = frozenset(),
    ) -> None:
        self._directory = directory
        self._store = store
        self._state = state
        self._adapter_files = adapter_files
        self._facts = facts
        self._keep = keep
        self._best_only = best_only
        self._protected = protected
        self._saved: bytes | None = None

    def save(self, better: bool) -> None:
        """Save the state, unless it is saved already; publish the adapter if it is the one to publish.

        Args:
            better: whether the newest held-out loss is the best so far.

        Raises:
            ResourceError: with the bytes needed and free; what was saved before is intact.
        """
        progress = self._state.progress
        if self._saved == progress.to_json():
            return
        contents = self._state.contents(self._adapter_files)
        self._store.save(progress.step, contents, self._facts(progress.step))
        self._saved = contents[PROGRESS_FILE]
        none_better = progress.finished and progress.best_step is None
        if better or not self._best_only or none_better:
            self._directory.publish_adapter(adapter_part(contents))
        best = set() if progress.best_step is None else {progress.best_step}
        self._store.prune(self._keep, {progress.step} | best | self._protected)

    def restored(self, contents: Mapping[str, bytes]) -> None:
        """Take note of the checkpoint that the state was restored from, and put `adapter/` in order.

        A crash may have come between a checkpoint and the adapter that belongs to it.
        """
        progress = self._state.progress
        self._saved = contents[PROGRESS_FILE]
        wanted = contents
        if self._best_only:
            if progress.best_step is None:
                return
            if progress.best_step != progress.step:
                try:
                    wanted = self._store.load(progress.best_step).contents
                except ArtifactError as error:
                    self._store.warn(f"adapter/ is left as it is: {error.what}")
                    return
        files = adapter_part(wanted)
        if any(not _same(self._directory, name, data) for name, data in files.items()):
            self._directory.publish_adapter(files)


def adapter_part(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those files of a checkpoint that are the adapter."""
    return {name: data for name, data in contents.items() if name not in NOT_ADAPTER}


def _same(directory: RunDirectory, name: str, data: bytes) -> bool:
    try:
        return (directory.adapter / name).read_bytes() == data
    except OSError:
        return False
