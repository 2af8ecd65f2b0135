"""Saving a run as it stands: the checkpoint, the published adapter, and the checkpoints that are no longer needed.

An adapter that holds NaN or infinity is never saved: whatever is on the disk can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backhand.errors import ArtifactError, CheckError
from backhand.train.base_guard import first_names, is_finite, named_unusable
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
        make_room: called before the buffers of a checkpoint are made, and when they are no longer needed.
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
        make_room: Callable[[], object] = lambda: None,
    ) -> None:
        self._directory = directory
        self._store = store
        self._state = state
        self._adapter_files = adapter_files
        self._facts = facts
        self._keep = keep
        self._best_only = best_only
        self._protected = protected
        self._make_room = make_room
        self._saved: bytes | None = None

    def save(self, better: bool) -> None:
        """Save the state, unless it is saved already; publish the adapter if it is the one to publish.

        Until some held-out loss is the best so far, the newest adapter is published.

        Args:
            better: whether the newest held-out loss is the best so far.

        Raises:
            ResourceError: with the bytes needed and free; what was saved before is intact.
            CheckError: the adapter is not finite; nothing is saved.
        """
        progress = self._state.progress
        if self._saved == progress.to_json():
            return
        self._require_finite()
        self._directory.sync_lines()
        self._make_room()
        contents = self._state.contents(self._adapter_files)
        self._store.save(progress.step, contents, self._facts(progress.step))
        self._saved = contents[PROGRESS_FILE]
        if better or not self._best_only or progress.best_step is None:
            self._directory.publish_adapter(adapter_part(contents))
        del contents
        self._make_room()  # a step's buffers would not lie where these did
        best = set() if progress.best_step is None else {progress.best_step}
        self._store.prune(progress.step, self._keep, {progress.step} | best | self._protected)

    def _require_finite(self) -> None:
        """Look at the tensors themselves: a loss can be finite while they are not."""
        if not is_finite(self._state.lora.values):
            unusable = list(named_unusable(self._state.lora.named_tensors()))
            raise CheckError(
                f"{len(unusable)} adapter factors hold NaN or infinity after step {self._state.progress.step}; "
                "they are not saved",
                where=first_names(unusable),
                next_step="use the adapter or the checkpoint saved before; start again with a lower --learning-rate, "
                "or --dtype float32",
            )

    def restored(self, contents: Mapping[str, bytes]) -> None:
        """Take note of the checkpoint that the state was restored from, and put `adapter/` in order.

        A crash may have come between a checkpoint and the adapter that belongs to it.
        """
        progress = self._state.progress
        self._saved = contents[PROGRESS_FILE]
        wanted, best_step = contents, progress.best_step
        if self._best_only and best_step is not None and best_step != progress.step:
            try:
                wanted = self._store.load(best_step).contents
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
